"""The compiled programs of the engine, in few shapes.

Every program takes all of a method's settings as numbers. Shapes come from few buckets: the number of tokens
read together, the number of prompts decoded together, and the length of their cache.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from safelm.inference import asked as asked_lib
from safelm.inference import chunks, forward, kv_cache, token_mask
from safelm.inference.adjustments import NEUTRAL
from safelm.inference.asked import Asked
from safelm.inference.beam import Beams
from safelm.inference.beams import BeamState
from safelm.inference.chunks import Chunk
from safelm.inference.kv_cache import Cache
from safelm.inference.methods import Beam, Method, SafeBeam, TagPenalty
from safelm.inference.monitors import Monitor
from safelm.inference.monitors.reading import log_level_behind
from safelm.inference.safe_beam import SafeBeams
from safelm.inference.sampling import Sequences, SequenceState
from safelm.inference.weights import Weights
from safelm.models.config import ModelConfig

FIRST_ROOM = 8  # tokens of a state just started
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


read_chunk = jax.jit(chunks.read_chunk, static_argnames=("config",))


@functools.partial(jax.jit, static_argnames=("max_len",))
def extend(
    behind: Cache | None, new_kv: Cache, is_own_T: Bool[Array, " T"], positions_T: Int[Array, " T"], *, max_len: int
) -> Cache:
    """One row of `max_len` positions: what stands behind, and those of a chunk's tokens that `is_own_T`."""
    positions_T = jnp.where(is_own_T, positions_T, max_len)
    row = jnp.zeros((1,), jnp.int32)
    if behind is None:
        behind = jax.tree.map(lambda kv: jnp.zeros((1, kv.shape[1], max_len, kv.shape[3]), kv.dtype), new_kv)
    return kv_cache.put_tokens(
        kv_cache.take_rows(behind, row, max_len), new_kv, jnp.zeros((len(positions_T), 1), jnp.int32), positions_T
    )


@functools.partial(jax.jit, static_argnames=("shape",), donate_argnames=("cache",))
def put_behind(shape: StepShape, cache: Cache, slot: Int[Array, ""], behind: Cache) -> Cache:
    """The lane's cache with one row's keys and values at the beginning of all rows of a slot."""

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        new = jnp.repeat(new[:, :, : old.shape[2]].astype(old.dtype), shape.num_rows, axis=0)
        return jax.lax.dynamic_update_slice(old, new, (slot * shape.num_rows, 0, 0, 0))

    return jax.tree.map(put, cache, behind)


@functools.partial(jax.jit, static_argnames=("shape", "max_len"))
def take_slot(shape: StepShape, cache: Cache, slot: Int[Array, ""], *, max_len: int) -> Cache:
    """A copy of a slot's first row, cut or padded to `max_len` positions."""
    return kv_cache.take_rows(cache, (slot * shape.num_rows)[None], max_len)


@jax.jit
def log_probs_of(logits_PV: Float[Array, "P V"], ids_PI: Int[Array, "P I"]) -> Float[Array, "P I"]:
    """Each prompt's log-probs of some ids as the next one, over the whole vocabulary."""
    return jnp.take_along_axis(jax.nn.log_softmax(logits_PV, axis=-1), ids_PI, axis=1)


def _log_levels(
    config: ModelConfig,
    monitor: Monitor,
    weights: Weights,
    cache: Cache,
    lengths_G: Int[Array, " G"],
    last_tokens_G: Int[Array, " G"],
    logits_GV: Float[Array, "G V"],
) -> Float[Array, " G"]:
    """The log of the monitor's level after every prompt, from the rows of their cache and their last tokens."""
    if monitor.header_ids:
        return log_level_behind(config, weights, monitor, cache, lengths_G)
    if monitor.layer is None:
        return monitor.log_level(logits_GV)
    before_G = jnp.maximum(lengths_G - 1, 0)
    last_G1 = last_tokens_G[:, None]
    _, _, read_G1D = forward.read_behind_tapped(config, weights, last_G1, cache, before_G, monitor.layer)
    return monitor.log_level(read_G1D[:, 0])


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
    return zeros, kv_cache.empty_cache(config, num_prompts * shape.num_rows, max_len)


def abstract(
    config: ModelConfig, shape: StepShape, size: tuple[int, int], **settings: Any
) -> tuple[DecodeState, Cache]:
    """The shapes of `empty_state`, of this many prompts and this length."""
    num_prompts, max_len = size
    empty = functools.partial(empty_state, config, shape, num_prompts=num_prompts, max_len=max_len, **settings)
    return jax.eval_shape(empty)


@functools.partial(jax.jit, static_argnames=("config", "shape"))
def start(config: ModelConfig, shape: StepShape, asked: Asked, logits_GV: Float[Array, "G V"]) -> DecodeState:
    """The state of prompts just read, with room for few tokens: one program for lanes of all sizes."""
    fresh = shape.start(config, asked, logits_GV, max_len=FIRST_ROOM)
    return jax.tree.map(lambda leaf: jax.lax.convert_element_type(leaf, leaf.dtype), fresh)  # no weak types


