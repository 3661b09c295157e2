"""The device mesh, and the table from logical axis names to mesh axes.

A parameter or activation names its axes by meaning ("embed", "heads", "batch"); `LOGICAL_AXES` says over which mesh
axes each is split. Data parallel and FSDP are the main plan; "tensor" splits heads, mlp and vocab where they divide.
Run a step under `jax.set_mesh(mesh)` so that the activation constraints in the model take effect.
"""

import collections
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

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
    "rank": None,
    # Activations.
    "batch": ("data", "fsdp"),
    "lookup_batch": "data",  # where "embed" is split over fsdp as in the table
    "length": None,
    "residual": None,
}

# What decides the size of an axis that is split, to name it in an error.
MODEL_FIELDS = {
    "vocab": "the padded vocabulary",
    "embed": "model.d_model",
    "mlp": "model.d_ff",
    "heads": "model.num_heads",
    "kv_heads": "model.num_kv_heads",
}


def make_mesh(shape: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with the axes data, fsdp and tensor, in that order, in Auto mode, laid out for the devices' network.

    Over several TPU slices (devices with different `slice_index`) the data axis spans the slices, whose network is
    slow; fsdp and tensor stay inside one. Inside a slice, neighbours on an axis are neighbours in the torus.

    Args:
      shape: devices along each axis; an axis left out is 1; at most one may be -1 (whatever is left).
      devices: defaults to all devices of all processes; those of an AOT topology do as well.

    Raises:
      ValueError: an unknown axis, a size below 1, a product that is not the number of devices, or fsdp x tensor that
        does not fit into a slice.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes, slices = _axis_sizes(shape, len(devices)), _devices_by_slice(devices)
    if len(slices) == 1:
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    else:
        _check_slices(sizes, slices)
        inside, across = (sizes[0] // len(slices), *sizes[1:]), (len(slices), 1, 1)
        grid = mesh_utils.create_hybrid_device_mesh(inside, across, devices, allow_split_physical_axes=True)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def _axis_sizes(shape: Mapping[str, int], num_devices: int) -> tuple[int, ...]:
    unknown = sorted(set(shape) - set(MESH_AXES))
    if unknown:
        raise ValueError(f"mesh.{unknown[0]}: unknown mesh axis; the axes are {', '.join(MESH_AXES)}")
    sizes = [int(shape.get(axis, 1)) for axis in MESH_AXES]
    if sizes.count(-1) == 1:
        rest = math.prod(size for size in sizes if size != -1)
        sizes[sizes.index(-1)] = max(num_devices // max(rest, 1), 1)
    for axis, size in zip(MESH_AXES, sizes, strict=True):
        if size < 1:
            raise ValueError(f"mesh.{axis}={size}: a mesh axis has at least one device, or -1 for those left")
    if math.prod(sizes) != num_devices:
        raise ValueError(f"{_spelled(sizes)} needs {math.prod(sizes)} devices, but there are {num_devices}")
    return tuple(sizes)


def _spelled(sizes: Sequence[int]) -> str:
    return " x ".join(f"mesh.{axis}={size}" for axis, size in zip(MESH_AXES, sizes, strict=True))


def _devices_by_slice(devices: Sequence[Any]) -> Mapping[int, int]:
    """The number of devices of each TPU slice; other devices count as one slice, whatever joins them."""
    return collections.Counter(getattr(d, "slice_index", 0) if d.platform == "tpu" else 0 for d in devices)


def _check_slices(sizes: Sequence[int], slices: Mapping[int, int]) -> None:
    if len(set(slices.values())) > 1:
        raise ValueError(f"the slices have different numbers of devices: {dict(sorted(slices.items()))}")
    if sizes[0] % len(slices):
        per_slice = max(slices.values())
        raise ValueError(
            f"{_spelled(sizes)} over {len(slices)} slices of {per_slice} devices: mesh.data spans the slices and must "
            f"be a multiple of {len(slices)}, so that mesh.fsdp x mesh.tensor = {sizes[1] * sizes[2]} fits into a slice"
        )


def partition_spec(names: Sequence[str | None]) -> PartitionSpec:
    """The mesh axes of an array whose axes have these logical names."""
    for name in names:
        if name is not None and name not in LOGICAL_AXES:
            raise ValueError(f"unknown logical axis {name!r}; known: {', '.join(LOGICAL_AXES)}")
    return PartitionSpec(*(None if name is None else LOGICAL_AXES[name] for name in names))


def _num_shards(mesh_shape: Mapping[str, int], axes: str | tuple[str, ...] | None) -> int:
    if axes is None:
        return 1
    return math.prod(mesh_shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes))


def num_shards(name: str) -> int:
    """The number of parts into which `jax.set_mesh`'s mesh splits an axis with this logical name; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else _num_shards(mesh.shape, activation_spec((name,))[0])


def activation_spec(names: Sequence[str | None]) -> PartitionSpec:
    """`partition_spec` without the axes that `jax.shard_map` has split already around here."""
    manual = set(jax.sharding.get_abstract_mesh().manual_axes)

    def left(axes: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        if isinstance(axes, tuple):
            return tuple(axis for axis in axes if axis not in manual) or None
        return None if axes in manual else axes

    return PartitionSpec(*map(left, partition_spec(names)))


def is_names(leaf: object) -> bool:
    """Whether this is a leaf of a tree of logical axes: a tuple of their names."""
    return isinstance(leaf, tuple)


def param_shardings(mesh: Mesh | AbstractMesh, logical_axes: PyTree, shapes: PyTree | None = None) -> PyTree:
    """A `NamedSharding` for every leaf of `logical_axes` (a tree whose leaves are tuples of names).

    Args:
      shapes: a tree of the same structure with arrays or `ShapeDtypeStruct`s (`model.abstract_params`); when given,
        every dimension is checked.

    Raises:
      ValueError: a mesh axis does not divide the axes it splits; the message names the model's fields and sizes that
        would do.
    """
    shardings = jax.tree.map(lambda names: NamedSharding(mesh, partition_spec(names)), logical_axes, is_leaf=is_names)
    if shapes is not None:
        sizes: dict[str, set[int]] = collections.defaultdict(set)
        for names, leaf in zip(jax.tree.leaves(logical_axes, is_leaf=is_names), jax.tree.leaves(shapes), strict=True):
            for name, size in zip(names, leaf.shape, strict=True):
                sizes[name].add(size)
        _check_divides(mesh, sizes)
    return shardings


def _check_divides(mesh: Mesh | AbstractMesh, sizes: Mapping[str, set[int]]) -> None:
    """`sizes` are those of every logical axis in the parameters."""
    for mesh_axis, shards in mesh.shape.items():
        split = [name for name, axes in LOGICAL_AXES.items() if axes == mesh_axis and name in sizes]
        uneven = [name for name in split if any(size % shards for size in sizes[name])]
        if uneven:
            spelled = ", ".join(f"{MODEL_FIELDS[name]}={'/'.join(map(str, sorted(sizes[name])))}" for name in uneven)
            common = math.gcd(*(size for name in split for size in sizes[name]))
            fit = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
            raise ValueError(f"mesh.{mesh_axis}={shards} does not divide {spelled}: for this model it can be {fit}")


def batch_sharding(mesh: Mesh | AbstractMesh, batch_size: int | None = None) -> NamedSharding:
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
    held: dict[int, set[tuple[int, int, int]]] = collections.defaultdict(set)
    for device, index in batch.devices_indices_map((batch_size,)).items():
        held[device.process_index].add(index[0].indices(batch_size))
    num_rows = {sum(stop - start for start, stop, _ in parts) for parts in held.values()}
    if num_rows != {batch_size // len(held)}:
        raise ValueError(
            f"mesh.tensor={mesh.shape['tensor']}: a process holds {max(num_rows)} of {batch_size} rows of a batch, it "
            f"must be one of {len(held)} equal shares: the tensor axis can't reach over processes"
        )
    return batch


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """The same value on every device."""
    return NamedSharding(mesh, PartitionSpec())


def constrain(x: jax.Array, names: Sequence[str | None]) -> jax.Array:
    """Pins an activation to the table under `jax.set_mesh`; a no-op without a mesh or where an axis does not divide.

    So it is inside `jax.shard_map`, where each device has its own rows.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or mesh.are_all_axes_manual:
        return x
    pairs = zip(x.shape, activation_spec(names), strict=True)
    kept = [axes if size % _num_shards(mesh.shape, axes) == 0 else None for size, axes in pairs]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*kept))


