"""The SafeLM tokenizer as a SeqIO vocabulary.

A trap to know: SeqIO takes id 0 for padding everywhere, and SmolLM2's end of document is id 0. SeqIO's feature
converters (`LMFeatureConverter(pack=True)`) drop or unweight such ids whatever `pad_id` says. So the tasks append the
end of document themselves (features have `add_eos=False`, no SeqIO step adds a second one), no example is ever padded,
and packing and loss weights are made from token stores by `safelm.data`, not by SeqIO's converters.
"""

import functools
from collections.abc import Iterable, Sequence

import numpy as np
import seqio
import tensorflow as tf

from safelm.text.tokenizer import Tokenizer


class SafeLMVocabulary(seqio.Vocabulary):
    """Encodes and decodes as `safelm.text.tokenizer.Tokenizer` does; the tokenizer is loaded when first needed.

    Encoding is literal: a text that spells the harm tag or the end of a document doesn't turn into it.
    """

    def __init__(self, tokenizer: str | Tokenizer):
        """`tokenizer` is a loaded one, or the path to load (folder, tokenizer.json or GGUF file)."""
        super().__init__()
        self._origin = tokenizer

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer itself; its errors for a bad path come from here."""
        return self._origin if isinstance(self._origin, Tokenizer) else Tokenizer.from_pretrained(self._origin)

    @property
    def bos_id(self) -> None:
        """None, since documents have no beginning token."""
        return None

    @property
    def eos_id(self) -> int:
        """The end of a document."""
        return self.tokenizer.eos_id

    @property
    def unk_id(self) -> None:
        """None, since bytes without a token vanish (`Tokenizer.count_lost_bytes`)."""
        return None

    @property
    def _base_vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    def _encode(self, s: str) -> Sequence[int]:
        return self.tokenizer.encode(s)

    def _decode(self, ids: Iterable[int]) -> str:
        return self.tokenizer.decode([int(i) for i in ids])

    def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
        def encode(text):
            return np.array(self.tokenizer.encode(np.asarray(text).item().decode()), np.int32)

        return tf.ensure_shape(tf.numpy_function(encode, [s], tf.int32, stateful=False), [None])

    def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
        """The string of one sequence [T], or the strings [B] of a batch [B, T]."""

        def decode(rows):
            texts = [self.tokenizer.decode(row).encode() for row in rows.reshape(-1, rows.shape[-1]).tolist()]
            return np.array(texts, object)

        texts = tf.numpy_function(decode, [ids], tf.string, stateful=False)
        return tf.reshape(texts, tf.shape(ids)[:-1])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SafeLMVocabulary):
            return False
        same_path = isinstance(self._origin, str) and self._origin == other._origin
        return same_path or self.tokenizer.hash == other.tokenizer.hash

    def __hash__(self) -> int:
        return hash(SafeLMVocabulary)

    def __str__(self) -> str:
        return f"SafeLMVocabulary({self._origin if isinstance(self._origin, str) else self._origin.hash})"