@functools.partial(jax.jit, static_argnames=("config", "shape"), donate_argnames=("state", "cache"))
def place(
    config: ModelConfig,
    shape: StepShape,
    weights: Weights,
    state: DecodeState,
    cache: Cache,
    fresh: DecodeState,
    slots_G: Int[Array, " G"],
    chunk: Chunk,
    slots_T: Int[Array, " T"],
    new_kv: Cache,
    logits_GV: Float[Array, "G V"],
) -> tuple[DecodeState, Cache]:
    """Puts a chunk's tokens and the prompts that end in it (`start`) into slots; slots past the end are none.

    What stands behind them must be in the slots already (`put_behind`). Weights are for a shape with a monitor.
    """
    rows_TW = (jnp.asarray(slots_T)[:, None] * shape.num_rows) + jnp.arange(shape.num_rows)
    positions_T = jnp.asarray(chunk.positions_T)
    cache = kv_cache.put_tokens(cache, new_kv, rows_TW, positions_T, is_native=weights.is_packed)
    fresh = fresh.with_room(cache.max_len)
    if (monitor := getattr(shape, "monitor", None)) is not None:
        rows = kv_cache.take_rows(cache, slots_G * shape.num_rows)
        last_tokens_G = jnp.asarray(chunk.tokens_T)[jnp.asarray(chunk.last_G)]
        level_G = _log_levels(config, monitor, weights, rows, fresh.asked.prompt_lengths_P, last_tokens_G, logits_GV)
        fresh = fresh.replace(tag_log_prob_PW=jnp.broadcast_to(level_G[:, None], fresh.tag_log_prob_PW.shape))
    return jax.tree.map(lambda old, new: old.at[slots_G].set(new, mode="drop"), state, fresh), cache


def _rows(shape: StepShape, slots_P: Int[Array, " P"]) -> Int[Array, " R"]:
    return (slots_P[:, None] * shape.num_rows + jnp.arange(shape.num_rows)).reshape(-1)


@functools.partial(jax.jit, static_argnames=("shape", "max_len"))
def resize(
    shape: StepShape, state: DecodeState, cache: Cache, slots_P: Int[Array, " P"], *, max_len: int
) -> tuple[DecodeState, Cache]:
    """State and cache of only these slots, in this order, with room for `max_len` tokens.

    Slots past the end are empty.
    """
    cache = kv_cache.take_rows(cache, _rows(shape, slots_P), max_len)
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

    The report holds `is_over_P`, `step_P`, `num_final_P` (of the outcome's tokens, those that stay), `outcome` and
    `tried`, the candidates of beam methods by step (first axis).
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
    report = {"is_over_P": state.is_over_P, "step_P": state.step_P, "num_final_P": state.num_final_P}
    report |= {"outcome": state.outcome(), "tried": tried}
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


def compile_read(config: ModelConfig, weights: Weights, num_tokens: int, behind_len: int) -> None:
    """Compiles `read_chunk` before it is called, as the functions below do for theirs; `behind_len` 0: none."""
    behind = (_row(config, behind_len), jax.ShapeDtypeStruct((), jnp.int32)) if behind_len else ()
    read_chunk.lower(config, weights, _chunk(num_tokens), *behind).compile()


def compile_extend(config: ModelConfig, num_tokens: int, behind_len: int, max_len: int) -> None:
    """Compiles `extend`."""
    behind, is_own_T = _row(config, behind_len) if behind_len else None, jax.ShapeDtypeStruct((num_tokens,), jnp.bool_)
    extend.lower(behind, _row(config, num_tokens), is_own_T, _ids(num_tokens), max_len=max_len).compile()


def compile_put_behind(config: ModelConfig, shape: StepShape, cache: Cache, behind_len: int) -> None:
    """Compiles `put_behind` for a lane with this cache."""
    put_behind.lower(shape, cache, _ids(), _row(config, behind_len)).compile()


def compile_take_slot(shape: StepShape, cache: Cache, max_len: int) -> None:
    """Compiles `take_slot`."""
    take_slot.lower(shape, cache, _ids(), max_len=max_len).compile()


def compile_start(config: ModelConfig, shape: StepShape, joining: DecodeState) -> None:
    """Compiles `start`, from the abstract state of as many prompts."""
    start.lower(config, shape, joining.asked, _logits(config, len(joining.step_P))).compile()


def compile_place(
    config: ModelConfig,
    shape: StepShape,
    weights: Weights,
    lane: tuple[DecodeState, Cache],
    joining: DecodeState,
    num_tokens: int,
) -> None:
    """Compiles `place`, from the abstract state and cache of the lane and the state of prompts in a chunk."""
    num_prompts = chunks.prompts_in(num_tokens)
    of_chunk = (_ids(num_prompts), _chunk(num_tokens), _ids(num_tokens), _row(config, num_tokens))
    place.lower(config, shape, weights, *lane, joining, *of_chunk, _logits(config, num_prompts)).compile()


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
    jump.lower(config, shape, weights, *lane, _ids(height), _ids(height, width), _ids(height)).compile()


def _ids(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def _logits(config: ModelConfig, num_prompts: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((num_prompts, config.padded_vocab_size), jnp.float32)


def _row(config: ModelConfig, max_len: int) -> Cache:
    return jax.eval_shape(functools.partial(kv_cache.empty_cache, config, 1, max_len))


def _chunk(num_tokens: int) -> Chunk:
    is_behind_T = jax.ShapeDtypeStruct((num_tokens,), jnp.bool_)
    of_tokens = (_ids(num_tokens) for _ in range(3))
    return Chunk(*of_tokens, is_behind_T, _ids(chunks.prompts_in(num_tokens)))
