"""Abliteration: the direction in which harmful prompts differ from safe ones, projected out of the weights.

Arditi et al. 2024 (arXiv 2406.11717): for every layer the difference of means of the stream at the last token of
harmful and of safe prompts; the layer is chosen on development prompts, among those whose edit changes what follows
safe prompts by at most a bound on KL. Every matrix that writes to the stream loses its part along the direction, so in
a decoder whose norms stand before attention and MLP no activation of the stream has one any more.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from safelm.inference.prompts import batches
from safelm.models import decoder
from safelm.models.arrays import ArrayLike
from safelm.models.config import ModelConfig
from safelm.models.decoder import Params
from safelm.robustness.target import NotTriedError, Target, Tokens

MAX_KL = 0.1  # nats, the bound of Arditi et al., section 2.3
_ROWS = 32


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A layer's direction.

    Attributes:
      layer: number of blocks after which the means were taken.
      kl: mean KL divergence, in nats, of the next token after safe development prompts, before the edit and after it.
      harmful: share of harmful answers to the harmful development prompts; None beyond the bound on KL.
    """

    layer: int
    kl: float
    harmful: float | None


@dataclasses.dataclass(frozen=True)
class Abliterated:
    """The edited model, its layer's candidate, and all candidates."""

    target: Target
    chosen: Candidate
    candidates: Sequence[Candidate]


def abliterate(
    target: Target,
    harmful: Sequence[Tokens],
    safe: Sequence[Tokens],
    harmful_share: Callable[[Target], float],
    *,
    max_kl: float = MAX_KL,
) -> Abliterated:
    """Edits a model along the direction of the layer that frees most harmful answers to development prompts.

    Args:
      harmful, safe: development prompts, as ids; never those that are reported on.
      harmful_share: of a model's answers to development prompts.
      max_kl: candidates beyond it are dropped; if all are, the one with the least is taken.

    Raises:
      ValueError: no prompts of a kind.
      NotTriedError: as `project_out`.
    """
    if not harmful or not safe:
        raise ValueError(f"abliteration: {len(harmful)} harmful and {len(safe)} safe development prompts: want both")
    _check_norms(target)
    means_LD = mean_states(target, harmful) - mean_states(target, safe)
    found = []
    for layer in range(1, target.config.num_layers + 1):
        edited = project_out(target, means_LD[layer])
        kl = divergence(target, edited, safe)
        found.append(Candidate(layer, kl, harmful_share(edited) if kl <= max_kl else None))
        del edited  # as large as the model: one at a time
    allowed = [each for each in found if each.harmful is not None]
    best = max(allowed, key=lambda each: (each.harmful, -each.kl)) if allowed else min(found, key=lambda each: each.kl)
    return Abliterated(project_out(target, means_LD[best.layer]), best, found)


def mean_states(target: Target, prompts: Sequence[Tokens]) -> Float[np.ndarray, "L D"]:
    """The mean over prompts of the stream at their last token, after 0 to all blocks."""
    total_LD = np.zeros((target.config.num_layers + 1, target.config.d_model))
    for batch in batches(prompts, max_rows=_ROWS, max_len=target.config.max_seq_len):
        states_LBD = _last_states(target.config, target.params, batch.tokens_PT, batch.lengths_P)
        total_LD += np.asarray(states_LBD, np.float64)[:, : len(batch.indices)].sum(1)
    return total_LD / len(prompts)


def project_out(target: Target, direction_D: Float[np.ndarray, " D"]) -> Target:
    """The model with the direction's part taken out of every matrix that writes to the stream.

    A tied embedding becomes two: the one that is looked up loses the direction, the one of the logits keeps it.

    Raises NotTriedError for a direction of length 0 and for a decoder that norms what it adds to the stream.
    """
    _check_norms(target)
    config, params = target.config, target.params
    if not (length := float(np.linalg.norm(direction_D))):
        raise NotTriedError("abliteration: harmful and safe development prompts have the same states")
    unit_D = jnp.asarray(direction_D / length, jnp.float32)

    def without(kernel: ArrayLike) -> Array:
        kernel = jnp.asarray(kernel)
        return kernel - (kernel @ unit_D)[..., None] * unit_D

    layers = dict(params["layers"])
    layers["attention"] = {**layers["attention"], "output": without(layers["attention"]["output"])}
    layers["mlp"] = {**layers["mlp"], "down": without(layers["mlp"]["down"])}
    embedding = params["embedder"]["embedding"]
    edited: Params = {**params, "layers": layers, "embedder": {"embedding": without(embedding)}}
    if config.tie_embeddings:
        edited["unembed"] = {"kernel": jnp.asarray(embedding).T}
    return dataclasses.replace(target, config=dataclasses.replace(config, tie_embeddings=False), params=edited)


def _check_norms(target: Target) -> None:
    if (norms := target.config.norms) != "before":
        raise NotTriedError(f"abliteration: model.norms={norms!r}: only decoders with norms before can be edited")


def divergence(before: Target, after: Target, prompts: Sequence[Tokens]) -> float:
    """Mean over prompts of KL(before || after) of the next token, in nats."""
    total = 0.0
    for batch in batches(prompts, max_rows=_ROWS, max_len=before.config.max_seq_len):
        log_p_BV, log_q_BV = (
            np.asarray(_next_log_probs(each.config, each.params, batch.tokens_PT, batch.lengths_P), np.float64)
            for each in (before, after)
        )
        total += (np.exp(log_p_BV) * (log_p_BV - log_q_BV))[: len(batch.indices)].sum()
    return total / len(prompts)


@functools.partial(jax.jit, static_argnums=0)
def _last_states(
    config: ModelConfig, params: Params, tokens_BT: Int[Array, "B T"], lengths_B: Int[Array, " B"]
) -> Float[Array, "L B D"]:
    config = dataclasses.replace(config, attention="xla")
    found = decoder.layer_states(config, params, tokens_BT, range(config.num_layers + 1))
    rows_B = jnp.arange(len(lengths_B))
    return jnp.stack([x_BTD[rows_B, lengths_B - 1] for x_BTD in found]).astype(jnp.float32)


@functools.partial(jax.jit, static_argnums=0)
def _next_log_probs(
    config: ModelConfig, params: Params, tokens_BT: Int[Array, "B T"], lengths_B: Int[Array, " B"]
) -> Float[Array, "B V"]:
    logits_BTV = decoder.apply(dataclasses.replace(config, attention="xla"), params, tokens_BT)
    return jax.nn.log_softmax(logits_BTV[jnp.arange(len(lengths_B)), lengths_B - 1])
