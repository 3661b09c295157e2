"""Token masks from regular expressions and JSON schemas, by llguidance.

vocabulary = GrammarVocabulary(tokenizer, vocab_size=config.padded_vocab_size, end_ids=end_ids)
grammar = vocabulary.json_schema({"type": "object", ...})
engine.submit(EngineRequest(prompt, Greedy(), 100, end_ids, mask=grammar.start))
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32

from safelm.inference.token_mask import WORD_BITS
from safelm.text.tokenizer import Tokenizer


class GrammarVocabulary:
    """A tokenizer in llguidance's form, built once per model."""

    def __init__(self, tokenizer: Tokenizer, *, vocab_size: int, end_ids: Sequence[int]):
        """`vocab_size` is the number of logits, ids that only pad the vocabulary included.

        Raises ImportError if llguidance isn't installed.
        """
        import llguidance

        self.llguidance = llguidance
        self.num_words = -(-vocab_size // WORD_BITS)
        self.tokens = llguidance.LLTokenizer(tokenizer.to_json(), n_vocab=vocab_size, eos_token=list(end_ids))

    def regex(self, pattern: str) -> "Grammar":
        """The texts that a regular expression matches as a whole; raises ValueError if it isn't supported."""
        return Grammar(self, self.llguidance.LLMatcher.grammar_from_regex(pattern))

    def json_schema(self, schema: Mapping[str, Any]) -> "Grammar":
        """The JSON texts of a schema; raises ValueError if it isn't supported."""
        return Grammar(self, self.llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema)))


class Grammar:
    """A grammar over one vocabulary."""

    def __init__(self, vocabulary: GrammarVocabulary, grammar: str):
        """Raises ValueError for an invalid grammar."""
        self._vocabulary, self._grammar = vocabulary, grammar
        problem = vocabulary.llguidance.LLMatcher.validate_grammar(grammar, vocabulary.tokens)
        if problem:
            raise ValueError(f"grammar: {problem.splitlines()[0]}")

    def start(self, said: Sequence[int] = ()) -> "GrammarMask":
        """A new text's mask; `said` are its first ids, given in the prompt. Raises ValueError if no text begins so."""
        vocabulary = self._vocabulary
        matcher = vocabulary.llguidance.LLMatcher(vocabulary.tokens, self._grammar, log_level=0)
        mask = GrammarMask(matcher, vocabulary.num_words)
        if said:
            mask.consume(said)
        return mask


class GrammarMask:
    """A `TokenMask` around a matcher of llguidance."""

    def __init__(self, matcher: Any, words: int):
        self._matcher, self._num_words = matcher, words

    @property
    def is_over(self) -> bool:
        """Whether the text is complete and nothing can follow."""
        return self._matcher.is_stopped()

    def consume(self, tokens: Sequence[int]) -> None:
        """See `TokenMask`."""
        if not self._matcher.consume_tokens(list(tokens)):
            raise ValueError(f"grammar: {(self._matcher.get_error() or 'a token outside of it').splitlines()[0]}")

    def forced(self) -> Sequence[int]:
        """See `TokenMask`."""
        return () if self.is_over else self._matcher.compute_ff_tokens()

    def allowed(self) -> Int32[np.ndarray, " X"]:
        """See `TokenMask`."""
        from llguidance.numpy import fill_next_token_bitmask

        mask_1X = np.zeros((1, self._num_words), np.int32)
        fill_next_token_bitmask(self._matcher, mask_1X)
        return mask_1X[0]
