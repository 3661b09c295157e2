"""Two processes of four devices each, joined by `jax.distributed`, through the real command; and one of eight.

They train the same, each reading its own rows only; each other's checkpoints fit; a worker that differs, is missing, is
asked to stop or dies takes the other with it, with a line that says why.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_runs
from token_stores import assert_equal_batches

from safelm.checkpoints import checkpoint
from safelm.data.store import TokenStore
from safelm.formats import huggingface
from safelm.train import data as train_data
from safelm.train import processes
from safelm.train.run import train

ROOT = Path(__file__).parents[2]
OVERRIDES = {
    "mesh.data": 2,
    "mesh.fsdp": 4,
    "grad_accum_steps": 2,
    "batch_size": 16,
    "faults.barrier_timeout_s": 60.0,
    "eval.every_steps": 3,
    "eval.sources": ("filtered_web",),
    "export.at_steps": (3,),
    "export.dtype": "float32",
}


@pytest.fixture(scope="module")
def config_file(inputs):
    """A config file for the command."""
    path = inputs / "config.py"
    path.write_text(
        "import pathlib, tiny_runs\n"
        "def get_config():\n"
        f"    return tiny_runs.tiny_config(pathlib.Path({str(inputs)!r}), **{OVERRIDES!r})\n"
    )
    return path


@pytest.fixture(scope="module")
def alone(inputs, tmp_path_factory):
    """The run in one process of eight devices."""
    workdir = tmp_path_factory.mktemp("alone")
    train(tiny_runs.tiny_config(inputs, **OVERRIDES), str(workdir))
    return workdir


class Launch:
    """The command in `count` of two processes; `arguments[i]` are for process i alone."""

    def __init__(
        self, config_file: Path, workdir: Path, *common: str, arguments=((), ()), folders=(ROOT, ROOT), count=2
    ):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        environment = os.environ | {
            "XLA_FLAGS": f"--xla_force_host_platform_device_count=4 {os.environ['SAFELM_TESTS_XLA']}",
            "PYTHONPATH": f"{ROOT}:{ROOT / 'tests/helpers'}",
        }
        self.workers = [
            subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "safelm.train",
                    f"--config={config_file}",
                    f"--workdir={workdir}",
                    "--distributed",
                    f"--coordinator_address=127.0.0.1:{port}",
                    "--num_processes=2",
                    f"--process_id={index}",
                    *common,
                    *arguments[index],
                ],
                env=environment,
                cwd=folders[index],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for index in range(count)
        ]

    def ends(self) -> list[tuple[int, str]]:
        """Exit code and output of every process."""
        try:
            outputs = [worker.communicate(timeout=900)[0] for worker in self.workers]
        finally:
            for worker in self.workers:
                worker.kill()
        return [(worker.returncode, output) for worker, output in zip(self.workers, outputs, strict=True)]


def wait_for_step(workdir: Path, step: int, launch: Launch) -> None:
    deadline = time.monotonic() + 600
    while all(worker.poll() is None for worker in launch.workers) and time.monotonic() < deadline:
        if (workdir / "metrics.jsonl").exists() and len(tiny_runs.metric_lines(workdir)) >= step:
            return
        time.sleep(0.05)
    pytest.fail(str(launch.ends()))


def assert_same_run(a: Path, b: Path) -> None:
    """The same metrics and the same parameters after step 6, but for the order of additions."""
    lines_a, lines_b = tiny_runs.metric_lines(a), tiny_runs.metric_lines(b)
    assert [line["step"] for line in lines_a] == [line["step"] for line in lines_b] == list(range(1, 7))
    for line_a, line_b in zip(lines_a, lines_b, strict=True):
        for name in (name for name in line_a if "loss" in name or name.startswith(("tokens/", "grad_norm"))):
            assert line_a[name] == pytest.approx(line_b[name], rel=2e-5), (line_a["step"], name)
    (_, params_a, _), (_, params_b, _) = (checkpoint.load_for_inference(str(path), step=6) for path in (a, b))
    for x, y in zip(jax.tree.leaves(params_a), jax.tree.leaves(params_b), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-5)


def test_two_processes_train_as_one_and_its_checkpoint_goes_on_in_one(config_file, inputs, alone, tmp_path):
    workdir = tmp_path / "run"
    for code, output in Launch(config_file, workdir).ends():
        assert code == 0, output
    assert_same_run(alone, workdir)
    for step in (3, 6):  # gathered from both processes, written by one
        saved = checkpoint.load_for_inference(str(workdir), step=step)[1]
        _, exported = huggingface.read_folder(workdir / f"exports/{step}")
        jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, saved), exported)
    shutil.rmtree(workdir / "checkpoints" / "6")
    train(tiny_runs.tiny_config(inputs, **OVERRIDES), str(workdir))
    assert_same_run(alone, workdir)


@pytest.mark.slow
def test_a_checkpoint_of_one_process_goes_on_in_two(config_file, alone, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(alone, workdir)
    shutil.rmtree(workdir / "checkpoints" / "6")
    for code, output in Launch(config_file, workdir).ends():
        assert code == 0, output
    assert_same_run(alone, workdir)


def test_workers_that_differ_are_refused_before_the_first_step(config_file, inputs, tmp_path):
    shutil.copytree(inputs / "tokens", tmp_path / "tokens")
    tiny_runs.write_store(tmp_path / "tokens", "raw_web", seed=7)
    launch = Launch(
        config_file,
        tmp_path / "run",
        "--config.data.root=tokens",
        arguments=((), ("--config.optimizer.peak_lr=0.5",)),
        folders=(inputs, tmp_path),
    )
    for code, output in launch.ends():
        line = output.splitlines()[-1]
        assert code == 2, output
        assert "config.optimizer.peak_lr is 0.5 on worker 1" in line and "0.003 on worker 0" in line
        assert "data.raw_web/train is" in line and "data.harm_tagged_web" not in line and "code" not in line
    assert not (tmp_path / "run").exists()


def test_a_missing_worker_is_not_waited_for_for_ever(config_file, tmp_path):
    [(code, output)] = Launch(config_file, tmp_path / "run", "--config.faults.barrier_timeout_s=3.0", count=1).ends()
    assert code == processes.LOST_WORKER
    assert "not all processes have started within 3 s: process 0 of 2" in output and "0 of 1 others have come" in output


@pytest.mark.slow
def test_sigterm_on_one_worker_stops_both_after_the_same_step(config_file, tmp_path):
    workdir = tmp_path / "run"
    seldom = ("checkpoint", "eval")  # a run that leaves in an evaluation writes that step's line when it goes on
    far = [f"--config.{name}.every_steps=100000" for name in seldom]
    launch = Launch(config_file, workdir, "--config.total_steps=100000", *far)
    wait_for_step(workdir, 3, launch)
    launch.workers[1].send_signal(signal.SIGTERM)
    ends = launch.ends()
    assert [code for code, _ in ends] == [143, 143], ends
    (step,) = (int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())
    assert tiny_runs.metric_lines(workdir)[-1]["step"] == step
    for _, output in ends:
        assert f"stopped after step {step}" in output


@pytest.mark.slow
def test_a_worker_that_dies_takes_the_other_with_it(config_file, tmp_path):
    workdir = tmp_path / "run"
    launch = Launch(config_file, workdir, "--config.total_steps=100000")
    wait_for_step(workdir, 3, launch)
    launch.workers[1].kill()
    (code, output), _ = launch.ends()
    assert code == processes.LOST_WORKER, output
    assert "worker 1" in output.splitlines()[-1], output


def test_differences_name_the_odd_one_out():
    views = [{"a": 1, "b": "x"}, {"a": 2, "b": "x"}, {"a": 2}]
    assert processes.differences(views, ["w0", "w1", "w2"]) == [
        "a is 1 on w0, 2 on w1",
        'b is null on w2, "x" on w0',
    ]
    assert processes.differences(views[:1] * 3, ["w0", "w1", "w2"]) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("127.0.0.1:1234", 2, None), "--process_id must be given too"),
        ((None, 2, 0), "--coordinator_address must be given too"),
        (("127.0.0.1", 2, 0), "--coordinator_address=127.0.0.1: must be HOST:PORT"),
        (("127.0.0.1:1234", 2, 2), "--process_id=2: must be 0 to --num_processes - 1 = 1"),
    ],
)
def test_a_start_that_cannot_work_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        processes.start(*arguments)


def test_every_process_reads_its_own_rows_only(inputs, monkeypatch):
    """The tokens touched by two processes share nothing, and together are those of one."""
    config = tiny_runs.tiny_config(inputs, total_steps=2, batch_size=16, **{"data.packing": "concat"})
    read, open_store = set(), TokenStore.open

    class Watched:
        """A shard's tokens that note which are read."""

        def __init__(self, tokens, task, shard):
            self.tokens, self.task, self.shard = tokens, task, shard

        def __getitem__(self, wanted):
            read.update((self.task, self.shard, index) for index in np.arange(len(self.tokens))[wanted].tolist())
            return self.tokens[wanted]

    def open_watched(*arguments, **options):
        store = open_store(*arguments, **options)
        shards = enumerate(store.shard_tokens)
        store.shard_tokens = [Watched(tokens, store.manifest.task, shard) for shard, tokens in shards]
        return store

    monkeypatch.setattr(TokenStore, "open", open_watched)

    def rows_and_reads(process_index: int, process_count: int):
        read.clear()
        monkeypatch.setattr(jax, "process_index", lambda: process_index)
        monkeypatch.setattr(jax, "process_count", lambda: process_count)
        data = train_data.TrainData(config, tiny_runs.tokenizer())
        return [next(data._loader) for _ in range(2)], set(read)

    (first, reads_0), (second, reads_1), (whole, reads) = (rows_and_reads(*who) for who in ((0, 2), (1, 2), (0, 1)))
    for a, b, both in zip(first, second, whole, strict=True):
        assert_equal_batches(jax.tree.map(lambda *arrays: np.concatenate(arrays), a, b), both)
    assert reads == reads_0 | reads_1 and reads
    assert len(reads_0 & reads_1) <= 0.2 * len(reads)
