"""Training the backbone with the head (Maini et al. 2025, C.1): all parameters, or those of the last n layers.

Chunks are packed into rows, so that short comments cost what they hold and one program serves all lengths. Where the
lower layers are frozen, what they make of a chunk is computed once (see `state_cache`).
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Float

from safelm.io.progress import Bar
from safelm.safety.classifier import head
from safelm.safety.classifier.state_cache import StateCache
from safelm.safety.classifier.targets import Targets
from safelm.safety.embedding import Backbone, packed

_logger = logging.getLogger(__name__)
Params = Mapping[str, Any]
SELECTIONS = ("recall_1", "recall_3", "macro_f1", "auroc_1", "auroc_by_source")
SCHEDULES = ("constant", "linear")
_WARMUP = 0.06  # of all steps, in which a linear schedule's rate rises
_WINDOW = 4096  # chunks that are packed together


@dataclasses.dataclass(frozen=True)
class TuningRecipe:
    """How backbone and head are trained together.

    Attributes:
      last_n: layers that are trained, counted from the output; None for all parameters, 0 for none (no tuning).
      batch_tokens: tokens of a step's packed rows; the paper's batch of 8 texts of 512 tokens is 4096.
      schedule: of the learning rate: "constant", or "linear": up over 6% of all steps, then down to 0.
      selection: which held-out measure decides the epoch that is kept (ties: macro-F1). "auroc_by_source": the mean
        over sources of how well a source's texts of its upper half of scores are told from the others.
      patience: epochs without a better one after which training ends; None: never.
    """

    last_n: int | None = None
    epochs: int = 5
    learning_rate: float = 1e-6
    batch_tokens: int = 4096
    weight_decay: float = 1e-3
    schedule: str = "constant"
    selection: str = "recall_1"
    patience: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in (("selection", SELECTIONS), ("schedule", SCHEDULES)):
            if getattr(self, name) not in known:
                raise ValueError(f"tuning.{name}={getattr(self, name)!r}: one of {', '.join(known)}")
        for name in ("epochs", "learning_rate", "batch_tokens"):
            if not getattr(self, name) > 0:
                raise ValueError(f"tuning.{name}={getattr(self, name)}: must be above 0")
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"tuning.patience={self.patience}: must be at least 1")

    def optimizer(self, steps: int) -> optax.GradientTransformation:
        """AdamW with the schedule over so many steps."""
        rate: Any = self.learning_rate
        if self.schedule == "linear":
            warmup = max(round(_WARMUP * steps), 1)
            rate = optax.join_schedules(
                [
                    optax.linear_schedule(0.0, self.learning_rate, warmup),
                    optax.linear_schedule(self.learning_rate, 0.0, max(steps - warmup, 1)),
                ],
                [warmup],
            )
        return optax.adamw(rate, weight_decay=self.weight_decay)


@dataclasses.dataclass(frozen=True)
class State:
    """Where a run stands after an epoch: what is trained, the optimizer's state, the best so far and its epoch."""

    epoch: int
    trained: Any
    optimizer: Any
    best: Any
    best_measure: tuple[float, float]
    best_epoch: int = 0


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


def frozen_states(backbone: Backbone, last_n: int | None, folder: str | None = None) -> StateCache | None:
    """A cache for what the frozen layers make of chunks, in memory or in a local folder; None where all are trained."""
    first = backbone.frozen_layers(last_n)
    return StateCache(backbone, first, folder) if first else None


def tune(
    backbone: Backbone,
    head_params: head.HeadParams,
    chunks: Sequence[np.ndarray],
    targets: Targets,
    recipe: TuningRecipe,
    harm_weight: float,
    measure: Callable[[Callable[[], Float[np.ndarray, "M L"]]], tuple[float, float]],
    held_out: Sequence[np.ndarray],
    *,
    states: StateCache | None = None,
    resume: State | None = None,
    on_epoch: Callable[[State], object] = lambda state: None,
) -> tuple[Params, head.HeadParams]:
    """The backbone's parameters and the head of the epoch that is best on held-out texts.

    Args:
      chunks, targets: ids of each training text's first chunk, and its labels.
      measure: from the held-out logits (`head.apply_all`) to (selection measure, tie-breaker); larger is better.
      held_out: ids of the held-out texts' first chunks.
      states: `frozen_states`; the frozen layers are computed in every step when not given.
      resume, on_epoch: to go on from a state that `on_epoch` was given; the result is that of an unbroken run.
    """
    frozen, trained_backbone = split(backbone, backbone.params, recipe.last_n)
    program = _Program(backbone, frozen, recipe, chunks, states)
    if states:
        states.fill([*chunks, *held_out])
    labels = [np.asarray(part) for part in head.arrays(targets, harm_weight)]
    trained = {"backbone": trained_backbone, "head": {k: jnp.asarray(v) for k, v in head_params.items()}}
    state = resume or State(0, trained, program.optimizer.init(trained), trained, (-1.0, -1.0))
    placed = {
        name: jax.device_put(getattr(state, name), program.everywhere) for name in ("trained", "optimizer", "best")
    }
    state = dataclasses.replace(state, **placed)
    while state.epoch < recipe.epochs and not _is_over(state, recipe):
        trained, optimizer = state.trained, state.optimizer
        batches = program.batches(chunks, np.random.default_rng((recipe.seed, state.epoch)))
        total, name = sum(map(len, chunks)), f"epoch {state.epoch + 1} of {recipe.epochs}"
        with Bar(total=total, desc=name, unit=" tokens", unit_scale=True, disable=None) as bar:
            for batch in batches:
                rows = program.filled(batch, chunks)
                trained, optimizer, loss = program.step(trained, optimizer, rows, labels)
                bar.update(int((rows.segments_BT > 0).sum()))
        found = measure(functools.partial(program.logits, trained, held_out))
        _logger.info("%s: loss %.4f, held-out %s %.4f, macro-F1 %.4f", name, float(loss), recipe.selection, *found)
        epoch = state.epoch + 1
        best = (
            (trained, found, epoch)
            if found > state.best_measure
            else (state.best, state.best_measure, state.best_epoch)
        )
        state = State(epoch, trained, optimizer, *best)
        on_epoch(state)
    whole = jax.tree.map(np.asarray, merge(frozen, state.best["backbone"]))
    return whole, jax.tree.map(np.asarray, state.best["head"])


