"""The compiled programs of the engine, in few shapes.

Every program takes all of a method's settings as numbers. Shapes come from few buckets: the number and width of prompts
read together, the number of prompts decoded together, and the length of their cache.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from safelm.inference import asked as asked_lib
from safelm.inference import forward, token_mask
from safelm.inference.adjustments import NEUTRAL
from safelm.inference.asked import Asked
from safelm.inference.beam import Beams
from safelm.inference.beams import BeamState
from safelm.inference.forward import Cache
from safelm.inference.methods import Beam, Method, SafeBeam, TagPenalty
from safelm.inference.monitors import Monitor
from safelm.inference.monitors.reading import log_level_behind
from safelm.inference.safe_beam import SafeBeams
from safelm.inference.sampling import Sequences, SequenceState
from safelm.inference.weights import Weights
from safelm.models.config import ModelConfig

StepShape = Sequences | Beams | SafeBeams
DecodeState = SequenceState | BeamState


def step_shape(method: Method, platform: str = "") -> StepShape:
    """The settings of a method that its program's shapes depend on; `platform`: JAX's default where not given."""
    if isinstance(method, Beam):
        return Beams(method.num_beams)
    if isinstance(method, SafeBeam):
        has_header = method.monitor is not None and bool(method.monitor.header_ids)
        shares_rows = (platform or jax.default_backend()) == "tpu" and method.num_beams > 1 and not has_header
        return SafeBeams(method.num_beams, method.num_candidates, method.monitor, shares_rows)
    return Sequences(method.num_candidates if isinstance(method, TagPenalty) else 1)


def all_ids(config: ModelConfig, shape: StepShape, num_prompts: int) -> np.ndarray | None:
    """Token masks that allow everything; None for a shape that takes no masks."""
    is_masked = isinstance(shape, Sequences) and shape.num_candidates == 1
    return token_mask.all_ids(config, num_prompts) if is_masked else None


@functools.partial(jax.jit, static_argnames=("config",))
def read_prompts(
    config: ModelConfig,
    weights: Weights,
    tokens_PT: Int[Array, "P T"],
    lengths_P: Int[Array, " P"],
    prefix: Cache | None = None,
    prefix_length: Int[Array, ""] | int = 0,
) -> tuple[Cache, Float[Array, "P V"]]:
    """Keys and values of every prompt and of padding after it, and the logits of the token after it.

    Args:
      prefix: one row, of which `prefix_length` tokens stand before every one of the prompts.
    """
    if prefix is None:
        return forward.read_prompts(config, weights, tokens_PT, lengths_P)
    height, width = tokens_PT.shape
    shared = jax.tree.map(lambda kv: jnp.broadcast_to(kv, (height, *kv.shape[1:])), prefix)
    starts_P = jnp.full(height, prefix_length, jnp.int32)
    x_PTD, new_kv = forward.read_behind(config, weights, tokens_PT, shared, starts_P)
    cache = jax.tree.map(
        lambda before, kv: jax.lax.dynamic_update_slice_in_dim(
            jnp.pad(before, ((0, 0), (0, 0), (0, width), (0, 0))), kv, prefix_length, axis=2
        ),
        shared,
        new_kv,
    )
    return cache, forward.logits_of(config, weights, forward.at_last(x_PTD, lengths_P))


@jax.jit
def log_probs_of(logits_PV: Float[Array, "P V"], ids_PI: Int[Array, "P I"]) -> Float[Array, "P I"]:
    """Each prompt's log-probs of some ids as the next one, over the whole vocabulary."""
    return jnp.take_along_axis(jax.nn.log_softmax(logits_PV, axis=-1), ids_PI, axis=1)


@functools.partial(jax.jit, static_argnames=("config", "monitor"))
def prompt_log_levels(
    config: ModelConfig,
    monitor: Monitor,
    weights: Weights,
    new_kv: Cache,
    lengths_P: Int[Array, " P"],
    last_tokens_P: Int[Array, " P"],
    logits_PV: Float[Array, "P V"],
) -> Float[Array, " P"]:
    """The log of the monitor's level after every prompt, given what `read_prompts` returned.

    Args:
      lengths_P: of the prompts, prefixes included; `last_tokens_P` are their last tokens.
    """
    if monitor.header_ids:
        return log_level_behind(config, weights, monitor, new_kv, lengths_P)
    if monitor.layer is None:
        return monitor.log_level(logits_PV)
    before_P = jnp.maximum(lengths_P - 1, 0)
    last_P1 = last_tokens_P[:, None]
    _, _, read_P1D = forward.read_behind_tapped(config, weights, last_P1, new_kv, before_P, monitor.layer)
    return monitor.log_level(read_P1D[:, 0])


