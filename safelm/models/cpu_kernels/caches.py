"""Caches that follow their beams and that tokens are written to, in place. Axes: see `safelm.inference.asked`."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from safelm.models.arrays import ArrayLike
from safelm.models.cpu_kernels import building


def follow_beams(
    caches: Sequence[Float[ArrayLike, "R K S H"]],
    parents_R: Int[ArrayLike, " R"],
    starts_R: Int[ArrayLike, " R"],
    ends_R: Int[ArrayLike, " R"],
) -> list[Float[Array, "R K S H"]]:
    """Every row as its parent's was, from position `starts_R` to `ends_R`; the rest stays.

    The rows of a prompt's beams are alike before `starts_R`, its length, and nothing stands behind `ends_R`.
    """
    return _in_place("follow_beams", caches, (parents_R, starts_R, ends_R))


def put_tokens(
    caches: Sequence[Float[ArrayLike, "R K S H"]],
    tokens: Sequence[Float[ArrayLike, "M K H"]],
    rows_M: Int[ArrayLike, " M"],
    places_M: Int[ArrayLike, " M"],
) -> list[Float[Array, "R K S H"]]:
    """The caches with M tokens written to these rows and positions; those past an end are dropped.

    Args:
      tokens: as many arrays as caches, of their dtypes.
    """
    return _in_place("put_tokens", caches, (rows_M, places_M), tokens)


def _in_place(
    name: str, caches: Sequence[ArrayLike], rows: Sequence[ArrayLike], others: Sequence[ArrayLike] = ()
) -> list[Array]:
    outputs = [jax.ShapeDtypeStruct(cache.shape, cache.dtype) for cache in caches]
    in_place = {len(rows) + place: place for place in range(len(caches))}
    call = jax.ffi.ffi_call(building.target(name), outputs, input_output_aliases=in_place)
    return list(call(*(jnp.asarray(array, jnp.int32) for array in rows), *caches, *others))
