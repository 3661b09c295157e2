"""Caches that follow their beams, in place. Axes: see `safelm.inference.asked`."""

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
    outputs = [jax.ShapeDtypeStruct(cache.shape, cache.dtype) for cache in caches]
    in_place = {3 + place: place for place in range(len(caches))}
    call = jax.ffi.ffi_call(building.target("follow_beams"), outputs, input_output_aliases=in_place)
    rows = (jnp.asarray(array, jnp.int32) for array in (parents_R, starts_R, ends_R))
    return list(call(*rows, *caches))
