"""The judge's answer as a grammar over a vocabulary of ours: the score first, then a reason."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32

from safelm.inference import token_mask
from safelm.inference.grammar import GrammarVocabulary
from safelm.safety.judge.answer import CLOSING, GRAMMAR, OPENING, SCORES, Answer, read_answer
from safelm.text.tokenizer import Tokenizer


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
        self._tokenizer = tokenizer
        vocabulary = GrammarVocabulary(tokenizer, vocab_size=vocab_size, end_ids=end_ids)
        self.num_words = vocabulary.num_words
        self._grammar = vocabulary.regex(GRAMMAR)
        self.opening, self.score_ids = _score_tokens(tokenizer)
        try:
            forced = [tuple(self._grammar.start([*self.opening, token]).forced()) for token in self.score_ids]
        except ValueError as error:
            raise ValueError(f"this vocabulary can't write a judge's answer: {error}") from error
        self.after_score = forced[0] if len(set(forced)) == 1 else ()

    def start(self) -> "AnswerMask":
        """The mask of a new answer, whose opening stands in the prompt."""
        return AnswerMask(self)

    def answer(self, score: int, ids: Sequence[int]) -> Answer:
        """The answer that says a score and goes on with `ids`; one that ran out of tokens ends where it stands."""
        text = f"{OPENING}{score}" + self._tokenizer.decode(ids).rstrip("\ufffd")  # half a character
        for ending in ("", CLOSING[1:], CLOSING, ' "' + CLOSING, ', "reason": "' + CLOSING):
            if (answer := read_answer(text + ending)) is not None:
                return answer
        return Answer(score)


class AnswerMask:
    """A `TokenMask` of one answer: one of the six score tokens, then what the grammar allows."""

    def __init__(self, grammar: AnswerGrammar):
        self._answer, self._has_score = grammar, False
        self._mask = grammar._grammar.start(grammar.opening)

    def consume(self, tokens: Sequence[int]) -> None:
        """See `TokenMask`."""
        self._has_score |= bool(tokens)
        self._mask.consume(tokens)

    def forced(self) -> Sequence[int]:
        """See `TokenMask`."""
        return self._mask.forced() if self._has_score else ()

    def allowed(self) -> Int32[np.ndarray, " X"]:
        """See `TokenMask`."""
        if not self._has_score:
            return token_mask.only(self._answer.score_ids, self._answer.num_words)
        return self._mask.allowed()


def _score_tokens(tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What the six openings `{"score": 0` .. 5 share, and the token by which each differs."""
    spelled = [tokenizer.encode(f"{OPENING}{score}") for score in SCORES]
    shared = 0
    while len({ids[shared] for ids in spelled if shared < len(ids)}) == 1:
        shared += 1
    if any(len(ids) != shared + 1 for ids in spelled) or len({ids[-1] for ids in spelled}) != len(SCORES):
        raise ValueError("this vocabulary doesn't write the six scores as six different tokens")
    return tuple(spelled[0][:shared]), tuple(ids[-1] for ids in spelled)
