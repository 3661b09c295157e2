"""Real runs that find their checkpoints damaged, or another number of devices."""

import json
import multiprocessing
import os
import shutil

import numpy as np
import pytest
import tiny_runs

from safelm.checkpoints import checkpoint
from safelm.checkpoints.integrity import CorruptCheckpointError
from safelm.train.run import train

STEPS = {"total_steps": 9, "checkpoint.keep_last": 3}


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    """Nine steps on eight devices, with checkpoints of steps 3, 6 and 9."""
    workdir = tmp_path_factory.mktemp("finished")
    train(tiny_runs.tiny_config(inputs, **STEPS), str(workdir))
    return workdir


def flip_bits(workdir, step):
    """One at every eighth of the files with parameters: which file and which part of it counts is Orbax's affair."""
    folder = workdir / "checkpoints" / str(step) / "params"
    for file in (path for path in folder.rglob("d/*") if path.stat().st_size > 4096):
        content = bytearray(file.read_bytes())
        for eighth in range(1, 8):
            content[len(content) * eighth // 8] ^= 16
        file.write_bytes(content)


def test_damaged_checkpoints_are_set_aside_and_the_one_before_is_used(inputs, finished, copy, capsys):
    flip_bits(copy, 9)
    (copy / "checkpoints" / "6" / "meta" / "metadata").unlink()
    train(tiny_runs.tiny_config(inputs, **STEPS), str(copy))
    tiny_runs.assert_same_checkpoint(finished, copy, 9)
    assert tiny_runs.metric_lines(copy) == tiny_runs.metric_lines(finished)
    aside = copy / "corrupt_checkpoints"
    assert sorted(path.name for path in aside.iterdir()) == ["6", "6.txt", "9", "9.txt"]
    assert str(copy / "checkpoints" / "9") in (aside / "9.txt").read_text()
    lines = [json.loads(line) for line in (copy / "events.jsonl").read_text().splitlines()]
    told = [line for line in lines if line["event"] == "corrupt_checkpoint"]
    assert [(line["step"], line["going_on_from"]) for line in told] == [(9, 3), (6, 3)]
    err = capsys.readouterr().err
    assert "corrupt checkpoint, step 9: reason checkpoint" in err and "going_on_from 3" in err


def test_a_run_whose_checkpoints_are_all_damaged_never_starts_anew(inputs, copy):
    for step in (3, 9):
        flip_bits(copy, step)
    (copy / "checkpoints" / "6" / "meta" / "metadata").write_text("{}")
    with pytest.raises(CorruptCheckpointError, match=r"no checkpoint under .* can be used, all were left there"):
        train(tiny_runs.tiny_config(inputs, **STEPS), str(copy))
    assert sorted(path.name for path in (copy / "checkpoints").iterdir() if path.is_dir()) == ["3", "6", "9"]
    (copy / "checkpoints").rename(copy / "corrupt_checkpoints")
    with pytest.raises(CorruptCheckpointError, match=r"no checkpoint but those set aside"):
        train(tiny_runs.tiny_config(inputs, **STEPS), str(copy))


def test_a_damaged_model_is_not_loaded(copy):
    flip_bits(copy, 9)
    with pytest.raises(CorruptCheckpointError, match=r"checkpoints/9"):
        checkpoint.load_for_inference(str(copy))
    assert checkpoint.load_for_inference(str(copy), step=6)[0].d_model == 16


def _train_on_four_devices(inputs, workdir):
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=4 {os.environ['SAFELM_TESTS_XLA']}"
    train(tiny_runs.tiny_config(inputs, **STEPS, **{"mesh.fsdp": 2}), str(workdir))


@pytest.mark.slow
def test_eight_devices_then_four_then_eight_again(inputs, finished, copy):
    def keep(last):
        for path in (copy / "checkpoints").iterdir():
            if path.is_dir() and int(path.name) > last:
                shutil.rmtree(path)

    keep(3)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["safelm.train", "tiny_runs"])
    child = context.Process(target=_train_on_four_devices, args=(inputs, copy))
    child.start()
    child.join()
    assert child.exitcode == 0
    keep(6)
    train(tiny_runs.tiny_config(inputs, **STEPS), str(copy))
    ours, theirs = tiny_runs.metric_lines(copy), tiny_runs.metric_lines(finished)
    assert len(ours) == len(theirs) == 9
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys()
        for name in mine:
            exact = name in ("step", "learning_rate", "steps_not_applied") or name.startswith("tokens/")
            np.testing.assert_allclose(mine[name], other[name], rtol=0 if exact else 1e-4, err_msg=name)
