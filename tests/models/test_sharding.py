"""Meshes over one slice and several, and the errors for those that don't fit the devices, the heads or the batch."""

import dataclasses
import os

import jax
import numpy as np
import pytest

from safelm.models import decoder as model
from safelm.models import sharding
from safelm.models.decoder import ModelConfig


@dataclasses.dataclass(frozen=True)
class FakeChip:
    """What a mesh asks of a TPU device."""

    id: int
    slice_index: int
    coords: tuple[int, int, int]
    platform: str = "tpu"
    device_kind: str = "TPU v4"
    core_on_chip: int = 0
    process_index: int = 0


def chips(num_slices: int, rows: int = 2, columns: int = 4) -> list[FakeChip]:
    """Slices of rows x columns chips, mixed up."""
    grid = [(s, r, c) for c in range(columns) for s in range(num_slices) for r in range(rows)]
    return [FakeChip(i, s, (r, c, 0)) for i, (s, r, c) in enumerate(grid)]


def sizes(num_heads: int, num_kv_heads: int, d_model: int, d_ff: int) -> ModelConfig:
    return ModelConfig(49_153, 2, d_model, d_ff, num_heads, num_kv_heads, head_dim=64)


def slice_indices(mesh) -> np.ndarray:
    return np.vectorize(lambda device: getattr(device, "slice_index", 0))(mesh.devices)


@pytest.mark.parametrize(
    ("num_slices", "shape"),
    [
        (2, {"data": 2, "fsdp": 8}),
        (2, {"data": -1, "fsdp": 4, "tensor": 2}),
        (2, {"data": 8, "fsdp": 2}),
        (4, {"data": 4, "fsdp": 8}),
        (4, {"data": 8, "fsdp": 2, "tensor": 2}),
        (3, {"data": 3, "fsdp": 4, "tensor": 2}),
    ],
)
def test_only_data_spans_slices(num_slices, shape):
    devices = chips(num_slices)
    mesh = sharding.make_mesh(shape, devices=devices)
    assert {device.id for device in mesh.devices.flat} == set(range(len(devices)))
    along_data = slice_indices(mesh)
    assert (along_data == along_data[:, :1, :1]).all()  # fsdp and tensor stay inside a slice
    rows_of_slice = np.unique(along_data[:, 0, 0], return_counts=True)
    assert rows_of_slice[0].tolist() == list(range(num_slices)) and len(set(rows_of_slice[1])) == 1


def test_neighbours_in_the_torus_are_neighbours_on_an_axis():
    mesh = sharding.make_mesh({"data": 2, "fsdp": 4}, devices=chips(1))
    rows, columns = (np.vectorize(lambda device, k=k: device.coords[k])(mesh.devices)[..., 0] for k in (0, 1))
    assert (rows == rows[:, :1]).all() and (columns == columns[:1]).all()


@pytest.mark.parametrize(
    ("devices", "shape", "message"),
    [
        (chips(2), {"fsdp": 16}, r"mesh.data=1 x mesh.fsdp=16 x mesh.tensor=1 over 2 slices of 8 .* multiple of 2"),
        (chips(2), {"fsdp": 8, "tensor": 2}, r"mesh.fsdp x mesh.tensor = 16 fits into a slice"),
        (chips(4), {"data": 2, "fsdp": 16}, r"mesh.data spans the slices and must be a multiple of 4"),
        (chips(2)[:-1], {"data": -1}, r"slices have different numbers of devices: \{0: 8, 1: 7\}"),
        (chips(2), {"data": 2, "fsdp": 4}, r"needs 8 devices, but there are 16"),
        (chips(1), {"data": -1, "fsdp": 3}, r"mesh.data=2 x mesh.fsdp=3 x mesh.tensor=1 needs 6 devices, .* are 8"),
        (chips(1), {"data": -1, "fsdp": -1}, r"mesh.data=-1: a mesh axis has at least one device"),
    ],
)
def test_meshes_that_do_not_fit_the_devices_are_refused(devices, shape, message):
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(shape, devices=devices)


@pytest.mark.parametrize(
    ("config", "shape", "message"),
    [
        (
            sizes(9, 3, 576, 1536),
            {"tensor": 2, "fsdp": 4},
            r"mesh.tensor=2 does not divide model.num_heads=9, model.num_kv_heads=3: for this model it can be 1$",
        ),
        (
            sizes(15, 5, 960, 2560),
            {"tensor": 4, "data": 2},
            r"mesh.tensor=4 does not divide model.num_heads=15, model.num_kv_heads=5: for this model it can be 1, 5$",
        ),
        (sizes(8, 4, 516, 1024), {"fsdp": 8}, r"mesh.fsdp=8 does not divide model.d_model=516: .* 1, 2, 3, 4, 6, 12,"),
        (
            sizes(8, 8, 512, 1028),
            {"tensor": 8},
            r"mesh.tensor=8 does not divide model.d_ff=1028: .* it can be 1, 2, 4$",
        ),
    ],
)
def test_meshes_that_do_not_divide_the_model_are_refused(config, shape, message):
    with pytest.raises(ValueError, match=message):
        sharding.param_shardings(sharding.make_mesh(shape), model.logical_axes(config), model.abstract_params(config))


def test_the_sizes_that_an_error_offers_are_taken():
    config = sizes(15, 5, 960, 2560)
    mesh = sharding.make_mesh({"tensor": 5}, devices=jax.devices()[:5])
    sharding.param_shardings(mesh, model.logical_axes(config), model.abstract_params(config))


@pytest.mark.parametrize("num_slices", [1, 2])
def test_meshes_of_real_topologies(num_slices, monkeypatch):
    pytest.importorskip("libtpu", reason="needs the extra tpu")
    from jax.experimental import topologies

    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-16")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4", num_slices=num_slices).devices
    mesh = sharding.make_mesh({"data": num_slices, "fsdp": 16}, devices=devices)
    assert (slice_indices(mesh) == np.arange(num_slices)[:, None, None]).all()
    if num_slices > 1:
        with pytest.raises(ValueError, match="over 2 slices of 16 devices"):
            sharding.make_mesh({"fsdp": 32}, devices=devices)
