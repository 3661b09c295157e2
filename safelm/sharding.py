"""The device mesh and the table from logical axis names to mesh axes: the only place that knows both.

A parameter or activation names its axes by meaning ("embed", "heads", "batch"); `LOGICAL_AXES` says over which mesh
axes each is split. Data parallel and FSDP are the main plan; "tensor" splits heads, mlp and vocab where they divide.
Run a step under `jax.set_mesh(mesh)` so that the activation constraints in the model take effect.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor")

LOGICAL_AXES: dict[str, str | tuple[str, ...] | None] = {
    # Parameters.
    "layers": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "mlp": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "norm": None,
    # Activations.
    "batch": ("data", "fsdp"),
    "length": None,
    "residual": None,
}


def make_mesh(shape: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes data, fsdp and tensor, in that order, in Auto mode.

    Args:
      shape: devices along each axis; an axis left out is 1; at most one may be -1 (whatever is left).
      devices: defaults to all devices of all processes.

    Raises:
      ValueError: an unknown axis, a size below 1, or a product that is not the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    unknown = sorted(set(shape) - set(MESH_AXES))
    if unknown:
        raise ValueError(f"mesh.{unknown[0]}: unknown mesh axis; the axes are {', '.join(MESH_AXES)}")
    sizes = [int(shape.get(axis, 1)) for axis in MESH_AXES]
    if sizes.count(-1) == 1:
        rest = int(np.prod([size for size in sizes if size != -1]))
        sizes[sizes.index(-1)] = max(len(devices) // max(rest, 1), 1)
    for axis, size in zip(MESH_AXES, sizes, strict=True):
        if size < 1:
            raise ValueError(f"mesh.{axis}={size}: a mesh axis has at least one device")
    if int(np.prod(sizes)) != len(devices):
        spelled = " x ".join(f"mesh.{axis}={size}" for axis, size in zip(MESH_AXES, sizes, strict=True))
        raise ValueError(f"{spelled} needs {int(np.prod(sizes))} devices, but there are {len(devices)}")
    return jax.make_mesh(tuple(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def partition_spec(names: Sequence[str | None]) -> PartitionSpec:
    """The mesh axes of an array whose axes have these logical names."""
    for name in names:
        if name is not None and name not in LOGICAL_AXES:
            raise ValueError(f"unknown logical axis {name!r}; known: {', '.join(LOGICAL_AXES)}")
    return PartitionSpec(*(None if name is None else LOGICAL_AXES[name] for name in names))


def _num_shards(mesh_shape: Mapping[str, int], axes: str | tuple[str, ...] | None) -> int:
    if axes is None:
        return 1
    return int(np.prod([mesh_shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes)]))


def param_shardings(mesh: Mesh, logical_axes: Any, shapes: Any | None = None) -> Any:
    """A `NamedSharding` for every leaf of `logical_axes` (a tree whose leaves are tuples of names).

    Args:
      shapes: a tree of the same structure with arrays or `ShapeDtypeStruct`s (`model.abstract_params`); when given,
        every dimension is checked.

    Raises:
      ValueError: a dimension that its mesh axes do not divide, named with the parameter's path.
    """
    is_names = lambda leaf: isinstance(leaf, tuple)  # noqa: E731
    if shapes is not None:
        jax.tree_util.tree_map_with_path(
            lambda path, names, leaf: _check_divides(mesh, jax.tree_util.keystr(path), names, leaf.shape),
            logical_axes,
            shapes,
            is_leaf=is_names,
        )
    return jax.tree.map(lambda names: NamedSharding(mesh, partition_spec(names)), logical_axes, is_leaf=is_names)


def _check_divides(mesh: Mesh, path: str, names: Sequence[str | None], shape: Sequence[int]) -> None:
    for name, size, axes in zip(names, shape, partition_spec(names), strict=True):
        shards = _num_shards(mesh.shape, axes)
        if size % shards:
            raise ValueError(f"mesh.{axes}={shards} does not divide axis {name!r} of parameter {path}: size {size}")


def batch_sharding(mesh: Mesh, batch_size: int | None = None) -> NamedSharding:
    """Rows of a batch split over data and fsdp; works for every array whose first axis is the batch.

    Raises:
      ValueError: `batch_size` (sequences, global) is not a multiple of the number of shards, or several processes
        would hold the same rows (each reads only its own share).
    """
    shards = _num_shards(mesh.shape, LOGICAL_AXES["batch"])
    batch = NamedSharding(mesh, partition_spec(("batch",)))
    if batch_size is None:
        return batch
    if batch_size % shards:
        raise ValueError(f"batch_size={batch_size} is not a multiple of mesh.data x mesh.fsdp = {shards}")
    held = {index[0].indices(batch_size) for index in batch.addressable_devices_indices_map((batch_size,)).values()}
    num_held, processes = sum(stop - start for start, stop, _ in held), jax.process_count()
    if num_held and num_held * processes != batch_size:
        raise ValueError(
            f"mesh.tensor={mesh.shape['tensor']}: a process holds {num_held} of {batch_size} rows of a batch, it must "
            f"be one of {processes} equal shares: the tensor axis can't reach over processes"
        )
    return batch


def replicated(mesh: Mesh) -> NamedSharding:
    """The same value on every device."""
    return NamedSharding(mesh, PartitionSpec())


def constrain(x: jax.Array, names: Sequence[str | None]) -> jax.Array:
    """Pins an activation to the table under `jax.set_mesh`; a no-op without a mesh or where an axis does not divide."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    spec = partition_spec(names)
    pairs = zip(x.shape, spec, strict=True)
    kept = [axes if size % _num_shards(mesh.shape, axes) == 0 else None for size, axes in pairs]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*kept))
