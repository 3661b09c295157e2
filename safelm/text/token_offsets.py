"""Which characters of a text each of its tokens is of, by the offsets of the `tokenizers` library."""

import functools
import json
from collections.abc import Sequence

import numpy as np
import tokenizers
from jaxtyping import Int32

from safelm.text import tokenizer_backend
from safelm.text.tokenizer import Tokenizer


def encode_with_offsets(
    tokenizer: Tokenizer, texts: Sequence[str]
) -> list[tuple[Int32[np.ndarray, " tokens"], Int32[np.ndarray, "tokens 2"]]]:
    """`Tokenizer.encode_batch`, and each token's first character and the one behind its last.

    Tokens that share the bytes of a character all have it. With a normalizer, such as NFC, offsets are of the text as
    it was before. Texts are Unicode, without lone surrogates.
    """
    with tokenizer_backend.as_value_errors(tokenizer.origin, tokenizer_backend.UNCUT):
        encodings = _encoder(tokenizer).encode_batch(list(texts), add_special_tokens=False)
    return [(np.asarray(each.ids, np.int32), np.asarray(each.offsets, np.int32).reshape(-1, 2)) for each in encodings]


@functools.lru_cache(maxsize=4)
def _encoder(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """The literal encoder without a post-processor, which may trim whitespace from offsets."""
    spec = tokenizer.to_json()
    backend = tokenizers.Tokenizer.from_str(spec)
    literal = tokenizer_backend.literal(backend, json.loads(spec), tokenizer.conventions.control_tokens)
    encoder = tokenizers.Tokenizer.from_str(json.dumps(json.loads(literal.to_str()) | {"post_processor": None}))
    encoder.encode_special_tokens = True
    return encoder