def empty_state(
    config: ModelConfig,
    shape: StepShape,
    *,
    num_prompts: int,
    max_len: int,
    harm_tag_id: int | None,
) -> tuple[DecodeState, Cache]:
    """An empty state and cache: every slot free."""
    asked = asked_lib.ask(
        [None] * num_prompts,
        harm_tag_id=harm_tag_id,
        max_pool=shape.num_dropped_from,
        allowed_PX=all_ids(config, shape, num_prompts),
        adjustments=[NEUTRAL] * num_prompts if isinstance(shape, Sequences) else None,
    )
    logits_PV = jax.ShapeDtypeStruct((num_prompts, config.padded_vocab_size), jnp.float32)
    state = jax.eval_shape(functools.partial(shape.start, config, max_len=max_len), asked, logits_PV)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), state)  # nothing to compile
    return zeros, forward.empty_cache(config, num_prompts * shape.num_rows, max_len)


def abstract(
    config: ModelConfig, shape: StepShape, size: tuple[int, int], **settings: Any
) -> tuple[DecodeState, Cache]:
    """The shapes of `empty_state`, of this many prompts and this length."""
    num_prompts, max_len = size
    empty = functools.partial(empty_state, config, shape, num_prompts=num_prompts, max_len=max_len, **settings)
    return jax.eval_shape(empty)


@functools.partial(jax.jit, static_argnames=("config", "shape"), donate_argnames=("state", "cache"))
def join(
    config: ModelConfig,
    shape: StepShape,
    state: DecodeState,
    cache: Cache,
    asked: Asked,
    slots_P: Int[Array, " N"],
    new_kv: Cache,
    logits_PV: Float[Array, "N V"],
    log_level_P: Float[Array, " N"] | None = None,
) -> tuple[DecodeState, Cache]:
    """Puts prompts that were read into slots; slots past the end belong to padding rows.

    Args:
      log_level_P: of the shape's monitor (`prompt_log_levels`), where it has one.
    """
    fresh = shape.start(config, asked, logits_PV, max_len=cache.max_len)
    if log_level_P is not None:
        fresh = fresh.replace(tag_log_prob_PW=jnp.broadcast_to(log_level_P[:, None], fresh.tag_log_prob_PW.shape))
    state = jax.tree.map(lambda old, new: old.at[slots_P].set(new, mode="drop"), state, fresh)
    new_kv = jax.tree.map(lambda kv: jnp.repeat(kv, shape.num_rows, axis=0), new_kv)
    return state, forward.put_rows(cache, _rows(shape, slots_P), new_kv)


def _rows(shape: StepShape, slots_P: Int[Array, " P"]) -> Int[Array, " R"]:
    return (slots_P[:, None] * shape.num_rows + jnp.arange(shape.num_rows)).reshape(-1)


@functools.partial(jax.jit, static_argnames=("shape", "max_len"))
def resize(
    shape: StepShape, state: DecodeState, cache: Cache, slots_P: Int[Array, " P"], *, max_len: int
) -> tuple[DecodeState, Cache]:
    """State and cache of only these slots, in this order, with room for `max_len` tokens.

    Slots past the end are empty.
    """
    cache = forward.take_rows(cache, _rows(shape, slots_P), max_len)
    return asked_lib.pick_rows(state, slots_P).with_room(max_len), cache


@functools.partial(jax.jit, static_argnames=("config", "shape", "num_steps"), donate_argnames=("state", "cache"))
def run(
    config: ModelConfig,
    shape: StepShape,
    weights: Weights,
    state: DecodeState,
    cache: Cache,
    is_wanted_P: Bool[Array, " P"],
    stops_early: Bool[Array, ""],
    most_steps: Int[Array, ""],
    *,
    num_steps: int,
) -> tuple[DecodeState, Cache, dict[str, Any]]:
    """Runs up to `num_steps` steps, until every prompt is over or unwanted or, with `stops_early`, until the first is.

    `most_steps` lowers their number without another program. Unwanted prompts stay as they are.

    The report holds `is_over_P`, `step_P`, `outcome` and `tried`, the candidates of beam methods by step (first axis).
    A prompt's own steps are the first ones, as many as its step count grew by.
    """
    own_asked, num_steps_now = state.asked, jnp.minimum(most_steps, num_steps)
    limits_P = jnp.where(is_wanted_P, own_asked.limits_P, 0)
    state = state.replace(asked=own_asked.replace(limits_P=limits_P))
    was_over_P = state.is_over_P
    one = jax.eval_shape(lambda *args: shape.step(config, weights, *args)[2], state, cache)
    tried = jax.tree.map(lambda leaf: jnp.zeros((num_steps, *leaf.shape), leaf.dtype), one)

    def goes_on(carry: tuple) -> Array:
        index, state, _, _ = carry
        news = stops_early & (state.is_over_P & ~was_over_P).any()
        return (index < num_steps_now) & ~state.is_over_P.all() & ~news

    def step(carry: tuple) -> tuple:
        index, state, cache, tried = carry
        state, cache, now = shape.step(config, weights, state, cache)
        return index + 1, state, cache, jax.tree.map(lambda all_, new: all_.at[index].set(new), tried, now)

    _, state, cache, tried = jax.lax.while_loop(goes_on, step, (jnp.int32(0), state, cache, tried))
    state = state.replace(asked=own_asked)
    report = {"is_over_P": state.is_over_P, "step_P": state.step_P, "outcome": state.outcome(), "tried": tried}
    return state, cache, report


