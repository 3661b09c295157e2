"""One update as one compiled program: loss and gradients over micro-batches, summed by tokens, then the optimizer.

Gradients of micro-batches are *summed* over weighted tokens and divided once by the weight of the whole batch, so
that accumulation changes nothing but the order of additions, however unequal the weights are.
"""

import dataclasses
import typing
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, PyTree

from safelm.data.batch import abstract_batch as plain_abstract_batch
from safelm.data.channels import KIND, UNLIKELIHOOD, Channel
from safelm.data.token_kinds import KINDS, MASKED, TAG, TEXT
from safelm.models import decoder as model
from safelm.models import lora, sharding
from safelm.models.chunked_loss import next_token_loss
from safelm.models.decoder import ModelConfig
from safelm.models.loss import LossSums, TokenKinds
from safelm.models.routing import Routes
from safelm.train.config_checks import check_dtypes
from safelm.train.fused_adamw import FusedAdamW
from safelm.train.optimizer import PlainUpdate
from safelm.train.types import Batch, Gradients, OptState, Params, Scalar, Shardings


@typing.no_type_check  # JAX also builds it of shapes, shardings and placeholders
@flax.struct.dataclass
class TrainState:
    """The state of training, as a checkpoint keeps it; also the same tree of shapes or of shardings."""

    step: Int[Array, ""]  # updates done
    params: Params  # frozen ones too
    opt_state: OptState  # of those that are trained


@typing.no_type_check
@flax.struct.dataclass
class Controls:
    """The host's settings for one update as float32 scalars: arguments of the program, so a new value compiles nothing.

    An update whose loss (nats per token) or gradient norm is not finite or above its limit is not applied: parameters
    and optimizer stay as they are, only the step goes on.
    """

    learning_rate: Scalar
    max_loss: Scalar = np.float32(np.inf)
    max_grad_norm: Scalar = np.float32(np.inf)


@typing.no_type_check
@flax.struct.dataclass
class StepMetrics:
    """Metrics of one step, computed before the update is applied."""

    loss: LossSums
    grad_norm: Float[Array, ""]  # of the mean gradient, before the clip
    applied: Bool[Array, ""]  # False if `Controls` or a number that isn't finite kept the update from being applied


@dataclasses.dataclass(frozen=True)
class Program:
    """The compiled functions of a run and where their arguments live.

    Attributes:
      abstract_state: shapes, dtypes and shardings, to restore a checkpoint into.
      batch_sharding: of every array in a batch.
      init_params: key -> parameters.
      init_adapters: key -> new adapters, as `lora.split` has them; for models with some.
      start: parameters -> state at step 0 (the parameters are taken over).
      step: (state, batch, Controls) -> (state, StepMetrics); the old state is taken over.
      evaluate: (parameters, batch) -> LossSums.
    """

    abstract_state: TrainState
    batch_sharding: NamedSharding
    init_params: Callable[[jax.Array], Params]
    init_adapters: Callable[[jax.Array], Params]
    start: Callable[[Params], TrainState]
    step: Callable[[TrainState, Batch, Controls], tuple[TrainState, StepMetrics]]
    evaluate: Callable[[Params, Batch], LossSums]


