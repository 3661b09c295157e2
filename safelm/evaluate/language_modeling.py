"""Measures a model without decoding: perplexity on held-out text, and how well P(tag) separates harmful prompts."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from safelm.inference.tag_probability import LOGITS_AT_ONCE
from safelm.io.progress import Bar
from safelm.models import decoder as model_lib
from safelm.stats.intervals import Estimate, auroc

TagProbability = Callable[[Sequence[Sequence[int]]], Sequence[Float[np.ndarray, " positions"]]]


@runtime_checkable
class Documents(Protocol):
    """Tokenized documents by number, such as a token store."""

    num_documents: int

    def document(self, index: int) -> Int[np.ndarray, " T"]:
        """The tokens of a document."""


def perplexity(
    config: model_lib.ModelConfig,
    params: model_lib.Params,
    store: Documents,
    *,
    begin_ids: Sequence[int] = (),
    max_documents: int = 0,
    batch_size: int = 16,
) -> dict[str, float]:
    """exp(mean negative log-likelihood per token, nats) over the store's documents, each scored separately.

    Every token of a document is predicted once, the first one after `begin_ids`; without `begin_ids` the first token is
    only context, as is one that the document itself begins with. A document longer than the model's context is cut into
    pieces of that length, each preceded by one token. A `batch_size` whose logits would be too large is lowered.

    Raises ValueError if there is nothing to predict.
    """
    count = min(store.num_documents, max_documents or store.num_documents)
    begin = np.asarray(begin_ids[-1:], np.int32)
    documents = [_begun(store.document(index).astype(np.int32), begin) for index in range(count)]
    width = min(config.max_seq_len, max(map(len, documents), default=1) - 1)
    pieces = [piece for document in documents for piece in _cut(document, width)]
    if not pieces:
        raise ValueError("perplexity: the validation store holds no document of two tokens or more")
    batch_size = max(1, min(batch_size, LOGITS_AT_ONCE // (config.padded_vocab_size * width)))
    total_nll, total_tokens = 0.0, 0
    for start in Bar(range(0, len(pieces), batch_size), desc="perplexity", unit=" batches", leave=False, disable=None):
        tokens_BT, lengths_B = _pad(pieces[start : start + batch_size], batch_size, width + 1)
        total_nll += float(_negative_log_likelihood(config, params, tokens_BT, lengths_B))
        total_tokens += int(np.maximum(lengths_B - 1, 0).sum())
    loss = total_nll / total_tokens
    return {"perplexity": math.exp(loss), "loss_nats": loss, "tokens": total_tokens, "documents": count}


def tag_separation(
    tag_probability: TagProbability, harmful: Sequence[Sequence[int]], safe: Sequence[Sequence[int]]
) -> dict[str, Estimate]:
    """AUROC of P(tag), harmful against safe prompts: of the mean over a prompt's positions, and at its last position.

    P(tag) at a position is the probability that the next token is the tag (the lookahead of Maini et al. 2025, section
    4.1).
    """
    harmful_P, safe_P = tag_probability(harmful), tag_probability(safe)
    return {
        "mean": auroc(np.array([p.mean() for p in harmful_P]), np.array([p.mean() for p in safe_P])),
        "last": auroc(np.array([p[-1] for p in harmful_P]), np.array([p[-1] for p in safe_P])),
    }


def _begun(document: Int[np.ndarray, " T"], begin: Int[np.ndarray, " B"]) -> Int[np.ndarray, " n"]:
    """The document behind `begin`, unless it begins with that itself."""
    return document if np.array_equal(document[: len(begin)], begin) else np.concatenate([begin, document])


def _cut(tokens: Int[np.ndarray, " n"], width: int) -> list[Int[np.ndarray, " piece"]]:
    """Pieces of up to `width` predictions; each begins with the last token of the one before."""
    return [tokens[start : start + width + 1] for start in range(0, len(tokens) - 1, width)] if width else []


def _pad(pieces: Sequence[np.ndarray], batch_size: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    tokens_BT, lengths_B = np.zeros((batch_size, width), np.int32), np.zeros(batch_size, np.int32)
    for row, piece in enumerate(pieces):
        tokens_BT[row, : len(piece)], lengths_B[row] = piece, len(piece)
    return tokens_BT, lengths_B


@functools.partial(jax.jit, static_argnums=0)
def _negative_log_likelihood(
    config: model_lib.ModelConfig, params: model_lib.Params, tokens_BT: Int[Array, "B T"], lengths_B: Int[Array, " B"]
) -> Float[Array, ""]:
    logits_BTV = model_lib.apply(config, params, tokens_BT[:, :-1])
    log_probs_BTV = jax.nn.log_softmax(logits_BTV.astype(jnp.float32))
    chosen_BT = jnp.take_along_axis(log_probs_BTV, tokens_BT[:, 1:, None], axis=-1)[..., 0]
    is_real_BT = jnp.arange(1, tokens_BT.shape[1]) < lengths_B[:, None]
    return -jnp.sum(jnp.where(is_real_BT, chosen_BT, 0.0))
