"""Linear probes for a model, trained on half of the development cases; the layer is chosen on the other half.

A probe learns from the stream at every token from a prompt's last one on, each labelled as its case is. With a header
it learns from the stream at the header re-inserted behind those tokens (Any-Depth Alignment, arXiv 2510.18081).
"""

import dataclasses
import functools
import hashlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from safelm.evaluate.monitors.cases import Case
from safelm.inference import forward
from safelm.inference.prompts import batches
from safelm.inference.weights import Weights, prepare
from safelm.lm import LanguageModel
from safelm.models import decoder
from safelm.models.config import ModelConfig
from safelm.safety.monitors import SavedHead, fitting
from safelm.safety.monitors.folder import stream_fingerprint
from safelm.tags import MAX_SCORE, MIN_SCORE

_ROWS = 32
MOST_TOKENS = 30_000  # that train a probe, drawn evenly


@dataclasses.dataclass(frozen=True)
class Halves:
    """Development cases by what they are for; cases of one group are in one half."""

    train: list[Case]
    chosen_on: list[Case]


def halves(cases: Sequence[Case]) -> Halves:
    """Splits cases by group, always in the same way, every second group of each kind to either half.

    Raises ValueError for fewer than two groups of a kind.
    """
    in_train: set[str] = set()
    for harmful in (True, False):
        names = {case.group for case in cases if _label(case) == harmful}
        if len(names) < 2:
            kind = "harmful" if harmful else "harmless"
            raise ValueError(f"development: {len(names)} groups with {kind} cases, want at least 2")
        in_train |= set(sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())[::2])
    train = [case for case in cases if case.group in in_train]
    return Halves(train, [case for case in cases if case.group not in in_train])


def _label(case: Case) -> bool:
    return bool(case.asks_harm if case.answers_harm is None else case.answers_harm)


def train_probe(
    lm: LanguageModel,
    parts: Halves,
    *,
    source: str,
    header_ids: tuple[int, ...] = (),
    layers: Sequence[int] = (),
    l2: float = fitting.L2,
) -> SavedHead:
    """The probe whose layer tells the tokens of the second half best; its threshold there has the best F1.

    Args:
      layers: numbers of blocks to choose among; none: up to 8, evenly spread.

    Raises ValueError where a half has tokens of one kind only.
    """
    layers = tuple(layers) or fitting.spread_layers(lm.config.num_layers)
    states = {}
    for name, cases in (("train", parts.train), ("chosen_on", parts.chosen_on)):
        states[name] = _states_of(lm, cases, layers, header_ids)
    (train_LND, scores_N), (chosen_LMD, scores_M) = states["train"], states["chosen_on"]
    is_harmful_M = scores_M == MAX_SCORE
    fitted = fitting.choose_layer(train_LND, scores_N, chosen_LMD, is_harmful_M, layers, min_score=MAX_SCORE, l2=l2)
    level_M = fitting.level_of(chosen_LMD[layers.index(fitted.layer)], fitted.kernel_DC, fitted.bias_C, MAX_SCORE)
    return SavedHead(
        kind="probe",
        source=source,
        fingerprint=stream_fingerprint(lm.params, lm.tokenizer.hash, lm.tokenizer.harm_tag_id),
        is_encoder=False,
        layer=fitted.layer,
        kernel_DC=fitted.kernel_DC,
        bias_C=fitted.bias_C,
        min_score=MAX_SCORE,
        threshold=fitting.best_threshold(level_M, is_harmful_M),
        header_ids=header_ids,
        training={
            "cases": {"train": len(parts.train), "chosen_on": len(parts.chosen_on)},
            "tokens": {"train": len(scores_N), "chosen_on": len(scores_M)},
            "development_auroc": {str(layer): value for layer, value in fitted.development.items()},
            "l2": l2,
        },
    )


def _states_of(
    lm: LanguageModel, cases: Sequence[Case], layers: tuple[int, ...], header_ids: tuple[int, ...]
) -> tuple[Float32[np.ndarray, "L N D"], Int[np.ndarray, " N"]]:
    """The stream at cases' tokens from the prompt's last on, at most MOST_TOKENS of them, and their scores, 0 or 5."""
    rows = [case.ids for case in cases]
    starts = [len(case.prompt_ids) - 1 for case in cases]
    lengths = [len(ids) - start for ids, start in zip(rows, starts, strict=True)]
    every, passed = max(1, -(-sum(lengths) // MOST_TOKENS)), 0
    weights = prepare(lm.config, lm.params) if header_ids else None
    config = dataclasses.replace(lm.config, attention="xla")
    found, scores = [], []
    for batch in batches(rows, max_rows=_ROWS, max_len=config.max_seq_len):
        if weights is None:
            states_LBTD = np.asarray(_states(config, layers, lm.params, batch.tokens_PT), np.float32)
        else:
            states_LBTD = np.asarray(_states_behind(config, layers, header_ids, weights, batch.tokens_PT), np.float32)
        for row, index in enumerate(batch.indices):
            first = starts[index] + -passed % every  # every so many tokens of all cases in a row
            own_LND = states_LBTD[:, row, first : len(rows[index]) : every].copy()  # a view would keep the whole batch
            passed += lengths[index]
            found.append(own_LND)
            scores += [MAX_SCORE if _label(cases[index]) else MIN_SCORE] * own_LND.shape[1]
    return np.concatenate(found, axis=1), np.array(scores)


@functools.partial(jax.jit, static_argnames=("config", "layers"))
def _states(
    config: ModelConfig, layers: tuple[int, ...], params: decoder.Params, tokens_BT: Int[Array, "B T"]
) -> Float[Array, "L B T D"]:
    return jnp.stack(decoder.layer_states(config, params, tokens_BT, layers))


@functools.partial(jax.jit, static_argnames=("config", "layers", "header_ids"))
def _states_behind(
    config: ModelConfig,
    layers: tuple[int, ...],
    header_ids: tuple[int, ...],
    weights: Weights,
    tokens_BT: Int[Array, "B T"],
) -> Float[Array, "L B T D"]:
    """The stream at the header's last token, re-inserted behind every token."""
    height, width = tokens_BT.shape
    cache, _ = forward.read_prompts(config, weights, tokens_BT, jnp.full(height, width))
    header_BT = jnp.broadcast_to(jnp.array(header_ids, jnp.int32), (height, len(header_ids)))

    def behind(place: Array) -> Array:
        lengths_B = jnp.full(height, place + 1)
        return jnp.stack(
            [
                forward.read_behind_tapped(config, weights, header_BT, cache, lengths_B, layer)[2][:, -1]
                for layer in layers
            ]
        )

    states_TLBD = jax.lax.map(behind, jnp.arange(width))
    return states_TLBD.transpose(1, 2, 0, 3)