def make_program(
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    batch_size: int,
    grad_accum_steps: int,
    z_loss: float | int = 0.0,
    vocab_chunks: int = 0,
    harm_tag_id: int | None = None,
    routes: Sequence[int] = (),
    fused: FusedAdamW | None = None,
) -> Program:
    """Builds a run's functions for a mesh, inputs and outputs pinned to their shardings; call them under the mesh.

    Args:
      vocab_chunks: parts of the vocabulary whose logits are in memory one at a time (`chunked_loss.num_chunks`).
      routes: of a model with designated units, what becomes of the rows of every source (`Routing.routes`).
      harm_tag_id: to sum the loss by kind of token too, in which the harm tag is one; None: kinds aren't told apart.
      fused: what does the optimizer's update in its place.

    Raises ValueError if a micro-batch or a parameter doesn't divide over the mesh, and for dtypes in which training
    would lose updates.
    """
    check_dtypes(config)
    abstract = _abstract_state(config, optimizer, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    batch_sharding = sharding.batch_sharding(mesh, batch_size // grad_accum_steps)
    everywhere, rule = sharding.replicated(mesh), fused or PlainUpdate(optimizer)

    trained_shardings, _ = lora.split(config, shardings.params)

    def start(params: Params) -> TrainState:
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(lora.split(config, params)[0]))

    def loss(trained: Params, frozen: Params, batch: Batch) -> tuple[Float[Array, ""], LossSums]:
        ways = {"z_loss": z_loss, "vocab_chunks": vocab_chunks}
        if not routes:
            return _loss(config, lora.joined(trained, frozen), batch, **ways)
        return _routed_loss(config, trained, batch, jnp.asarray(routes), **ways)

    def update(state: TrainState, batch: Batch, controls: Controls) -> tuple[TrainState, StepMetrics]:
        trained, frozen = lora.split(config, state.params)
        batch = with_kinds(batch, harm_tag_id)
        gradients, sums = _summed_gradients(loss, trained, frozen, batch, grad_accum_steps, trained_shardings)
        divisor, mean_loss = sums.divisor(), sums.mean_cross_entropy()
        norm = rule.norm(gradients, divisor)
        finite = jnp.isfinite(norm) & jnp.isfinite(mean_loss)
        applied = finite & (mean_loss <= controls.max_loss) & (norm <= controls.max_grad_norm)
        how = {"norm": norm, "divisor": divisor, "learning_rate": controls.learning_rate, "is_applied": applied}
        moved, opt_state = rule.update(trained, state.opt_state, gradients, **how)
        params = lora.joined(moved, frozen)
        return TrainState(state.step + 1, params, opt_state), StepMetrics(sums, norm, applied)

    return Program(
        abstract_state=abstract,
        batch_sharding=batch_sharding,
        init_params=jax.jit(lambda key: model.init(config, key), out_shardings=shardings.params),
        init_adapters=jax.jit(
            lambda key: lora.split(config, model.init(config, key))[0], out_shardings=trained_shardings
        ),
        start=jax.jit(start, in_shardings=(shardings.params,), out_shardings=shardings, donate_argnums=0),
        step=jax.jit(
            update,
            in_shardings=(shardings, batch_sharding, everywhere),
            out_shardings=(shardings, everywhere),
            donate_argnums=0,
        ),
        evaluate=jax.jit(
            lambda params, batch: _loss(
                config, params, with_kinds(batch, None), z_loss=z_loss, vocab_chunks=vocab_chunks
            )[1],
            in_shardings=(shardings.params, batch_sharding),
            out_shardings=everywhere,
        ),
    )


def abstract_batch(program: Program, batch_size: int, seq_len: int, channels: Sequence[Channel] = ()) -> Batch:
    """The shapes and shardings of a global batch: with `Program.abstract_state`, what `step.lower` needs."""
    return plain_abstract_batch(batch_size, seq_len, channels, sharding=program.batch_sharding)


def abstract_controls(mesh: Mesh) -> Controls:
    """The shapes and shardings of `Controls`."""
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=sharding.replicated(mesh))
    return Controls(scalar, scalar, scalar)


def _loss(
    config: ModelConfig,
    params: Params,
    batch: Batch,
    **ways: Any,
) -> tuple[Float[Array, ""], LossSums]:
    return _loss_of_states(config, params, _states(config, params, batch), batch, **ways)


