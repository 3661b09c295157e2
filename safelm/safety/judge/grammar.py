"""Which tokens may come next in a judge's answer: llguidance's masks, for any byte-level vocabulary of ours."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32

from safelm.safety.judge.answer import CLOSING, GRAMMAR, OPENING, SCORES, Answer, read_answer
from safelm.text.tokenizer import Tokenizer

WORD_BITS = 32


class AnswerGrammar:
    """The answer's grammar over one vocabulary.

    Attributes:
      opening: the ids with which every answer starts, up to where the score is the next token.
      score_ids: the token that says 0, 1, .. 5 after the opening.
      after_score: the ids that can only follow a score, up to the first token with a choice.
      num_words: of a mask, 32 ids each.
    """

    def __init__(self, tokenizer: Tokenizer, *, vocab_size: int, end_ids: Sequence[int]):
        """`vocab_size` is the number of logits, ids that only pad the vocabulary included.

        Raises:
          ImportError: llguidance isn't installed.
          ValueError: the vocabulary can't write an answer.
        """
        import llguidance

        self._tokenizer = tokenizer
        self._llguidance = llguidance
        self._vocabulary = llguidance.LLTokenizer(tokenizer.to_json(), n_vocab=vocab_size, eos_token=list(end_ids))
        self._grammar = llguidance.LLMatcher.grammar_from_regex(GRAMMAR)
        self.num_words = -(-vocab_size // WORD_BITS)
        self.opening, self.score_ids = _score_tokens(tokenizer)
        forced = [self._start(token).compute_ff_tokens() for token in self.score_ids]
        self.after_score = tuple(forced[0]) if all(ids == forced[0] for ids in forced) else ()

    @functools.cached_property
    def _executor(self) -> Any:
        return self._llguidance.LLExecutor()

    def _start(self, score_id: int) -> Any:
        matcher = self._llguidance.LLMatcher(self._vocabulary, self._grammar, log_level=0)
        if not matcher.consume_tokens([*self.opening, score_id]):
            raise ValueError(f"this vocabulary can't write a judge's answer: {matcher.get_error()}")
        return matcher

    def replies(self, score_ids: Sequence[int]) -> "Replies":
        """A batch of answers whose scores have been chosen."""
        return Replies(self, [self._start(token) for token in score_ids], self._tokenizer)

    def fill(self, matchers: Sequence[tuple[Any, int]], mask_BW: Int32[np.ndarray, "B W"]) -> None:
        """Writes the masks of matchers into the rows they are paired with."""
        from llguidance.numpy import fill_next_token_bitmask_par

        fill_next_token_bitmask_par(self._executor, list(matchers), mask_BW)


class Replies:
    """Answers under way, each with a state of its own."""

    def __init__(self, grammar: AnswerGrammar, matchers: list[Any], tokenizer: Tokenizer):
        self._grammar, self._matchers, self._tokenizer = grammar, matchers, tokenizer
        self._ids: list[list[int]] = [[] for _ in matchers]  # behind the score

    @property
    def are_over(self) -> bool:
        """Whether no answer can go on."""
        return all(matcher.is_stopped() for matcher in self._matchers)

    def masks(self, height: int) -> Int32[np.ndarray, "B W"]:
        """One bit an id for what may come next; all ids for answers that are over and rows past the last one."""
        mask_BW = np.full((height, self._grammar.num_words), -1, np.int32)
        self._grammar.fill([(m, row) for row, m in enumerate(self._matchers) if not m.is_stopped()], mask_BW)
        return mask_BW

    def consume(self, tokens_B: Sequence[int]) -> None:
        """Goes on with a token a row; rows that are over take none."""
        for row, matcher in enumerate(self._matchers):
            if matcher.is_stopped():
                continue
            if not matcher.consume_token(int(tokens_B[row])):
                raise RuntimeError(f"answer {row} took a token outside of its mask: {matcher.get_error()}")
            self._ids[row].append(int(tokens_B[row]))

    def answers(self, scores: Sequence[int]) -> list[Answer]:
        """The answers; one that ran out of tokens ends where it stands."""
        return [self._close(score, ids) for score, ids in zip(scores, self._ids, strict=True)]

    def _close(self, score: int, ids: list[int]) -> Answer:
        text = f"{OPENING}{score}" + self._tokenizer.decode(ids).rstrip("\ufffd")  # half a character
        for ending in ("", CLOSING[1:], CLOSING, ' "' + CLOSING, ', "reason": "' + CLOSING):
            if (answer := read_answer(text + ending)) is not None:
                return answer
        return Answer(score)


def _score_tokens(tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What the six openings `{"score": 0` .. 5 share, and the token by which each differs."""
    spelled = [tokenizer.encode(f"{OPENING}{score}") for score in SCORES]
    shared = 0
    while len({ids[shared] for ids in spelled if shared < len(ids)}) == 1:
        shared += 1
    if any(len(ids) != shared + 1 for ids in spelled) or len({ids[-1] for ids in spelled}) != len(SCORES):
        raise ValueError("this vocabulary doesn't write the six scores as six different tokens")
    return tuple(spelled[0][:shared]), tuple(ids[-1] for ids in spelled)
