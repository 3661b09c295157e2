"""Training the backbone with the head (Maini et al. 2025, C.1): all parameters, or those of the last n layers."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Float, Int
from tqdm import tqdm

from safelm.safety.classifier import head
from safelm.safety.embedding import Backbone
from safelm.safety.embedding.embedder import bucket_lengths

_logger = logging.getLogger(__name__)
Params = Mapping[str, Any]
SELECTIONS = ("recall_1", "recall_3", "macro_f1", "auroc_1")


@dataclasses.dataclass(frozen=True)
class TuningRecipe:
    """How backbone and head are trained together.

    Attributes:
      last_n: layers that are trained, counted from the output; None for all parameters, 0 for none (no tuning).
      selection: which held-out measure decides the epoch that is kept (ties: macro-F1).
    """

    last_n: int | None = None
    epochs: int = 5
    learning_rate: float = 1e-6
    batch_size: int = 8
    weight_decay: float = 1e-3
    selection: str = "recall_1"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.selection not in SELECTIONS:
            raise ValueError(f"tuning.selection={self.selection!r}: one of {', '.join(SELECTIONS)}")
        for name in ("epochs", "learning_rate", "batch_size"):
            if not getattr(self, name) > 0:
                raise ValueError(f"tuning.{name}={getattr(self, name)}: must be above 0")


@dataclasses.dataclass(frozen=True)
class State:
    """Where a run stands after an epoch: what is trained, the optimizer's state, the best so far."""

    epoch: int
    trained: Any
    optimizer: Any
    best: Any
    best_measure: tuple[float, float]


def split(backbone: Backbone, params: Params, last_n: int | None) -> tuple[Params, Params]:
    """(frozen, trained): every parameter cut in two along its first axis, where one part may be empty."""

    def first_trained(mask: Any, leaf: Any) -> int:
        flat = np.broadcast_to(np.asarray(mask).reshape(-1), (leaf.shape[0],))
        return int(leaf.shape[0] - flat.sum())

    cut = jax.tree.map(first_trained, backbone.trainable(params, last_n), params)
    return jax.tree.map(lambda n, p: p[:n], cut, params), jax.tree.map(lambda n, p: p[n:], cut, params)


def merge(frozen: Params, trained: Params) -> Params:
    """The whole parameters again; `split` undone."""
    return jax.tree.map(
        lambda f, t: jnp.concatenate([f, t]) if f.shape[0] and t.shape[0] else (f if f.shape[0] else t), frozen, trained
    )


def tune(
    backbone: Backbone,
    head_params: head.HeadParams,
    chunks: Sequence[np.ndarray],
    scores_N: Int[np.ndarray, " N"],
    recipe: TuningRecipe,
    harm_weight: float,
    measure: Callable[[Callable[[], Float[np.ndarray, "M 6"]]], tuple[float, float]],
    held_out: Sequence[np.ndarray],
    *,
    resume: State | None = None,
    on_epoch: Callable[[State], object] = lambda state: None,
) -> tuple[Params, head.HeadParams]:
    """The backbone's parameters and the head of the epoch that is best on held-out texts.

    Args:
      chunks, scores_N: ids of each training text's first chunk, and its score.
      measure: from the held-out logits to (selection measure, tie-breaker); larger is better.
      held_out: ids of the held-out texts' first chunks.
      resume, on_epoch: to go on from a state that `on_epoch` was given; the result is that of an unbroken run.
    """
    frozen, trained_backbone = split(backbone, backbone.params, recipe.last_n)
    program = _Program(backbone, frozen, recipe, harm_weight, min(recipe.batch_size, len(chunks)))
    trained = {"backbone": trained_backbone, "head": {k: jnp.asarray(v) for k, v in head_params.items()}}
    state = resume or State(0, trained, program.optimizer.init(trained), trained, (-1.0, -1.0))
    state = jax.device_put(dataclasses.asdict(state) | {"best_measure": None}, program.everywhere) | {
        "best_measure": tuple(state.best_measure),
        "epoch": state.epoch,
    }
    state = State(**state)
    while state.epoch < recipe.epochs:
        rng = np.random.default_rng((recipe.seed, state.epoch))
        trained, optimizer = state.trained, state.optimizer
        rows = head.batches(len(chunks), recipe.batch_size, rng)
        for rows_B in tqdm(rows, desc=f"epoch {state.epoch + 1}", unit=" batches", disable=None):
            tokens_BT, lengths_B = program.padded([chunks[i] for i in rows_B])
            trained, optimizer, loss = program.step(trained, optimizer, tokens_BT, lengths_B, scores_N[rows_B])
        found = measure(functools.partial(program.logits, trained, held_out))
        _logger.info(
            "epoch %d: loss %.4f, held-out %s %.4f, macro-F1 %.4f",
            state.epoch + 1,
            float(loss),
            recipe.selection,
            *found,
        )
        best, best_measure = max((state.best, state.best_measure), (trained, found), key=lambda pair: pair[1])
        state = State(state.epoch + 1, trained, optimizer, best, best_measure)
        on_epoch(state)
    whole = jax.tree.map(np.asarray, merge(frozen, state.best["backbone"]))
    return whole, jax.tree.map(np.asarray, state.best["head"])


