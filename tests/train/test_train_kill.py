"""Runs that die, by SIGKILL at random moments or a full disk: what was saved stays good, what follows is the same.

The runs are processes of their own, forked from one that has the imports done.
"""

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
from pathlib import Path

import tiny_runs
from absl import logging as absl_logging

from safelm.checkpoints import checkpoint
from safelm.train.run import train

NUM_KILLS = int(os.environ.get("SAFELM_TESTS_KILLS", "6"))
CONTEXT = multiprocessing.get_context("forkserver")


def _run(inputs: Path, workdir: Path, overrides: dict, file_size_limit: int | None) -> None:
    """In the child: the run on two devices; writes may be limited to so many bytes a file, as on a full disk."""
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=2 {os.environ['SAFELM_TESTS_XLA']}"
    if file_size_limit is not None:
        os.dup2(os.open(workdir / "stderr.txt", os.O_CREAT | os.O_WRONLY), 2)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size_limit, file_size_limit))
    absl_logging.set_verbosity(absl_logging.FATAL)  # as the command does
    try:
        train(tiny_runs.tiny_config(inputs, **{"mesh.fsdp": 2, "mesh.data": 1}, **overrides), str(workdir))
    except OSError as error:
        (workdir / "error.txt").write_text(str(error))
        raise SystemExit(2) from error


def _start(inputs: Path, workdir: Path, overrides: dict, file_size_limit: int | None = None):
    CONTEXT.set_forkserver_preload(["safelm.train", "tiny_runs"])
    child = CONTEXT.Process(target=_run, args=(inputs, workdir, overrides, file_size_limit))
    child.start()
    return child


def _last_step(workdir: Path) -> int:
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    complete = [json.loads(line)["step"] for line in lines if line.endswith("}")]
    return complete[-1] if complete else 0


def test_kills_at_random_moments_change_no_bit(inputs, tmp_path):
    overrides = {"total_steps": 150, "checkpoint.every_steps": 2, "grad_accum_steps": 2}
    child = _start(inputs, tmp_path / "whole", overrides)
    child.join()
    assert child.exitcode == 0

    rng, kills, workdir = random.Random(0), 0, tmp_path / "killed"
    while kills < NUM_KILLS:
        child = _start(inputs, workdir, overrides)
        if kills % 3:  # while it trains and saves; else whenever, which may be while it starts
            goal = _last_step(workdir) + rng.randrange(1, 12)
            while child.is_alive() and _last_step(workdir) < goal:
                time.sleep(0.002)
        time.sleep(rng.random() * (0.1 if kills % 3 else 2.0))
        child.kill()  # does nothing to a child that has ended
        child.join()
        assert child.exitcode in (0, -signal.SIGKILL)
        if child.exitcode == 0:  # this machine is so busy that the kill came behind the last step
            shutil.rmtree(workdir)
        kills = kills + 1 if child.exitcode else 0
    assert 0 < _last_step(workdir) < 150
    child = _start(inputs, workdir, overrides)
    child.join()
    assert child.exitcode == 0
    tiny_runs.assert_same_checkpoint(tmp_path / "whole", workdir, 150)
    assert tiny_runs.metric_lines(workdir) == tiny_runs.metric_lines(tmp_path / "whole")


def test_full_disk_is_an_error_and_the_checkpoint_before_stays_good(inputs, tmp_path):
    overrides = {"checkpoint.every_steps": 2, "model.d_ff": 2048}
    child = _start(inputs, tmp_path, overrides | {"checkpoint.keep_last": 3})
    child.join()
    assert child.exitcode == 0
    for step in ("4", "6"):
        shutil.rmtree(tmp_path / "checkpoints" / step)
    overrides["checkpoint.keep_last"] = 1
    child = _start(inputs, tmp_path, overrides, file_size_limit=150_000)
    child.join()
    assert child.exitcode == 2 and checkpoint.open_checkpoint(str(tmp_path))[1] == 2
    error = (tmp_path / "error.txt").read_text()
    assert "Traceback" not in (tmp_path / "stderr.txt").read_text()  # Orbax's and tensorstore's threads keep quiet
    assert "could not write" in error and f"last good one is checkpoint {tmp_path}/checkpoints/2" in error
    child = _start(inputs, tmp_path, overrides)
    child.join()
    assert child.exitcode == 0 and checkpoint.open_checkpoint(str(tmp_path))[1] == 6
