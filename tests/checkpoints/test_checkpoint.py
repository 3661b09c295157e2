"""Checkpoints: what is read is what was written, on any mesh; every kind of damage is an error that names it."""

import random
import resource
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from safelm.checkpoints import checkpoint
from safelm.checkpoints import integrity as checkpoint_integrity
from safelm.checkpoints.integrity import CorruptCheckpointError

META = {"note": "a record", "position": 123456, "ratio": 0.1}


def tree(seed):
    rng = np.random.default_rng(seed)
    table = rng.normal(size=(64, 96)).astype(np.float32)  # large enough for a file of its own
    return {"a": table, "b": {"c": rng.integers(0, 99, 8).astype(np.int32)}}


def placed(values, mesh, spec):
    return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, spec)), values)


def abstract(values):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), values)


@pytest.fixture(scope="module")
def meshes():
    return jax.make_mesh((8,), ("x",)), jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])


@pytest.fixture(scope="module")
def written(meshes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    with checkpoint.Checkpoints(str(folder), keep_last=2) as checkpoints:
        params, opt_state = (placed(tree(seed), meshes[0], PartitionSpec("x")) for seed in (0, 1))
        checkpoints.save(7, META, params, opt_state)
    return folder


@pytest.fixture
def copy(written, tmp_path):
    shutil.copytree(written, tmp_path / "copy")
    return tmp_path / "copy"


def read(folder, mesh):
    target = abstract(placed(tree(0), mesh, PartitionSpec("x")))
    with checkpoint.Checkpoints(str(folder), read_only=True) as checkpoints:
        return checkpoints.read_meta(7), *checkpoints.restore(7, target, target)


@pytest.mark.parametrize("which", [0, 1])
def test_what_was_written_is_read_on_any_mesh(written, meshes, which):
    meta, *restored = read(written, meshes[which])
    assert META.items() <= meta.items() and meta["step"] == 7
    for seed, values in enumerate(restored):
        jax.tree.map(np.testing.assert_array_equal, values, tree(seed))


def largest(folder, pattern):
    return max((path for path in folder.glob(pattern) if path.is_file()), key=lambda path: path.stat().st_size)


@pytest.mark.parametrize("how", ["removed", "cut", "flipped"])
@pytest.mark.parametrize(
    "pattern",
    ["params/ocdbt.process_0/d/*", "optimizer/**/d/*", "params/manifest.ocdbt", "params/_METADATA", "meta/metadata"],
)
def test_damage_is_noticed(copy, meshes, pattern, how):
    file = largest(copy / "checkpoints" / "7", pattern)
    content = bytearray(file.read_bytes())
    if how == "removed":
        file.unlink()
    else:
        content[len(content) // 2] ^= 4
        file.write_bytes(content[: len(content) // 2] if how == "cut" else content)
    with pytest.raises((CorruptCheckpointError, ValueError), match="checkpoints/7"):
        read(copy, meshes[0])


@pytest.mark.parametrize("item", ["params", "optimizer", "meta"])
def test_a_missing_item_is_noticed(copy, meshes, item):
    shutil.rmtree(copy / "checkpoints" / "7" / item)
    with pytest.raises(CorruptCheckpointError, match="checkpoints/7"):
        read(copy, meshes[0])


def test_a_flipped_bit_names_the_array(copy, meshes):
    """Orbax itself reads it without complaint."""
    file = largest(copy / "checkpoints" / "7", "params/ocdbt.process_0/d/*")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(CorruptCheckpointError, match=r"checkpoints/7: params/\w+ is not what was written"):
        read(copy, meshes[0])


def test_storage_that_fails_is_no_damage(written, meshes, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    with checkpoint.Checkpoints(str(written), read_only=True) as checkpoints:
        monkeypatch.setattr(checkpoints._manager, "restore", refuse)
        with pytest.raises(OSError, match="Permission denied") as caught:
            checkpoints.read_meta(7)
    assert not isinstance(caught.value, CorruptCheckpointError)


@pytest.fixture
def full_disk():
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_save_that_fails_leaves_the_one_before_however_often_it_is_asked(copy, meshes, full_disk):
    checkpoints = checkpoint.Checkpoints(str(copy), keep_last=1)
    checkpoints.save(8, META, *(placed(tree(seed), meshes[0], PartitionSpec("x")) for seed in (2, 3)))
    with pytest.raises(OSError, match=r"could not write .* last good one is .*checkpoints/7\)"):
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            checkpoints.check()
    checkpoints.close()
    assert read(copy, meshes[0])[0]["step"] == 7


def test_set_aside_keeps_all(copy, written):
    with checkpoint.Checkpoints(str(copy)) as checkpoints:
        assert checkpoints.set_aside(7, "why").name == "7" and checkpoints.steps() == []
        shutil.copytree(written / "checkpoints" / "7", copy / "checkpoints" / "7")
        checkpoints.reload()
        assert checkpoints.set_aside(7, "again").name == "7.2"
    for name in ("7", "7.2"):
        assert (copy / checkpoint.CORRUPT_FOLDER / name / "params").is_dir()
    assert (copy / checkpoint.CORRUPT_FOLDER / "7.txt").read_text() == "why\n"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8"])
def test_any_bit_changes_the_fingerprint_and_no_sharding_does(meshes, dtype):
    values = np.random.default_rng(0).integers(0, 99, (16, 6)).astype(jnp.dtype(dtype))
    wanted = checkpoint_integrity.fingerprints({"x": jnp.asarray(values)})
    for mesh in meshes:
        for spec in (PartitionSpec("x"), PartitionSpec(None), PartitionSpec(None, "x" if mesh.size == 2 else None)):
            assert checkpoint_integrity.fingerprints(placed({"x": values}, mesh, spec)) == wanted
    rng, size = random.Random(0), values.dtype.itemsize
    for _ in range(20):
        changed = bytearray(values.tobytes())
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        other = np.frombuffer(bytes(changed), f"u{size}").view(values.dtype).reshape(values.shape)
        assert checkpoint_integrity.fingerprints({"x": jnp.asarray(other)}) != wanted
    assert checkpoint_integrity.fingerprints({"x": jnp.asarray(values[::-1])}) != wanted  # chunks that changed places
