"""The third tier on our own engine: a language model is asked about every answer, its reply held to the choices.

The choices' probabilities are compared where the reply begins: one forward an answer, and nothing to be parsed.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from safelm.evaluate.judges.questions import HARM_QUESTION, MANNER_QUESTION, Question, material, question_for
from safelm.evaluate.judges.reply_trees import ReplyTree
from safelm.evaluate.judges.scaled import ScaledJudge
from safelm.evaluate.judges.scales import SCALES, Distribution, normalized
from safelm.evaluate.judges.verdicts import HARMFUL, REFUSALS, UNSCORED, Exchange
from safelm.inference import EngineRequest, Greedy, run_all
from safelm.models import decoder as model
from safelm.safety.engine_models import judge_engine, read_engine_model
from safelm.safety.model_fingerprint import model_fingerprint
from safelm.safety.options import check_least, make_settings
from safelm.text.prompting import Frame, question_frame
from safelm.text.tokenizer import Tokenizer

_QUESTIONS = (HARM_QUESTION, MANNER_QUESTION)
_LEAST_ANSWER_TOKENS = 16


@dataclasses.dataclass(frozen=True)
class EngineJudgeSettings:
    """How a model on our engine is asked.

    Attributes:
      answer_tokens: of a longer answer so many are read, from its beginning; fewer where the context is smaller.
      least_mass: an answer is unscored where the choices together are less probable than this: the model doesn't answer
        the question.
      max_rows: answers judged at once.
      batch_tokens: answers are read in batches of about so many tokens, padding included.
    """

    answer_tokens: int = 1024
    least_mass: float = 0.05
    max_rows: int = 16
    batch_tokens: int = 8192

    def __post_init__(self) -> None:
        check_least("judge", self, answer_tokens=_LEAST_ANSWER_TOKENS, max_rows=1, batch_tokens=1)
        if not 0 <= self.least_mass < 1:
            raise ValueError(f"judge: least_mass={self.least_mass}: must lie in [0, 1)")


@dataclasses.dataclass(frozen=True)
class _Asked:
    """A question in a model's own template, whose beginning the engine keeps, and the tokens of its choices.

    Attributes:
      choice_ids: of each choice the ways of saying it in one token.
      tree: the choices as sequences of tokens, where one token doesn't tell them apart; else None.
    """

    question: Question
    frame: Frame
    choice_ids: tuple[tuple[int, ...], ...]
    tree: ReplyTree | None = None

    @property
    def reply_tokens(self) -> int:
        """The most tokens that are asked for behind the question."""
        return max(map(len, self.tree.sequences)) if self.tree else 1


class EngineJudge:
    """A judge on our own engine; a verdict depends neither on its batch nor on other exchanges (but for rounding)."""

    tier = "model"
    judges_harm = judges_manner = True

    def __init__(
        self,
        config: model.ModelConfig,
        params: model.Params,
        tokenizer: Tokenizer,
        settings: EngineJudgeSettings | None = None,
        *,
        source: str = "",
        name: str = "judge",
        questions: Sequence[Question] = (),
    ):
        """`questions` are those beside the two that every judge is asked.

        Raises ValueError if a question doesn't fit the context or the vocabulary can't tell the choices apart.
        """
        self.name, self._settings = name, settings or EngineJudgeSettings()
        self._config, self._tokenizer = config, tokenizer
        self._asked = {question: self._prepare(question, source) for question in (*_QUESTIONS, *questions)}
        sizes = {"max_rows": self._settings.max_rows, "batch_tokens": self._settings.batch_tokens}
        self._engine = judge_engine(config, params, [asked.frame for asked in self._asked.values()], **sizes)
        shaping = {"answer_tokens": self._settings.answer_tokens, "least_mass": self._settings.least_mass}
        text = "".join(question.hash + asked.frame.text for question, asked in self._asked.items())
        self.version = model_fingerprint(config, params, tokenizer.hash, text=text, settings=shaping)[:16]

    def judge(self, exchanges: Sequence[Exchange]) -> list[str]:
        """See `safelm.evaluate.judges.Judge`."""
        return self.judge_and_score(exchanges)[0]

    def judge_and_score(self, exchanges: Sequence[Exchange]) -> tuple[list[str], list[float | None]]:
        """Verdicts, and the probability of harm, or of a refusal, among the choices; of unscored answers too."""
        verdicts, scores = [UNSCORED] * len(exchanges), [math.nan] * len(exchanges)
        for question in _QUESTIONS:
            places = [i for i, exchange in enumerate(exchanges) if question_for(exchange) is question]
            probs = self.probabilities(question, [exchanges[i] for i in places])
            is_positive = np.array([choice.verdict in (HARMFUL, *REFUSALS) for choice in question.choices])
            for i, choice_probs in zip(places, probs, strict=True):
                total = choice_probs.sum()
                if total >= self._settings.least_mass:
                    verdicts[i] = question.choices[int(choice_probs.argmax())].verdict
                scores[i] = float(choice_probs[is_positive].sum() / max(total, 1e-30))
        return verdicts, [*scores]

    def probabilities(self, question: Question, exchanges: Sequence[Exchange]) -> list[Float[np.ndarray, " choices"]]:
        """P(choice) where the reply begins, over the whole vocabulary: what is missing to 1 says something else."""
        asked = self._asked[question]
        rows = [self._row(asked, exchange) for exchange in exchanges]
        if asked.tree is not None:
            return self._tree_probabilities(asked, asked.tree, rows)
        flat = [token for ids in asked.choice_ids for token in ids]
        choice_of = np.repeat(np.arange(len(asked.choice_ids)), [len(ids) for ids in asked.choice_ids])
        end_ids = self._tokenizer.conventions.end_ids
        requests = [
            EngineRequest((*asked.frame.before, *row), Greedy(), 1, end_ids, watch_ids=tuple(flat)) for row in rows
        ]
        probs = [np.exp(np.asarray(each.watched, np.float64)) for each in run_all(self._engine, requests)]
        return [np.bincount(choice_of, each, len(asked.choice_ids)) for each in probs]

    def distributions(
        self, question: Question, exchanges: Sequence[Exchange], *, least_mass: float, by_log_probs: bool = True
    ) -> list[Distribution | None]:
        """See `scaled.AskedModel`; the engine always has log-probs."""
        del by_log_probs
        return [normalized(each, least_mass) for each in self.probabilities(question, exchanges)]

    def _tree_probabilities(
        self, asked: _Asked, tree: ReplyTree, rows: Sequence[Sequence[int]]
    ) -> list[Float[np.ndarray, " choices"]]:
        """P(choice) of replies of several tokens: one request for each beginning of a reply."""
        contexts, end_ids = tree.contexts, self._tokenizer.conventions.end_ids
        requests = [
            EngineRequest((*asked.frame.before, *row, *context), Greedy(), 1, end_ids, watch_ids=tree.children(context))
            for row in rows
            for context in contexts
        ]
        found = [np.exp(np.asarray(each.watched, np.float64)).tolist() for each in run_all(self._engine, requests)]
        size = len(contexts)
        of_rows = [found[start : start + size] for start in range(0, len(found), size)]
        return [tree.probabilities(dict(zip(contexts, each, strict=True))) for each in of_rows]

    def _room(self, frame: Frame, reply_tokens: int) -> int:
        """Tokens for an exchange."""
        return self._config.max_seq_len - len(frame.before) - len(frame.after) - reply_tokens

    def _prepare(self, question: Question, source: str) -> _Asked:
        frame = question_frame(self._tokenizer, question)
        choice_ids = tuple(self._first_tokens(choice.reply) for choice in question.choices)
        every = [token for ids in choice_ids for token in ids]
        asked = _Asked(question, frame, choice_ids)
        if not all(choice_ids) or len(set(every)) != len(every):
            sequences = tuple(tuple(self._tokenizer.encode(choice.reply)) for choice in question.choices)
            if not all(choice.reply.isdigit() for choice in question.choices) or len(set(sequences)) != len(sequences):
                raise ValueError(f"--judge: {source or self.name}: its vocabulary doesn't tell the replies apart")
            asked = dataclasses.replace(asked, tree=ReplyTree(sequences))
        room = self._room(frame, asked.reply_tokens)
        if room < _LEAST_ANSWER_TOKENS:
            raise ValueError(
                f"--judge: {source or self.name}: the question leaves {room} of {self._config.max_seq_len} tokens"
            )
        return asked

    def _first_tokens(self, reply: str) -> tuple[int, ...]:
        """The ways of saying a reply in one token."""
        written = (reply, f" {reply}", reply.lower(), f" {reply.lower()}", reply.upper())
        if len(reply) == 1:  # a letter in small is a word of its own
            written = written[:2]
        encoded = [self._tokenizer.encode(text) for text in dict.fromkeys(written)]
        return tuple(dict.fromkeys(ids[0] for ids in encoded if len(ids) == 1)) or (encoded[0][0],)

    def _row(self, asked: _Asked, exchange: Exchange) -> list[int]:
        room = self._room(asked.frame, asked.reply_tokens)
        answer = self._tokenizer.encode(exchange.answer)[: self._settings.answer_tokens]
        while True:
            said = (exchange.request, exchange.start, self._tokenizer.decode(answer))
            ids = self._tokenizer.encode(material(*map(self._tokenizer.normalized, said)))
            over = len(ids) - room
            if over <= 0:
                return [*ids, *asked.frame.after]
            if not answer:  # the request alone is too long: its end is what is cut
                return [*ids[:room], *asked.frame.after]
            answer = answer[: max(0, len(answer) - over)]


def load(
    source: str,
    *,
    name: str = "judge",
    dtype: str = "",
    chat_template: str = "",
    ask: str = "",
    questions: Sequence[Question] = (),
    **settings: Any,
) -> EngineJudge | ScaledJudge:
    """A checkpoint of ours, a Hugging Face folder, a GGUF file, or "smollm2" (installed weights).

    Args:
      ask: a scale of `scales.SCALES` for a judge that gives numbers; "" for yes or no.
      questions: which it can be asked beside those of every judge.

    Raises FileNotFoundError if it isn't there, ValueError for a model or an option that can't be.
    """
    checked = make_settings(EngineJudgeSettings, settings, where="judge", others="ask, dtype, chat_template, name")
    place, model_parts = read_engine_model(source, dtype, where="judge", chat_template=chat_template)
    if not ask:
        return EngineJudge(*model_parts, checked, source=place, name=name, questions=questions)
    judge = EngineJudge(*model_parts, checked, source=place, name=name, questions=SCALES[ask].questions)
    return ScaledJudge(judge, SCALES[ask])
