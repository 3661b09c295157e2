"""The cache of decoding and what is written to it, as pure functions under `jit`.

A cache has R rows of S positions; every prompt has one row per beam. Layers have separate arrays, so that nothing is
sliced or stacked; keys and values are laid out by head, as the products of attention read them. Axes: see
`safelm.inference.asked`.
"""

import flax
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from safelm.inference.placement import CACHE_AXES
from safelm.inference.weights import Weights
from safelm.models import cpu_kernels, sharding
from safelm.models.arrays import Leaf
from safelm.models.config import ModelConfig


@flax.struct.dataclass
class Cache:
    """Keys (already rotated) and values, [R, K, S, H] for every layer, in `config.dtype`."""

    keys: tuple[Leaf, ...]
    values: tuple[Leaf, ...]

    @property
    def max_len(self) -> int:
        return self.keys[0].shape[2]


def empty_cache(config: ModelConfig, num_rows: int, max_len: int) -> Cache:
    """A cache of zeros."""
    shape = (num_rows, config.num_kv_heads, max_len, config.head_dim)
    layers = range(config.num_layers)
    return _placed(Cache(*(tuple(jnp.zeros(shape, config.dtype) for _ in layers) for _ in range(2))))


def _placed(cache: Cache) -> Cache:
    return jax.tree.map(lambda kv: sharding.constrain(kv, CACHE_AXES), cache)


def write_next(
    cache: Cache,
    new_kv: Cache,
    choice_R: Int[Array, " R"],
    lengths_R: Int[Array, " R"],
    *,
    is_native: bool = False,
) -> Cache:
    """Writes each row's chosen alternative after its cached tokens; past the end of the cache nothing is written.

    `is_native`, here and below: by the C++ kernels, in place. XLA's CPU compiler scatters bfloat16 through float32,
    which turns the whole cache around twice.
    """
    rows_R = jnp.arange(len(lengths_R))
    chosen = jax.tree.map(lambda new_RKCH: new_RKCH[rows_R, :, choice_R], new_kv)
    return _put(cache, chosen, rows_R, lengths_R, is_native)


def _put(cache: Cache, tokens: Cache, rows_A: Int[Array, "*A"], places_A: Int[Array, "*A"], is_native: bool) -> Cache:
    """The cache with tokens [*A, K, H] at these rows and positions; those past its end are dropped."""
    tokens = jax.tree.map(lambda old, new: new.astype(old.dtype), cache, tokens)
    if not is_native:
        written = jax.tree.map(
            lambda old_RKSH, new_AKH: old_RKSH.at[rows_A, :, places_A].set(new_AKH, mode="drop"), cache, tokens
        )
        return _placed(written)
    flat = (each.reshape(-1, *each.shape[-2:]) for each in (*tokens.keys, *tokens.values))
    caches, layers = [*cache.keys, *cache.values], len(cache.keys)
    written = cpu_kernels.put_tokens(caches, list(flat), rows_A.reshape(-1), places_A.reshape(-1))
    return Cache(tuple(written[:layers]), tuple(written[layers:]))


def write_next_by_row(cache: Cache, new_kv: Cache, choice_R: Int[Array, " R"], lengths_R: Int[Array, " R"]) -> Cache:
    """`write_next` with a slice for every row. TPUs lay positions out last, and for a scatter they would transpose the
    whole cache and transpose it back."""

    def write_row(row: Array, cache: Cache) -> Cache:
        length, last = lengths_R[row], cache.max_len - 1

        def write(old_RKSH: Array, new_RKCH: Array) -> Array:
            start, size = (row, 0, jnp.minimum(length, last), 0), (1, old_RKSH.shape[1], 1, old_RKSH.shape[3])
            own = jax.lax.dynamic_slice(old_RKSH, start, size)
            new = jax.lax.dynamic_slice(new_RKCH, (row, 0, choice_R[row], 0), size)
            return jax.lax.dynamic_update_slice(old_RKSH, jnp.where(length <= last, new, own), start)

        return jax.tree.map(write, cache, new_kv)

    return _placed(jax.lax.fori_loop(0, len(lengths_R), write_row, cache))


def write_behind(
    cache: Cache,
    new_kv: Cache,
    lengths_R: Int[Array, " R"],
    rows_R: Int[Array, " R"] | None = None,
    *,
    is_native: bool = False,
) -> Cache:
    """Writes new tokens after the cached ones of `rows_R` (None: every row); nothing past the end of the cache."""
    rows_R1 = (jnp.arange(len(lengths_R)) if rows_R is None else rows_R)[:, None]
    columns_RT = lengths_R[:, None] + jnp.arange(new_kv.max_len)
    tokens = jax.tree.map(lambda new_RKTH: new_RKTH.swapaxes(1, 2), new_kv)
    return _put(cache, tokens, jnp.broadcast_to(rows_R1, columns_RT.shape), columns_RT, is_native)


def put_tokens(
    cache: Cache,
    new_kv: Cache,
    rows_TW: Int[Array, "T W"],
    positions_T: Int[Array, " T"],
    *,
    is_native: bool = False,
) -> Cache:
    """Writes the tokens of one row each into W rows of a cache, at their positions; past its end nothing."""

    def wide(new_1KTH: Array) -> Array:
        new_TKH = new_1KTH[0].swapaxes(0, 1)
        return jnp.broadcast_to(new_TKH[:, None], (*rows_TW.shape, *new_TKH.shape[1:]))

    places_TW = jnp.broadcast_to(positions_T[:, None], rows_TW.shape)
    return _put(cache, jax.tree.map(wide, new_kv), rows_TW, places_TW, is_native)


def take_rows(cache: Cache, rows: Int[Array, " R"], max_len: int | None = None) -> Cache:
    """These rows of a cache, cut or padded to `max_len` positions; rows past the end are zeros."""

    def take(kv: jax.Array) -> jax.Array:
        missing = max(0, (max_len or 0) - kv.shape[2])
        kv = jnp.take(kv[:, :, :max_len], rows, axis=0, mode="fill", fill_value=0)
        return jnp.pad(kv, ((0, 0), (0, 0), (0, missing), (0, 0))) if missing else kv

    return _placed(jax.tree.map(take, cache))


def follow_beams(
    config: ModelConfig,
    weights: Weights,
    cache: Cache,
    rows_R: Int[Array, " R"],
    prompt_lengths_R: Int[Array, " R"],
    lengths_R: Int[Array, " R"],
) -> Cache:
    """Every row's cache as that of `rows_R`, a beam of the same prompt, was; of its first `lengths_R` tokens."""
    if not weights.is_packed:
        return take_rows(cache, rows_R)
    moved = cpu_kernels.follow_beams([*cache.keys, *cache.values], rows_R, prompt_lengths_R, lengths_R)
    return Cache(tuple(moved[: len(cache.keys)]), tuple(moved[len(cache.keys) :]))
