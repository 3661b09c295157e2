"""The tokens of texts with their characters, and the stream of a decoder or encoder at each of them.

A text is cut into windows that fit the model; they don't overlap, so the first tokens of a later window see less before
them than they have.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Int32

from safelm.inference.prompts import batches
from safelm.models import decoder
from safelm.safety.embedding import Backbone, encoder
from safelm.safety.embedding.encoder_config import EncoderConfig
from safelm.text.token_offsets import encode_with_offsets
from safelm.text.tokenizer import Tokenizer

_ROWS = 32


@dataclasses.dataclass(frozen=True)
class Window:
    """Some of a text's tokens.

    Attributes:
      text: the text's place among those given.
      first: the number of its first token in the text.
      ids_N: the ids to read, special ones included.
      before: how many ids stand before the text's own.
      offsets_n2: of each own token the first character and the one behind the last.
    """

    text: int
    first: int
    ids_N: Int32[np.ndarray, " N"]
    before: int
    offsets_n2: Int32[np.ndarray, "n 2"]


def is_encoder(backbone: Backbone) -> bool:
    """Whether the model reads in both directions."""
    return isinstance(backbone.config, EncoderConfig)


def vocab_hash(backbone: Backbone) -> str:
    """Of the vocabulary that tokens are counted with."""
    own = backbone.tokenizer.backend
    return own.hash if isinstance(own, Tokenizer) else backbone.tokenizer.hash


def tag_id(backbone: Backbone) -> int | None:
    """The harm tag's id in a vocabulary of ours; None in an encoder's."""
    own = backbone.tokenizer.backend
    return own.harm_tag_id if isinstance(own, Tokenizer) else None


def windows(backbone: Backbone, texts: Sequence[str]) -> list[Window]:
    """The windows of all texts, in order; a text without tokens has none."""
    chunks = backbone.tokenizer
    room = backbone.max_tokens - len(chunks.before) - len(chunks.after)
    if room < 1:
        raise ValueError(f"max_tokens={backbone.max_tokens}: special tokens alone take as many")
    before, after = np.array(chunks.before, np.int32), np.array(chunks.after, np.int32)
    found = []
    for number, (ids_N, offsets_N2) in enumerate(_encode(chunks.backend, texts)):
        for first in range(0, len(ids_N), room):
            ids = np.concatenate([before, ids_N[first : first + room], after])
            found.append(Window(number, first, ids, len(before), offsets_N2[first : first + room]))
    return found


def _encode(backend: Any, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
    if isinstance(backend, Tokenizer):
        return encode_with_offsets(backend, texts)
    encodings = backend.encode_batch(list(texts), add_special_tokens=False)
    return [(np.asarray(each.ids, np.int32), np.asarray(each.offsets, np.int32).reshape(-1, 2)) for each in encodings]


def states(
    backbone: Backbone, found: Sequence[Window], layers: tuple[int, ...]
) -> Iterator[tuple[int, Float32[np.ndarray, "L n D"]]]:
    """(place of the window, the stream after these many blocks at its own tokens), of windows of one length together.

    Raises ValueError for a layer that the model doesn't have.
    """
    for layer in layers:
        if not 0 <= layer <= backbone.config.num_layers:
            raise ValueError(f"layer={layer}: {backbone.name} has layers 0 to {backbone.config.num_layers}")
    for batch in batches([window.ids_N.tolist() for window in found], max_rows=_ROWS, max_len=backbone.max_tokens):
        states_LBTD = np.asarray(
            _states(backbone.config, layers, backbone.params, batch.tokens_PT, batch.lengths_P), np.float32
        )
        for row, place in enumerate(batch.indices):
            start = found[place].before
            yield place, states_LBTD[:, row, start : start + len(found[place].offsets_n2)]


@functools.partial(jax.jit, static_argnames=("config", "layers"))
def _states(
    config: Any, layers: tuple[int, ...], params: Any, tokens_BT: Int[Array, "B T"], lengths_B: Int[Array, " B"]
) -> Float[Array, "L B T D"]:
    if isinstance(config, EncoderConfig):
        of_layers = encoder.hidden_states(config, params, tokens_BT, lengths_B)
        return jnp.stack([of_layers[layer] for layer in layers])
    return jnp.stack(decoder.layer_states(config, params, tokens_BT, layers))