@functools.partial(jax.jit, static_argnames=("config", "shape"), donate_argnames=("state", "cache"))
def jump(
    config: ModelConfig,
    shape: Sequences,
    weights: Weights,
    state: DecodeState,
    cache: Cache,
    slots_J: Int[Array, " J"],
    tokens_JT: Int[Array, "J T"],
    counts_J: Int[Array, " J"],
) -> tuple[DecodeState, Cache]:
    """`Sequences.jump`, compiled."""
    return shape.jump(config, weights, state, cache, slots_J, tokens_JT, counts_J)


def compile_read(config: ModelConfig, weights: Weights, height: int, width: int, prefix_len: int) -> None:
    """Compiles `read_prompts` before it is called, as the functions below do for theirs; `prefix_len` 0: no prefix."""
    read_prompts.lower(config, weights, *_prompts(config, height, width, prefix_len)).compile()


def compile_join(
    config: ModelConfig,
    shape: StepShape,
    weights: Weights,
    height: int,
    width: int,
    prefix_len: int,
    lane: tuple[DecodeState, Cache],
    joining: tuple[DecodeState, Cache],
) -> None:
    """Compiles `join`, from the abstract state and cache of the lane and of the `height` joining prompts."""
    read = jax.eval_shape(
        functools.partial(read_prompts, config), weights, *_prompts(config, height, width, prefix_len)
    )
    slots_P = jax.ShapeDtypeStruct((height,), jnp.int32)
    has_monitor = getattr(shape, "monitor", None) is not None
    log_levels = (jax.ShapeDtypeStruct((height,), jnp.float32),) if has_monitor else ()
    join.lower(config, shape, *lane, joining[0].asked, slots_P, *read, *log_levels).compile()


def compile_resize(shape: StepShape, lane: tuple[DecodeState, Cache], size: tuple[int, int]) -> None:
    """Compiles `resize` to this number of prompts and length."""
    resize.lower(shape, *lane, jax.ShapeDtypeStruct(size[:1], jnp.int32), max_len=size[1]).compile()


def compile_run(
    config: ModelConfig, shape: StepShape, weights: Weights, lane: tuple[DecodeState, Cache], *, num_steps: int
) -> None:
    """Compiles `run` for a lane with this state and cache."""
    is_wanted_P = jax.ShapeDtypeStruct(lane[0].step_P.shape, jnp.bool_)
    stops_early, most_steps = jax.ShapeDtypeStruct((), jnp.bool_), jax.ShapeDtypeStruct((), jnp.int32)
    run.lower(config, shape, weights, *lane, is_wanted_P, stops_early, most_steps, num_steps=num_steps).compile()


def compile_jump(
    config: ModelConfig, shape: Sequences, weights: Weights, lane: tuple[DecodeState, Cache], height: int, width: int
) -> None:
    """Compiles `jump` for `height` slots and `width` tokens."""
    tokens_JT, counts_J = _prompts(config, height, width, 0)
    jump.lower(config, shape, weights, *lane, counts_J, tokens_JT, counts_J).compile()


def _prompts(config: ModelConfig, height: int, width: int, prefix_len: int) -> tuple[Any, ...]:
    """The shapes of what `read_prompts` takes behind the weights."""
    prompts = jax.ShapeDtypeStruct((height, width), jnp.int32), jax.ShapeDtypeStruct((height,), jnp.int32)
    if not prefix_len:
        return prompts
    prefix = jax.eval_shape(functools.partial(forward.empty_cache, config, 1, prefix_len))
    return *prompts, prefix, jax.ShapeDtypeStruct((), jnp.int32)
