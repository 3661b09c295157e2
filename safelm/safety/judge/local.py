"""A language model on our own engine as the judge of harm (Maini et al. 2025, section 3.1)."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from safelm.inference import EngineRequest, Generation, Greedy, run_all
from safelm.models import decoder as model
from safelm.safety.engine_models import judge_engine, read_engine_model
from safelm.safety.escaping import escape
from safelm.safety.judge import chunks
from safelm.safety.judge.answer import SCORES, Answer, read_answer
from safelm.safety.judge.grammar import AnswerGrammar
from safelm.safety.judge.rubric import VERSION, load_rubric
from safelm.safety.model_fingerprint import model_fingerprint
from safelm.safety.options import check_least, make_settings
from safelm.safety.scorer import Verdict
from safelm.text.prompting import question_frame
from safelm.text.tokenizer import Tokenizer

SMALLEST_CHUNK = 16  # tokens
_NOT_SHAPING = ("batch_tokens", "max_rows", "rubric")  # speed alone; of the rubric its text counts


@dataclasses.dataclass(frozen=True)
class JudgeSettings:
    """How a judge reads and answers.

    Attributes:
      reason_tokens: at most so many for the reason; 0 asks for the score only: one forward a chunk.
      chunk_tokens: a longer document is cut into chunks of so many (fewer where the context is smaller) and the
        highest score is taken.
      max_chunks: of longer documents so many chunks are read, evenly spread; 0 reads all.
      batch_tokens: documents are read in batches of about so many tokens, padding included.
      max_rows: documents answered at once; each takes cache for the rubric, itself and the answer.
      constrained: False lets the model answer freely, to measure how often it breaks JSON; such answers are unusable.
      free_tokens: of a free answer.
      rubric: a version of ours, or the path of a file (see `rubric.load_rubric`).
    """

    reason_tokens: int = 40
    chunk_tokens: int = 2048
    max_chunks: int = 0
    batch_tokens: int = 4096
    max_rows: int = 16
    constrained: bool = True
    free_tokens: int = 96
    rubric: str = str(VERSION)

    def __post_init__(self) -> None:
        check_least("judge", self, reason_tokens=0, chunk_tokens=SMALLEST_CHUNK, max_chunks=0)
        check_least("judge", self, batch_tokens=1, max_rows=1, free_tokens=1)


class Judge:
    """A scorer: a rubric, a document, and an answer that the grammar holds to JSON.

    A text's verdict depends neither on its batch nor on the other texts (up to float rounding). Details of a verdict:
    `chunks` read; and, where the grammar holds, of the chunk that decided `expected_score` (mean over the six scores'
    probabilities) and `probability` (of the score given, among the six).

    Attributes:
      name: prefix of output columns.
      fingerprint: sha256 (hex) over weights, vocabulary, rubric, template and settings.
      num_unusable: answers so far that were no JSON of the kind asked for; only free answers can be.
      num_answers: answers so far, one a chunk.
      manifest_settings: what scores depend on besides the model and the rubric.
    """

    def __init__(
        self,
        config: model.ModelConfig,
        params: model.Params,
        tokenizer: Tokenizer,
        settings: JudgeSettings | None = None,
        *,
        source: str = "",
        name: str = "judge",
        show_progress: bool = False,
    ):
        """Takes a model of ours; `source` names it in errors.

        Raises ValueError if the rubric doesn't fit the context, or the vocabulary can't write an answer.
        """
        self.name, self.settings = name, settings or JudgeSettings()
        self.num_answers = self.num_unusable = 0
        self._config = config
        self._tokenizer, self._show_progress = tokenizer, show_progress
        self._frame = question_frame(tokenizer, load_rubric(self.settings.rubric))
        self._grammar = AnswerGrammar(
            tokenizer, vocab_size=config.padded_vocab_size, end_ids=tokenizer.conventions.end_ids
        )
        self._behind = (*self._frame.after, *(self._grammar.opening if self.settings.constrained else ()))
        self._chunk_tokens = self._fit_chunks(source)
        self._engine = judge_engine(
            config,
            params,
            [self._frame],
            max_rows=self.settings.max_rows,
            batch_tokens=self.settings.batch_tokens,
            harm_tag_id=None if self.settings.constrained else tokenizer.harm_tag_id,  # an answer in JSON has no tag
        )
        shaping = {k: v for k, v in dataclasses.asdict(self.settings).items() if k not in _NOT_SHAPING}
        self.fingerprint = model_fingerprint(config, params, tokenizer.hash, text=self._frame.text, settings=shaping)
        self.manifest_settings = shaping

    def score(self, texts: Sequence[str]) -> list[Verdict]:
        """One verdict a text."""
        cut = [self._cut(text) for text in texts]
        answered = self._answer([row for text_rows in cut for row in text_rows])
        self.num_answers += len(answered)
        self.num_unusable += sum(answer is None for answer, _ in answered)
        verdicts, start = [], 0
        for text_rows in cut:
            verdicts.append(chunks.combine(answered[start : start + len(text_rows)]))
            start += len(text_rows)
        return verdicts

    def _fit_chunks(self, source: str) -> int:
        around = len(self._frame.before) + len(self._behind) + self._room
        fitting = self._config.max_seq_len - around
        if fitting < SMALLEST_CHUNK:
            raise ValueError(
                f"{source or 'judge'}: the rubric, its template and the answer take {around} tokens, which leaves none "
                f"for a document in the model's context of {self._config.max_seq_len}"
            )
        return min(self.settings.chunk_tokens, fitting)

    @property
    def _room(self) -> int:
        """Tokens for the answer behind its opening."""
        settings = self.settings
        if not settings.constrained:
            return settings.free_tokens
        return 1 + len(self._grammar.after_score) + settings.reason_tokens if settings.reason_tokens else 1

    def _cut(self, text: str) -> list[list[int]]:
        """The rows of a text: its chunks, each with what comes behind a document."""
        ids = self._tokenizer.encode(escape(self._tokenizer.normalized(text)))
        spans = chunks.spans(len(ids), self._chunk_tokens, self.settings.max_chunks)
        return [[*ids[start:end], *self._behind] for start, end in spans]

    def _answer(self, rows: Sequence[Sequence[int]]) -> list[tuple[Answer | None, dict[str, float]]]:
        """The model's answer to every row, and what else is known of it."""
        is_held = self.settings.constrained
        requests = [
            EngineRequest(
                prompt=(*self._frame.before, *row),
                method=Greedy(),
                max_new_tokens=self._room,
                end_ids=self._tokenizer.conventions.end_ids,
                mask=self._grammar.start if is_held else None,
                watch_ids=self._grammar.score_ids if is_held else (),
            )
            for row in rows
        ]
        found = run_all(self._engine, requests, show_progress=self._show_progress, unit="chunk")
        if not is_held:
            return [(read_answer(self._tokenizer.decode(each.text_tokens)), {}) for each in found]
        return [self._held_answer(each) for each in found]

    def _held_answer(self, found: Generation) -> tuple[Answer, dict[str, float]]:
        log_probs_6 = np.asarray(found.watched, np.float64)
        probs_6 = np.exp(log_probs_6 - log_probs_6.max())
        probs_6 /= probs_6.sum()
        score = self._grammar.score_ids.index(found.tokens[0])
        details = {"expected_score": float(probs_6 @ np.asarray(SCORES)), "probability": float(probs_6[score])}
        has_reason = self.settings.reason_tokens > 0
        return self._grammar.answer(score, found.text_tokens[1:]) if has_reason else Answer(score), details


def load(
    source: str,
    *,
    dtype: str = "",
    chat_template: str = "",
    name: str = "judge",
    show_progress: bool = False,
    **settings: Any,
) -> Judge:
    """See `safelm.safety.judge.load_judge`."""
    checked = make_settings(JudgeSettings, settings, where="judge", others="dtype, chat_template, name, show_progress")
    place, model_parts = read_engine_model(source, dtype, where="judge", chat_template=chat_template)
    return Judge(*model_parts, checked, source=place, name=name, show_progress=show_progress)