def _is_over(state: State, recipe: TuningRecipe) -> bool:
    return recipe.patience is not None and state.epoch - state.best_epoch >= recipe.patience


class _Program:
    """The compiled step and the held-out pass: rows over all devices where they divide, parameters on each."""

    def __init__(
        self,
        backbone: Backbone,
        frozen: Params,
        recipe: TuningRecipe,
        chunks: Sequence[np.ndarray],
        states: StateCache | None,
    ):
        self._row_tokens = backbone.max_tokens
        self._count = max(recipe.batch_tokens // self._row_tokens, 1)
        mesh = jax.sharding.Mesh(np.array(jax.devices()), ("batch",))
        self.everywhere = NamedSharding(mesh, PartitionSpec())
        divides = self._count % jax.device_count() == 0
        self._rows = NamedSharding(mesh, PartitionSpec("batch")) if divides else self.everywhere
        self._frozen = jax.device_put(frozen, self.everywhere)
        self._states, self._first = states, states.layer if states else 0
        steps = len(self.batches(chunks, np.random.default_rng(0)))
        self.optimizer = recipe.optimizer(steps * recipe.epochs)

        def pooled(trained: Any, frozen: Any, x: jax.Array, segments_BT: jax.Array, positions_BT: jax.Array) -> Any:
            params = merge(jax.lax.stop_gradient(frozen), trained["backbone"])
            return backbone.pooled_rows(params, x, segments_BT, positions_BT, self._first)

        def logits(trained: Any, frozen: Any, *rows: jax.Array) -> jax.Array:
            return head.apply_all(trained["head"], pooled(trained, frozen, *rows))

        def step(trained: Any, optimizer: Any, frozen: Any, rows: Any, labels: Any) -> Any:
            def loss_of(trained: Any) -> jax.Array:
                x_BSE = pooled(trained, frozen, *rows)
                return head.joint_loss(trained["head"], x_BSE.reshape(-1, x_BSE.shape[-1]), *labels)

            loss, gradient = jax.value_and_grad(loss_of)(trained)
            updates, optimizer = self.optimizer.update(gradient, optimizer, trained)
            return optax.apply_updates(trained, updates), optimizer, loss

        self._logits = jax.jit(logits)
        self._step = jax.jit(step)

    def batches(self, chunks: Sequence[np.ndarray], rng: np.random.Generator) -> list[list[list[int]]]:
        """One epoch's steps, each some rows of chunks, in a random order; every chunk once."""
        order = rng.permutation(len(chunks))
        rows: list[list[int]] = []
        for start in range(0, len(order), _WINDOW):
            window = order[start : start + _WINDOW]
            plan = packed.plan([len(chunks[i]) for i in window], self._row_tokens)
            rows += [[int(window[i]) for i in row] for row in plan]
        rows = [rows[i] for i in rng.permutation(len(rows))]
        return [rows[start : start + self._count] for start in range(0, len(rows), self._count)]

    def filled(self, batch: Sequence[Sequence[int]], chunks: Sequence[np.ndarray]) -> packed.Rows:
        """A step's rows: ids, or the frozen layers' states of them."""
        value_of = (lambda i: self._states.states(chunks[i])) if self._states else lambda i: chunks[i]
        return packed.filled(batch, self._row_tokens, self._count, value_of)

    def step(self, trained: Any, optimizer: Any, rows: packed.Rows, labels: Sequence[np.ndarray]) -> Any:
        """One update. The loss is the mean over the step's texts; places without one weigh nothing."""
        chunk_N = rows.chunk_BS.reshape(-1)
        is_text_N = chunk_N >= 0
        votes, kinds, *weights = (part[np.maximum(chunk_N, 0)] for part in labels)
        scale_N = np.where(is_text_N, len(chunk_N) / max(is_text_N.sum(), 1), 0.0).astype(np.float32)
        weights = [weight * scale_N for weight in weights]
        placed = jax.device_put((votes, kinds, *weights), self.everywhere)
        return self._step(trained, optimizer, self._frozen, self._placed(rows), placed)

    def logits(self, trained: Any, chunks: Sequence[np.ndarray]) -> Float[np.ndarray, "M L"]:
        """Logits of each chunk's score and kinds, in order."""
        plan = packed.plan([len(chunk) for chunk in chunks], self._row_tokens)
        out = None
        for start in range(0, len(plan), self._count):
            rows = self.filled(plan[start : start + self._count], chunks)
            found_BSL = np.asarray(self._logits(trained, self._frozen, *self._placed(rows)))
            out = np.zeros((len(chunks), found_BSL.shape[-1]), np.float32) if out is None else out
            out[rows.chunk_BS[rows.chunk_BS >= 0]] = found_BSL[rows.chunk_BS >= 0]
        return out

    def _placed(self, rows: packed.Rows) -> tuple[jax.Array, ...]:
        return jax.device_put((rows.values, rows.segments_BT, rows.positions_BT), self._rows)
