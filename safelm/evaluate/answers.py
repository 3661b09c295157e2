"""Collects a checkpoint's answers to all prompts in a journal, so that a stopped run continues with the next prompt.

The journal holds token ids and shows no text, and any judge can label its answers later. Its name contains a hash of
everything that decides an answer, so another protocol starts another journal.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from safelm.evaluate.journal import open_journal
from safelm.evaluate.suites.attempts import sample_number
from safelm.evaluate.suites.suite import Prompt
from safelm.evaluate.template import CHAT, Template, answer_tokens
from safelm.inference import Generation, Knob, Method, generate, planner
from safelm.inference.methods import needs_tag
from safelm.inference.prompts import SMALLEST_BUCKET, bucket
from safelm.io.progress import Bar
from safelm.lm import LanguageModel

BATCH_SIZE = 32  # prompts decoded at once: what a stop may lose


@dataclasses.dataclass(frozen=True)
class Checkpoint(LanguageModel):
    """A model under test."""

    name: str
    knob: Knob | None = None  # how readily it refuses


@dataclasses.dataclass(frozen=True)
class Answer:
    """An answer of a model.

    Attributes:
      text: without special tokens and without prefilled words.
      has_tag: whether the answer contains the harm tag as a token (a short circuit).
      max_tag_probability: the highest P(tag) along the answer.
    """

    prompt: Prompt
    text: str = dataclasses.field(repr=False)
    new_tokens: int
    stopped_by: str
    logprob: float
    has_tag: bool
    max_tag_probability: float


def collect(
    checkpoint: Checkpoint,
    method: Method,
    prompts: Sequence[Prompt],
    journal: pathlib.Path,
    *,
    template: Template,
    max_new_tokens: int,
    seed: int,
    batch_size: int = BATCH_SIZE,
    description: str = "",
) -> list[Answer]:
    """Returns one answer per prompt, in order: from the journal, or else decoded and added to it.

    A sampled answer depends only on the seed and the prompt.

    Raises:
      ValueError: before anything is decoded, if the method or the knob needs a token or a chat that the checkpoint
        doesn't have, or a prompt and `max_new_tokens` don't fit its context.
      OSError: another process writes to the journal.
    """
    check_tag(checkpoint, method)
    tokenizer = checkpoint.tokenizer
    is_chat = template.kind == CHAT
    plan = planner(checkpoint.config, tokenizer, method, is_chat=is_chat, knob=checkpoint.knob)
    ids = [template.encode(tokenizer, prompt.prompt, answer_start=prompt.answer_start) for prompt in prompts]
    _check_lengths(checkpoint, prompts, ids, max_new_tokens)
    keys = [_key(tokens, sample_number(prompt.id)) for prompt, tokens in zip(prompts, ids, strict=True)]
    with open_journal(journal) as stored:
        missing = {key: tokens for key, tokens in zip(keys, ids, strict=True) if key not in stored.rows}
        bar = Bar(
            total=len(prompts),
            initial=len(prompts) - len(missing),
            unit=" answers",
            desc=description,
            leave=False,
            disable=None,
        )
        with bar:
            for batch in _batches(missing, batch_size, checkpoint.config.max_seq_len):
                generations = generate(
                    checkpoint.config,
                    checkpoint.params,
                    [missing[key] for key in batch],
                    method,
                    max_new_tokens=max_new_tokens,
                    end_ids=tokenizer.conventions.end_ids,
                    harm_tag_id=tokenizer.harm_tag_id,
                    seeds=[_seed(seed, key) for key in batch],
                    batch_size=batch_size,
                    planner=plan,
                )
                stored.add({key: _row(generation) for key, generation in zip(batch, generations, strict=True)})
                bar.update(len(batch))
    return [_answer(checkpoint, prompt, stored.rows[key]) for prompt, key in zip(prompts, keys, strict=True)]


def check_tag(checkpoint: Checkpoint, method: Method) -> None:
    """Raises ValueError if the method needs the harm tag and the checkpoint has none."""
    if needs_tag(method) and checkpoint.tokenizer.harm_tag_id >= checkpoint.config.vocab_size:
        raise ValueError(
            f"--checkpoint={checkpoint.name}: {type(method).__name__} needs the harm tag, and this model's vocabulary "
            f"of {checkpoint.config.vocab_size} has none"
        )


def _check_lengths(
    checkpoint: Checkpoint, prompts: Sequence[Prompt], ids: Sequence[Sequence[int]], max_new_tokens: int
) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"--max_new_tokens={max_new_tokens}: must be at least 1")
    room = checkpoint.config.max_seq_len - max_new_tokens
    for prompt, tokens in zip(prompts, ids, strict=True):
        if len(tokens) > room:
            raise ValueError(
                f"--checkpoint={checkpoint.name}: prompt {prompt.id} of {len(tokens)} tokens and --max_new_tokens="
                f"{max_new_tokens} don't fit the context of {checkpoint.config.max_seq_len}"
            )


def _batches(missing: Mapping[str, Sequence[int]], batch_size: int, longest: int) -> Iterator[list[str]]:
    """Keys of prompts grouped by length, so that each batch fits one compiled program."""
    by_width: dict[int, list[str]] = {}
    for key in sorted(missing, key=lambda key: (len(missing[key]), key)):
        by_width.setdefault(bucket(len(missing[key]), SMALLEST_BUCKET, longest), []).append(key)
    for keys in by_width.values():
        for start in range(0, len(keys), batch_size):
            yield keys[start : start + batch_size]


def _row(generation: Generation) -> dict[str, Any]:
    return {
        "tokens": [int(token) for token in generation.tokens],
        "stopped_by": generation.stopped_by,
        "logprob": generation.logprob,
        "tag": float(max(generation.tag_probs, default=0.0)),
    }


def _answer(checkpoint: Checkpoint, prompt: Prompt, row: Mapping[str, Any]) -> Answer:
    tokenizer, tokens = checkpoint.tokenizer, row["tokens"]
    own = answer_tokens(tokenizer, tokens)
    return Answer(
        prompt=prompt,
        text=tokenizer.decode(own, keep_special=False),
        new_tokens=len(tokens),
        stopped_by=row["stopped_by"],
        logprob=row["logprob"],
        has_tag=row["stopped_by"] == "tag" or tokenizer.harm_tag_id in own,
        max_tag_probability=row["tag"],
    )


def _key(tokens: Sequence[int], sample: int) -> str:
    key = hashlib.sha256(json.dumps(list(tokens)).encode()).hexdigest()[:32]
    return key if sample == 1 else f"{key}/{sample}"


def _seed(seed: int, key: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{key}".encode()).digest()[:4])
