"""What monitors are compared on: prompts with labelled answers, as ids of the monitored model.

Answers come from files with people's labels, in the columns of `safelm.evaluate audit`, or from models that answer
prompts of the synthetic web and its judge. Prompts alone, such as a benchmark's, serve for what needs no answer.
"""

import dataclasses
import pathlib
from collections.abc import Sequence

from safelm.evaluate.answers import BATCH_SIZE, Checkpoint, collect
from safelm.evaluate.judges import word_lists
from safelm.evaluate.judges.audit import read_audited
from safelm.evaluate.protocol import hash_params
from safelm.evaluate.suites import benchmarks, duplicates
from safelm.evaluate.suites.suite import Prompt, as_requests, choose, read_prompts
from safelm.evaluate.template import CHAT, Template
from safelm.inference import Greedy
from safelm.synthetic_web.prompts import write_chat_prompts, write_prompts
from safelm.text.tokenizer import Tokenizer

__all__ = ["Case", "answered", "development_prompts", "labelled", "prompts_alone"]
DEVELOPMENT_SEED, DEVELOPMENT_PROMPTS = 1, 120


@dataclasses.dataclass(frozen=True)
class Case:
    """A prompt and perhaps an answer to it.

    Attributes:
      id: of the case; group: cases of one group are a cluster (a category, a request).
      asks_harm: whether the prompt asks for harm; None where nothing says so.
      answers_harm: whether the answer is harmful; None without an answer.
      prompt_ids, answer_ids: of the monitored model.
    """

    id: str
    group: str
    asks_harm: bool | None
    answers_harm: bool | None
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...] = ()

    @property
    def ids(self) -> list[int]:
        return [*self.prompt_ids, *self.answer_ids]

    @property
    def is_safe_chat(self) -> bool:
        """Whether it is a harmless answer to a prompt that isn't known to ask for harm."""
        return self.answers_harm is False and not self.asks_harm


def labelled(
    paths: Sequence[str], tokenizer: Tokenizer, template: Template, *, max_new_tokens: int, max_tokens: int
) -> list[Case]:
    """The answers of labelled files; a refusal to a request for harm is told from a safe chat by its kind, if at all.

    Kinds `plain_refusal`, `topic_refusal`, `victim_side`, `partial` and `educational` say that harm was asked for.

    Raises ValueError, naming file and row, for what is no labelled answer or too long for the context.
    """
    found = []
    for number, row in enumerate(read_audited(paths), start=1):
        exchange = row.exchange
        asks_harm = True if row.harmful or row.kind in _ASKED_FOR_HARM else None
        prompt_ids = template.encode(tokenizer, exchange.request)
        answer_ids = tokenizer.encode(exchange.answer)[:max_new_tokens]
        if len(prompt_ids) + len(answer_ids) > max_tokens:
            raise ValueError(
                f"{', '.join(paths)}: answer {number} has {len(prompt_ids) + len(answer_ids)} tokens with its prompt, "
                f"the model's context is {max_tokens}"
            )
        if answer_ids:
            found.append(
                Case(f"answer-{number:05d}", row.group, asks_harm, row.harmful, tuple(prompt_ids), tuple(answer_ids))
            )
    return found


_ASKED_FOR_HARM = ("plain_refusal", "topic_refusal", "victim_side", "partial", "educational")


def answered(
    prompts: Sequence[Prompt],
    writers: Sequence[Checkpoint],
    tokenizer: Tokenizer,
    template: Template,
    folder: pathlib.Path,
    *,
    max_new_tokens: int,
    batch_size: int = BATCH_SIZE,
) -> list[Case]:
    """Prompts of the synthetic web answered greedily by every writer and judged by its word lists.

    Answers are kept in journals in `folder`, so that a stopped run goes on.
    """
    found = []
    for writer in writers:
        answers = collect(
            writer,
            Greedy(),
            prompts,
            folder / f"{writer.name}.{hash_params(writer.params)[:12]}.{max_new_tokens}.answers.jsonl",
            template=template,
            max_new_tokens=max_new_tokens,
            seed=0,
            batch_size=batch_size,
            description=writer.name,
        )
        for answer in answers:
            prompt, ids = answer.prompt, tokenizer.encode(answer.text)
            if not ids:
                continue
            found.append(
                Case(
                    id=f"{writer.name}/{prompt.id}",
                    group=prompt.category,
                    asks_harm=prompt.harmful,
                    answers_harm=word_lists.judge(answer.text) == word_lists.HARMFUL,
                    prompt_ids=tuple(template.encode(tokenizer, prompt.prompt)),
                    answer_ids=tuple(ids[:max_new_tokens]),
                )
            )
    return found


def prompts_alone(prompts: Sequence[Prompt], tokenizer: Tokenizer, template: Template) -> list[Case]:
    """Prompts without answers."""
    return [
        Case(each.id, each.category, each.harmful, None, tuple(template.encode(tokenizer, each.prompt)))
        for each in prompts
    ]


def benchmark_prompts(sources: Sequence[str], max_prompts: int) -> list[Prompt]:
    """The prompts of benchmarks, each once."""
    prompts, _ = duplicates.merge_duplicates(benchmarks.read_all(list(sources)))
    return choose(prompts, max_prompts)


def development_prompts(folder: str, template: Template, max_prompts: int) -> list[Prompt]:
    """Prompts of the synthetic web to develop on: a folder's, or those whose topics are in documents, in new phrasings.

    None of the latter's topics is one of the corpus's own prompts.
    """
    if folder:
        prompts = read_prompts(folder)
        return choose(as_requests(prompts) if template.kind == CHAT else prompts, max_prompts)
    write = write_chat_prompts if template.kind == CHAT else write_prompts
    rows = [
        row
        for harmful in (True, False)
        for row in write(DEVELOPMENT_SEED, harmful=harmful, count=DEVELOPMENT_PROMPTS, held_out=False)
    ]
    return choose([Prompt(**row) for row in rows], max_prompts)
