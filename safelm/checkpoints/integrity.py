"""Verifies that a checkpoint is unchanged since it was written, on any mesh.

Neither Orbax nor tensorstore notices every flipped bit or missing chunk (a missing chunk reads as zeros). So `meta` has
a fingerprint of every array, computed on the devices before the save and again after a restore, and a checksum of
itself. A fingerprint is two sums over all elements, modulo 2^32, of hashes of an element's bits and its place: whole
numbers, so the order of the additions, and with it the sharding, changes nothing.
"""

import functools
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree, UInt32

CHECKSUM = "checksum"  # the field of `meta` that holds the hash of the others


class CorruptCheckpointError(OSError):
    """A checkpoint that exists but can't be read, or was changed since it was written."""


def fingerprints(tree: PyTree) -> dict[str, str]:
    """Dtype and sixteen hex digits by the path of every array; equal on any mesh, and different if any bit is."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    # One at a time: sums over several hosts that are under way together may wait for each other for ever on CPUs.
    sums = [jax.device_get(_fingerprint_of(leaf)(leaf)) for _, leaf in leaves]
    return {
        path_name(path): f"{leaf.dtype}:{first:08x}{second:08x}"
        for (path, leaf), (first, second) in zip(leaves, sums, strict=True)
    }


def check_fingerprints(tree: PyTree, wanted: Mapping[str, str], *, where: str) -> None:
    """Raises CorruptCheckpointError naming the first array that was changed since it was written.

    Arrays read with another dtype, or without a fingerprint, pass.
    """
    for name, found in fingerprints(tree).items():
        there = wanted.get(name, found)
        if there != found and there.split(":")[0] == found.split(":")[0]:
            raise CorruptCheckpointError(f"{where}: {name} is not what was written ({there}, read {found})")


def seal(meta: Mapping[str, Any]) -> dict[str, Any]:
    """The record with its own checksum added."""
    return {**meta, CHECKSUM: _checksum(meta)}


def check_seal(meta: Mapping[str, Any], *, where: str) -> None:
    """Raises CorruptCheckpointError if the record doesn't match its checksum; one without a checksum passes."""
    if CHECKSUM in meta and meta[CHECKSUM] != _checksum(meta):
        raise CorruptCheckpointError(f"{where}: its meta does not match its checksum")


def path_name(path: tuple[Any, ...]) -> str:
    """A leaf's path in a tree as one string, with slashes."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _checksum(meta: Mapping[str, Any]) -> str:
    content = json.dumps({name: value for name, value in meta.items() if name != CHECKSUM}, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _fingerprint_of(leaf: jax.Array | np.ndarray):
    where = getattr(leaf, "sharding", None)
    return _compiled(where.mesh if isinstance(where, NamedSharding) else None)


@functools.cache
def _compiled(mesh: Mesh | None):
    # Every process needs the sums, so they are on every device.
    return jax.jit(_sums, out_shardings=None if mesh is None else NamedSharding(mesh, PartitionSpec()))


def _sums(x: Array) -> tuple[UInt32[Array, ""], UInt32[Array, ""]]:
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis in range(x.ndim):
        place = place * jnp.uint32(x.shape[axis] % 2**32) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    mixed = _mix(bits ^ _mix(place + jnp.uint32(0x9E3779B9)))
    return jnp.sum(mixed, dtype=jnp.uint32), jnp.sum(_mix(mixed + jnp.uint32(0x85EBCA6B)), dtype=jnp.uint32)


def _mix(h: Array) -> Array:
    """A permutation of the 32-bit numbers, so that any changed element changes its term (murmur3's finalizer)."""
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> 16)