class _Program:
    """The compiled step and the held-out pass: rows over all devices where they divide, parameters on each."""

    def __init__(self, backbone: Backbone, frozen: Params, recipe: TuningRecipe, harm_weight: float, batch_size: int):
        self._backbone, self._batch_size = backbone, batch_size
        self._buckets = bucket_lengths(backbone.max_tokens)
        mesh = jax.sharding.Mesh(np.array(jax.devices()), ("batch",))
        self.everywhere = NamedSharding(mesh, PartitionSpec())
        divides = batch_size % jax.device_count() == 0
        self._rows = NamedSharding(mesh, PartitionSpec("batch")) if divides else self.everywhere
        self._frozen = jax.device_put(frozen, self.everywhere)
        self.optimizer = optax.adamw(recipe.learning_rate, weight_decay=recipe.weight_decay)

        def logits(trained: Any, frozen: Any, tokens_BT: jax.Array, lengths_B: jax.Array) -> jax.Array:
            params = merge(jax.lax.stop_gradient(frozen), trained["backbone"])
            return head.apply(trained["head"], backbone.pooled(params, tokens_BT, lengths_B))

        def step(trained: Any, optimizer: Any, frozen: Any, tokens_BT: Any, lengths_B: Any, scores_B: Any) -> Any:
            def loss_of(trained: Any) -> jax.Array:
                return head.weighted_loss(logits(trained, frozen, tokens_BT, lengths_B), scores_B, harm_weight)

            loss, gradient = jax.value_and_grad(loss_of)(trained)
            updates, optimizer = self.optimizer.update(gradient, optimizer, trained)
            return optax.apply_updates(trained, updates), optimizer, loss

        self._logits = jax.jit(logits)
        self._step = jax.jit(step)

    def padded(self, chunks: Sequence[np.ndarray]) -> tuple[jax.Array, jax.Array]:
        """Rows of one bucket's length for a batch, filled up to the batch size."""
        length = next(bucket for bucket in self._buckets if bucket >= max(len(chunk) for chunk in chunks))
        tokens_BT = np.full((self._batch_size, length), self._backbone.tokenizer.pad_id, np.int32)
        lengths_B = np.ones(self._batch_size, np.int32)
        for row, chunk in enumerate(chunks):
            tokens_BT[row, : len(chunk)], lengths_B[row] = chunk, len(chunk)
        return jax.device_put(tokens_BT, self._rows), jax.device_put(lengths_B, self._rows)

    def step(self, trained: Any, optimizer: Any, tokens_BT: Any, lengths_B: Any, scores_B: Any) -> Any:
        scores_B = jax.device_put(scores_B.astype(np.int32), self._rows)
        return self._step(trained, optimizer, self._frozen, tokens_BT, lengths_B, scores_B)

    def logits(self, trained: Any, chunks: Sequence[np.ndarray]) -> Float[np.ndarray, "M 6"]:
        """Logits of each chunk, in order; chunks of about one length are computed together."""
        out = np.zeros((len(chunks), head.CLASSES), np.float32)
        for rows in _by_length(chunks, self._batch_size):
            tokens_BT, lengths_B = self.padded([chunks[i] for i in rows])
            out[rows] = np.asarray(self._logits(trained, self._frozen, tokens_BT, lengths_B))[: len(rows)]
        return out


def _by_length(chunks: Sequence[np.ndarray], batch_size: int) -> Iterator[list[int]]:
    order = sorted(range(len(chunks)), key=lambda i: len(chunks[i]))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]