def splits_parameters() -> bool:
    """Whether FSDP is on, so that `gather` has an effect."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.shape.get("fsdp", 1) > 1


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def gather(x: jax.Array, names: tuple[str, ...]) -> jax.Array:
    """A parameter with its FSDP shards brought together for a product; its gradient is scattered again.

    Left to itself, XLA for TPUs turns such a product into a loop over the shards, each a slice of what is summed over:
    a sixteenth of SmolLM2-1.7B's 2048 is far too thin for the matrix unit, and every round reads and writes all of the
    result. Compiled for v5e:4x4 (`safelm.aot`, remat dots, 32 micro-batches of 2 rows a chip), the step's estimate was
    10.8 s at best and 26.5 s by the compiler's cycle counts; gathered first, it is 9.5 s and 17.8 s.
    """
    return _gathered(x, names)


def _gathered(x: jax.Array, names: tuple[str, ...]) -> jax.Array:
    return constrain(x, [None if LOGICAL_AXES[name] == "fsdp" else name for name in names])


def _gather_forward(x: jax.Array, names: tuple[str, ...]) -> tuple[jax.Array, None]:
    return _gathered(x, names), None  # not by `gather`: remat policies see what is in here


def _gather_backward(names: tuple[str, ...], _: None, grad: jax.Array) -> tuple[jax.Array]:
    return (constrain(grad, names),)


gather.defvjp(_gather_forward, _gather_backward)
