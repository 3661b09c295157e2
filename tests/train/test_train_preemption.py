"""SIGTERM at any moment: what can be saved is saved, the process ends soon with its code, what follows is the same.

The runs are processes of their own, forked from one that has the imports done.
"""

import hashlib
import json
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import tiny_runs

from safelm.checkpoints import checkpoint
from safelm.train import data as train_data
from safelm.train import preemption as train_preemption
from safelm.train import program as train_program
from safelm.train.run import train

CONTEXT = multiprocessing.get_context("forkserver")
OVERRIDES = {
    "total_steps": 40,
    "checkpoint.every_steps": 7,
    "log.every_steps": 3,
    "eval.every_steps": 8,
    "eval.sources": ("safeweb",),
}


def _slow_compilation(marker):
    def compile_ahead(*_, **__):
        marker.touch()
        hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # minutes in C, which no Python handler interrupts

    train_program.compile_ahead = compile_ahead


def _slow_evaluation(marker):
    batches = train_data.TrainData.eval_batches

    def eval_batches(self, *arguments):
        for batch in batches(self, *arguments):
            if not marker.exists():
                marker.touch()
                while not (marker.parent / "go on").exists():
                    time.sleep(0.01)
            yield batch

    train_data.TrainData.eval_batches = eval_batches


def _slow_steps(_):
    batches = train_data.TrainData.batches

    def slow(self, *arguments):
        for batch in batches(self, *arguments):
            time.sleep(0.02)
            yield batch

    train_data.TrainData.batches = slow


def _run(inputs: Path, workdir: Path, slow) -> None:
    """In the child: the run on two devices, slow where `slow` makes it."""
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=2 {os.environ['SAFELM_TESTS_XLA']}"
    if slow is not None:
        slow(workdir.parent / "marker")
    try:
        train(tiny_runs.tiny_config(inputs, **OVERRIDES), str(workdir))
    except train_preemption.Preempted as stop:
        raise SystemExit(stop.exit_code) from stop


def _start(inputs, workdir, slow=None):
    CONTEXT.set_forkserver_preload(["safelm.train", "tiny_runs"])
    child = CONTEXT.Process(target=_run, args=(inputs, workdir, slow))
    child.start()
    return child


def _wait_for(condition):
    while not condition():
        time.sleep(0.005)


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole") / "run"
    child = _start(inputs, workdir)
    child.join()
    assert child.exitcode == 0
    return workdir


def _finish_and_compare(inputs, workdir, whole):
    child = _start(inputs, workdir)
    child.join()
    assert child.exitcode == 0
    tiny_runs.assert_same_checkpoint(whole, workdir, OVERRIDES["total_steps"])
    assert tiny_runs.metric_lines(workdir) == tiny_runs.metric_lines(whole)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_a_signal_while_training_saves_the_step_and_loses_nothing(inputs, whole, tmp_path, number, code):
    workdir = tmp_path / "run"
    child = _start(inputs, workdir, _slow_steps)
    metrics = workdir / "metrics.jsonl"
    _wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= 3)
    os.kill(child.pid, number)
    child.join()
    assert child.exitcode == code
    (stop,) = [line for line in map(json.loads, open(workdir / "events.jsonl")) if line["event"] == "stop"]
    assert 9 <= stop["step"] < 40 and checkpoint.open_checkpoint(str(workdir))[1] == stop["step"]
    _finish_and_compare(inputs, workdir, whole)


@pytest.mark.slow
def test_a_signal_while_evaluating_saves_and_the_evaluation_is_made_up_for(inputs, whole, tmp_path):
    workdir = tmp_path / "run"
    child = _start(inputs, workdir, _slow_evaluation)
    _wait_for((tmp_path / "marker").exists)
    os.kill(child.pid, signal.SIGTERM)
    time.sleep(0.5)  # the signal is there before the batch is
    (tmp_path / "go on").touch()
    child.join()
    assert child.exitcode == 143
    _, step, meta = checkpoint.open_checkpoint(str(workdir))
    assert step == 8 and "unfinished" in meta
    assert all("eval_loss/safeweb" not in line for line in tiny_runs.metric_lines(workdir))
    _finish_and_compare(inputs, workdir, whole)


def test_a_signal_while_compiling_ends_the_process_though_it_is_in_compiled_code(inputs, tmp_path):
    child = _start(inputs, tmp_path / "run", _slow_compilation)
    _wait_for((tmp_path / "marker").exists)
    os.kill(child.pid, signal.SIGTERM)
    child.join(60)
    assert child.exitcode == 143
    assert checkpoint.Checkpoints(str(tmp_path / "run"), read_only=True).steps() == []


class Left:
    """Stands for the end of the process."""

    def __init__(self, grace_s):
        self.code, self.event, self.notes = None, threading.Event(), []
        self.preemption = train_preemption.Preemption(grace_s=grace_s, note=self.notes.append, leave=self)

    def __call__(self, code):
        self.code = code
        self.event.set()


def test_no_step_within_the_grace_ends_the_process_without_a_save():
    left = Left(grace_s=0.05)
    with left.preemption as preemption:
        preemption.begin()
        os.kill(os.getpid(), signal.SIGTERM)
        assert left.event.wait(30) and left.code == 143
    assert any("no step ended within 0.05 s" in note for note in left.notes)


def test_a_save_is_not_cut_short_but_by_a_second_interrupt():
    left = Left(grace_s=0.2)
    with left.preemption as preemption:
        preemption.begin()
        assert not preemption.requested
        os.kill(os.getpid(), signal.SIGTERM)
        _wait_for(lambda: preemption.requested)
        preemption.saving(True)
        os.kill(os.getpid(), signal.SIGTERM)
        _wait_for(lambda: len(left.notes) == 2)
        assert not left.event.wait(0.5)
        os.kill(os.getpid(), signal.SIGINT)
        assert left.event.wait(30) and preemption.exit_code == 143


def test_handlers_are_put_back():
    before = [signal.getsignal(number) for number in (*train_preemption.SIGNALS, train_preemption.PROFILE_SIGNAL)]
    with Left(grace_s=1).preemption as preemption:
        os.kill(os.getpid(), train_preemption.PROFILE_SIGNAL)
        _wait_for(preemption.take_profile_request)
        assert not preemption.take_profile_request() and not preemption.requested
    after = [signal.getsignal(number) for number in (*train_preemption.SIGNALS, train_preemption.PROFILE_SIGNAL)]
    assert before == after and signal.set_wakeup_fd(-1) == -1
