"""A language model on our own engine as the judge of harm (Maini et al. 2025, section 3.1)."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from safelm import inference
from safelm.inference.forward import Cache
from safelm.inference.prompts import PromptBatch, batches
from safelm.inference.weights import prepare
from safelm.models import decoder as model
from safelm.safety.engine_models import read_engine_model
from safelm.safety.escaping import escape
from safelm.safety.judge import chunks, decoding
from safelm.safety.judge.answer import SCORES, Answer, read_answer
from safelm.safety.judge.grammar import AnswerGrammar
from safelm.safety.judge.rubric import load_rubric
from safelm.safety.model_fingerprint import model_fingerprint
from safelm.safety.options import check_least, make_settings
from safelm.safety.scorer import Verdict
from safelm.text.prompting import question_frame
from safelm.text.tokenizer import Tokenizer

SMALLEST_CHUNK = 16  # tokens
_SPEED_ONLY = ("batch_tokens", "max_rows")  # settings that no score depends on


@dataclasses.dataclass(frozen=True)
class JudgeSettings:
    """How a judge reads and answers.

    Attributes:
      reason_tokens: at most so many for the reason; 0 asks for the score only: one forward a chunk.
      chunk_tokens: a longer document is cut into chunks of so many (fewer where the context is smaller) and the
        highest score is taken.
      max_chunks: of longer documents so many chunks are read, evenly spread; 0 reads all.
      batch_tokens: documents are read in batches of about so many tokens, padding included.
      max_rows: of a batch.
      constrained: False lets the model answer freely, to measure how often it breaks JSON; such answers are unusable.
      free_tokens: of a free answer.
      rubric: version.
    """

    reason_tokens: int = 40
    chunk_tokens: int = 2048
    max_chunks: int = 0
    batch_tokens: int = 4096
    max_rows: int = 64
    constrained: bool = True
    free_tokens: int = 96
    rubric: int = 1

    def __post_init__(self) -> None:
        check_least("judge", self, reason_tokens=0, chunk_tokens=SMALLEST_CHUNK, max_chunks=0)
        check_least("judge", self, batch_tokens=1, max_rows=1, free_tokens=1)

    @property
    def answer_tokens(self) -> int:
        return self.reason_tokens if self.constrained else self.free_tokens


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
        self._config = dataclasses.replace(config, attention="xla", remat="none")
        self._weights = prepare(self._config, params)
        self._tokenizer, self._show_progress = tokenizer, show_progress
        self._frame = question_frame(tokenizer, load_rubric(self.settings.rubric))
        self._grammar = AnswerGrammar(
            tokenizer, vocab_size=config.padded_vocab_size, end_ids=tokenizer.conventions.end_ids
        )
        self._behind = (*self._frame.after, *(self._grammar.opening if self.settings.constrained else ()))
        self._chunk_tokens = self._fit_chunks(source)
        self._rubric = decoding.read_rubric(self._config, self._weights, jnp.asarray(self._frame.before, jnp.int32))
        shaping = {k: v for k, v in dataclasses.asdict(self.settings).items() if k not in _SPEED_ONLY}
        self.fingerprint = model_fingerprint(config, params, tokenizer.hash, text=self._frame.text, settings=shaping)

    def score(self, texts: Sequence[str]) -> list[Verdict]:
        """One verdict a text."""
        cut = [self._cut(text) for text in texts]
        rows = [row for text_rows in cut for row in text_rows]
        answered: list[tuple[Answer | None, dict[str, float]]] = [(None, {})] * len(rows)
        with tqdm.tqdm(total=len(rows), unit="chunk", disable=None if self._show_progress else True) as progress:
            for batch in self._batches(rows):
                answer = self._answer if self.settings.constrained else self._answer_freely
                for index, found in zip(batch.indices, answer(batch), strict=True):
                    answered[index] = found
                progress.update(len(batch.indices))
        self.num_answers += len(rows)
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
        """Positions for the answer behind its opening."""
        settings = self.settings
        return settings.answer_tokens + (1 + len(self._grammar.after_score) if settings.constrained else 0)

    def _cut(self, text: str) -> list[list[int]]:
        """The rows of a text: its chunks, each with what comes behind a document."""
        ids = self._tokenizer.encode(escape(self._tokenizer.normalized(text)))
        spans = chunks.spans(len(ids), self._chunk_tokens, self.settings.max_chunks)
        return [[*ids[start:end], *self._behind] for start, end in spans]

    def _batches(self, rows: Sequence[Sequence[int]]) -> Iterator[PromptBatch]:
        settings, widest = self.settings, self._chunk_tokens + len(self._behind)
        return batches(rows, max_rows=settings.max_rows, max_len=widest, max_tokens=settings.batch_tokens)

    def _answer(self, batch: PromptBatch) -> list[tuple[Answer | None, dict[str, float]]]:
        num_rows = len(batch.indices)
        cache, log_probs_B6 = decoding.read_documents(
            self._config,
            self._weights,
            self._rubric,
            batch.tokens_PT,
            batch.lengths_P,
            np.asarray(self._grammar.score_ids, np.int32),
            room=self._room if self.settings.reason_tokens else 0,
        )
        probs_B6 = np.asarray(jax.nn.softmax(log_probs_B6, axis=-1))[:num_rows].astype(np.float64)
        scores = [int(score) for score in np.asarray(log_probs_B6)[:num_rows].argmax(axis=1)]
        answers = [Answer(score) for score in scores]
        if self.settings.reason_tokens:
            answers = self._reason(batch, cache, scores)
        expected_B = probs_B6 @ np.asarray(SCORES)
        return [
            (answer, {"expected_score": float(expected), "probability": float(probs[answer.score])})
            for answer, expected, probs in zip(answers, expected_B, probs_B6, strict=True)
        ]

    def _reason(self, batch: PromptBatch, cache: Cache, scores: list[int]) -> list[Answer]:
        grammar, height = self._grammar, len(batch.lengths_P)
        score_ids = [grammar.score_ids[score] for score in scores]
        replies = grammar.replies(score_ids)
        for token in grammar.after_score:
            replies.consume([token] * len(scores))
        tokens_BT = np.zeros((height, 1 + len(grammar.after_score)), np.int32)
        tokens_BT[: len(scores)] = [(token, *grammar.after_score) for token in score_ids]
        lengths_B = len(self._frame.before) + batch.lengths_P
        for _ in range(self.settings.reason_tokens):
            cache, next_B = decoding.step(
                self._config, self._weights, cache, tokens_BT, lengths_B, replies.masks(height)
            )
            lengths_B = lengths_B + tokens_BT.shape[1]
            tokens_BT = np.asarray(next_B, np.int32)[:, None]
            replies.consume(tokens_BT[:, 0].tolist())
            if replies.are_over:
                break
        return replies.answers(scores)

    def _answer_freely(self, batch: PromptBatch) -> list[tuple[Answer | None, dict[str, float]]]:
        lengths = batch.lengths_P[: len(batch.indices)]
        rows = [row[:length].tolist() for row, length in zip(batch.tokens_PT, lengths, strict=False)]
        generations = inference.generate(
            self._config,
            self._weights,
            [[*self._frame.before, *row] for row in rows],
            inference.Greedy(),
            max_new_tokens=self.settings.free_tokens,
            end_ids=self._tokenizer.conventions.end_ids,
            harm_tag_id=self._tokenizer.harm_tag_id,
            batch_size=self.settings.max_rows,
        )
        return [(read_answer(self._tokenizer.decode(each.text_tokens)), {}) for each in generations]


def load(source: str, *, dtype: str = "", name: str = "judge", show_progress: bool = False, **settings: Any) -> Judge:
    """See `safelm.safety.judge.load_judge`."""
    checked = make_settings(JudgeSettings, settings, where="judge", others="dtype, name, show_progress")
    place, model_parts = read_engine_model(source, dtype, where="judge")
    return Judge(*model_parts, checked, source=place, name=name, show_progress=show_progress)