def _routed_loss(
    config: ModelConfig, params: Params, batch: Batch, route_of_source: Int[Array, " sources"], **ways: Any
) -> tuple[Float[Array, ""], LossSums]:
    """The loss of which labelled rows teach designated units alone.

    Their logits are computed apart, from an unembedding without a gradient.
    """
    routes = Routes.of_rows(route_of_source[batch.source_ids_B])
    x_BTD = _states(config, params, batch, routes)
    teaching = _loss_of_states(config, params, x_BTD, _only_rows(batch, routes.teaches_B > 0), **ways)
    others = _only_rows(batch, routes.teaches_B == 0)
    labelled = _loss_of_states(config, jax.lax.stop_gradient(params), x_BTD, others, **ways)
    return teaching[0] + labelled[0], teaching[1] + labelled[1]


def _only_rows(batch: Batch, is_in_B: Bool[Array, " B"]) -> Batch:
    """The batch with nothing to learn or count in the other rows."""

    def kept(name: str, numbers_BT: Array) -> Array:
        return jnp.where(is_in_B[:, None], numbers_BT, -1 if name == KIND.name else 0)

    weight_BT = kept("", batch.loss_weight_BT)
    channels = {name: kept(name, numbers_BT) for name, numbers_BT in batch.channels.items()}
    return batch._replace(loss_weight_BT=weight_BT, channels=channels)


def _states(config: ModelConfig, params: Params, batch: Batch, routes: Routes | None = None) -> Float[Array, "B T D"]:
    return model.hidden_states(
        config,
        params,
        batch.inputs_BT,
        positions_BT=batch.positions_BT,
        segment_ids_BT=batch.segment_ids_BT,
        routes=routes,
    )


def _loss_of_states(
    config: ModelConfig, params: Params, x_BTD: Float[Array, "B T D"], batch: Batch, **ways: Any
) -> tuple[Float[Array, ""], LossSums]:
    weights = (batch.loss_weight_BT, batch.channels.get(UNLIKELIHOOD.name))
    kinds = TokenKinds(batch.channels[KIND.name], len(KINDS)) if KIND.name in batch.channels else None
    return next_token_loss(config, params, x_BTD, batch.targets_BT, *weights, kinds=kinds, **ways)


def with_kinds(batch: Batch, harm_tag_id: int | None) -> Batch:
    """The batch with the kind of every target: as the stores say, elsewhere by target and weight; -1 at padding.

    Without kinds if `harm_tag_id` is None.
    """
    channels = {name: numbers for name, numbers in batch.channels.items() if name != KIND.name}
    if harm_tag_id is None:
        return batch._replace(channels=channels)
    said_BT = batch.channels.get(KIND.name, jnp.zeros_like(batch.targets_BT))
    is_read_BT = batch.loss_weight_BT > 0
    if UNLIKELIHOOD.name in batch.channels:
        is_read_BT |= batch.channels[UNLIKELIHOOD.name] > 0
    found_BT = jnp.where(is_read_BT, jnp.where(batch.targets_BT == harm_tag_id, TAG, TEXT), MASKED)
    ids_BT = jnp.where(said_BT == TEXT, found_BT, said_BT)
    return batch._replace(channels=channels | {KIND.name: jnp.where(batch.segment_ids_BT > 0, ids_BT, -1)})


Loss = Callable[[Params, Params, Batch], tuple[Float[Array, ""], LossSums]]


def _summed_gradients(
    loss: Loss, trained: Params, frozen: Params, batch: Batch, grad_accum_steps: int, param_shardings: Shardings
) -> tuple[Gradients, LossSums]:
    """Float32 gradients of the summed loss by what is trained, and the sums, over all micro-batches.

    Where micro-batches meet a data axis, every data group sums its own, and the groups' sums are added up once: the
    network between slices carries the gradients once an update, not once a micro-batch.
    """
    mesh = jax.sharding.get_abstract_mesh()
    # With a tensor axis beside it, XLA's partitioner (jaxlib 0.10.2) aborts on the embedding's lookup.
    if grad_accum_steps == 1 or mesh.empty or mesh.shape["data"] == 1 or mesh.shape["tensor"] > 1:
        return _accumulated(loss, trained, frozen, batch, grad_accum_steps, param_shardings)

    def of_group(trained: Params, frozen: Params, batch: Batch) -> tuple[Gradients, LossSums]:
        specs = jax.tree.map(lambda where: where.spec, param_shardings)
        return jax.lax.psum(_accumulated(loss, trained, frozen, batch, grad_accum_steps, specs), "data")

    rows, same = PartitionSpec("data"), PartitionSpec()
    grouped = jax.shard_map(of_group, in_specs=(same, same, rows), out_specs=same, axis_names={"data"}, check_vma=False)
    return grouped(trained, frozen, batch)


