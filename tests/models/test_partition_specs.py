"""How every parameter of the three SmolLM2 sizes is split, against reviewed tables in tests/golden/.

After a change that is meant: `python tests/models/test_partition_specs.py --write`, and read the diff.
"""

import functools
import importlib
import math
import sys
from pathlib import Path

import jax
import pytest
from jax.sharding import AbstractMesh

from safelm.models import decoder as model
from safelm.models import sharding
from safelm.train import config as train_config

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parent / "golden"

# The 135M and 360M have 9/3 and 15/5 heads: a tensor axis of 2 does not divide them.
MESHES = {"fsdp16": (1, 16, 1), "fsdp8_tensor2": (1, 8, 2)}
CASES = [(name, "fsdp16") for name in ("smollm2_135m", "smollm2_360m", "smollm2_1b7")]
CASES += [("smollm2_1b7", "fsdp8_tensor2")]
SMALL = 2**17  # elements; what is smaller may be on every device


@functools.cache
def rows(name: str, mesh_name: str) -> list[tuple[str, tuple, tuple, tuple, tuple]]:
    """Path, shape, logical axes, mesh axes and shape on a device of every parameter."""
    config = importlib.import_module(f"configs.{name}").get_config()
    with config.unlocked():
        config.model.vocab_size = 49_153  # SmolLM2's and the harm tag
    _, model_config = train_config.resolve_sizes(config)
    shapes, axes = model.abstract_params(model_config), model.logical_axes(model_config)
    mesh = AbstractMesh(MESHES[mesh_name], sharding.MESH_AXES)
    shardings = sharding.param_shardings(mesh, axes, shapes)
    table = []
    for (path, leaf), names, placed in zip(
        jax.tree_util.tree_flatten_with_path(shapes)[0],
        jax.tree.leaves(axes, is_leaf=lambda node: isinstance(node, tuple)),
        jax.tree.leaves(shardings),
        strict=True,
    ):
        where = jax.tree_util.keystr(path, simple=True, separator="/")
        table.append((where, leaf.shape, names, tuple(placed.spec), placed.shard_shape(leaf.shape)))
    return table


def render(name: str, mesh_name: str) -> str:
    spelled = " x ".join(f"{axis} {size}" for axis, size in zip(sharding.MESH_AXES, MESHES[mesh_name], strict=True))
    table, on_device = rows(name, mesh_name), math.prod(MESHES[mesh_name])
    total, held = (sum(math.prod(row[column]) for row in table) for column in (1, 4))
    cells = [("parameter", "shape", "logical axes", "split over", "on a device")]
    for path, shape, names, spec, shard in table:
        split = [axis or "-" for axis in spec]
        cells.append((path, *(" ".join(map(str, column)) for column in (shape, names, split, shard))))
    widths = [max(len(row[column]) for row in cells) for column in range(5)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    share = f"{total:,} parameters, {held:,} on a device: {held * on_device / total - 1:.3%} more than an even share"
    return "\n".join([f"configs/{name}.py on {spelled}: {share}", *lines]) + "\n"


@pytest.mark.parametrize(("name", "mesh_name"), CASES)
def test_parameters_are_split_as_reviewed(name, mesh_name):
    golden = GOLDEN / f"{name}_{mesh_name}.txt"
    assert render(name, mesh_name) == golden.read_text(), "meant? python tests/models/test_partition_specs.py --write"


@pytest.mark.parametrize(("name", "mesh_name"), CASES)
def test_no_big_parameter_is_held_whole(name, mesh_name):
    for path, shape, _, _, shard in rows(name, mesh_name):
        copies = math.prod(MESHES[mesh_name]) * math.prod(shard) / math.prod(shape)
        assert copies == 1 or math.prod(shape) <= SMALL, path


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("usage: python tests/models/test_partition_specs.py --write")
    sys.path.insert(0, str(ROOT))
    GOLDEN.mkdir(exist_ok=True)
    for case in CASES:
        (GOLDEN / f"{'_'.join(case)}.txt").write_text(render(*case))