def _accumulated(
    loss: Loss, trained: Params, frozen: Params, batch: Batch, grad_accum_steps: int, param_shardings: Shardings
) -> tuple[Gradients, LossSums]:
    """`_summed_gradients` of the rows that are here."""

    def gradients_of(micro_batch: Batch) -> tuple[Gradients, LossSums]:
        (_, sums), gradients = jax.value_and_grad(loss, has_aux=True)(trained, frozen, micro_batch)
        gradients = jax.tree.map(lambda g: g.astype(jnp.float32), gradients)
        return jax.lax.with_sharding_constraint(gradients, param_shardings), sums

    if grad_accum_steps == 1:
        return gradients_of(batch)

    def split(x: jax.Array) -> jax.Array:
        # Every device's rows are cut into micro-batches, so that no row has to move to another device.
        micro = x.reshape(x.shape[0] // grad_accum_steps, grad_accum_steps, *x.shape[1:])
        return micro.swapaxes(0, 1)

    def accumulate(total: tuple[Gradients, LossSums], micro_batch: Batch) -> tuple[tuple[Gradients, LossSums], None]:
        return jax.tree.map(jnp.add, total, gradients_of(micro_batch)), None

    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), trained)
    zeros = jax.lax.with_sharding_constraint(zeros, param_shardings)
    num_kinds = len(KINDS) if KIND.name in batch.channels else 0
    no_loss = LossSums.zero(has_unlikelihood=UNLIKELIHOOD.name in batch.channels, num_kinds=num_kinds)
    total, _ = jax.lax.scan(accumulate, (zeros, no_loss), jax.tree.map(split, batch))
    return total


def _abstract_state(config: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Shapes with shardings; the optimizer's moments live where their parameters do."""
    everywhere = sharding.replicated(mesh)
    params = abstract_params(config, mesh)
    trained, _ = lora.split(config, params)
    opt_state = abstract_opt_state(optimizer, trained, jax.tree.map(lambda p: p.sharding, trained), everywhere)
    return TrainState(jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere), params, opt_state)


def abstract_params(config: ModelConfig, mesh: Mesh) -> Params:
    """The shapes of a model's parameters with shardings; ValueError for a mesh that doesn't divide them."""
    params = model.abstract_params(config)

    def placed(leaf: jax.ShapeDtypeStruct, where: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    return jax.tree.map(placed, params, sharding.param_shardings(mesh, model.logical_axes(config), params))


def abstract_opt_state(
    optimizer: optax.GradientTransformation, params: Params, param_shardings: Shardings, everywhere: NamedSharding
) -> OptState:
    """Shapes of an optimizer's state with shardings: what belongs to a parameter lives where the parameter does."""
    where = dict(zip(_paths(params), jax.tree.leaves(param_shardings), strict=True))
    shapes = dict(zip(_paths(params), jax.tree.leaves(params), strict=True))

    def placed(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        own = (path[start:] for start in range(len(path)))
        param = next((tail for tail in own if tail in shapes and shapes[tail].shape == leaf.shape), None)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where.get(param, everywhere))

    return jax.tree_util.tree_map_with_path(placed, jax.eval_shape(optimizer.init, params))


def _paths(tree: PyTree) -> list[tuple[Any, ...]]:
    return [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
