"""The clock and its goodput, the run's history and lock, a profile on request."""

import json
import os
import subprocess
import sys
import time

import jax
import pytest
import tiny_runs

from safelm.train import clock as train_clock
from safelm.train import events as train_events
from safelm.train.preemption import Preempted
from safelm.train.run import train


@pytest.fixture
def now(monkeypatch):
    """Seconds that pass only when told to."""

    class Now:
        value = 1000.0

        def passes(self, seconds):
            self.value += seconds

    now = Now()
    monkeypatch.setattr(time, "monotonic", lambda: now.value)
    monkeypatch.setattr(time, "time", lambda: now.value)
    return now


def steps(clock, now, count, *, wait_s=1.0, step_s=9.0):
    for _ in range(count):
        with clock.data_wait():
            now.passes(wait_s)
        now.passes(step_s)


def test_goodput_is_the_share_of_steps_that_still_count(now):
    clock = train_clock.Clock(now.value)
    with clock.aside("compile"):
        now.passes(100)
    clock.run()
    steps(clock, now, 10)
    with clock.aside("eval"):
        now.passes(60)
    with clock.aside("checkpoint_stall"):
        now.passes(40)
    values = clock.take()
    assert values.pop("goodput") == pytest.approx(100 / 300)
    assert values == {"time/data_wait": 1.0, "time/compile": 100, "time/eval": 60, "time/checkpoint_stall": 40}
    record = json.loads(json.dumps(clock.record()))
    steps(clock, now, 10)  # lost: killed before the next checkpoint
    now.passes(200)  # down

    resumed = train_clock.Clock(1000.0)
    resumed.load(record)
    with resumed.aside("compile"):
        now.passes(100)
    resumed.run()
    steps(resumed, now, 20)
    values = resumed.take()
    assert values["goodput"] == pytest.approx((100 + 200) / (300 + 100 + 200 + 100 + 200))
    assert values["time/eval"] == 0 and values["time/compile"] == 100
    resumed.skipped()
    assert resumed.record()["productive_s"] == pytest.approx(290)
    resumed.load(record)  # rolled back
    assert resumed.record() == record


def test_history_goes_on_over_launches_and_survives_a_cut_line(tmp_path, now):
    with pytest.raises(Preempted), train_events.Events(str(tmp_path)) as events:
        events.write("skip", 5, reason="x")
        raise Preempted("stopped", 143)
    with open(tmp_path / "events.jsonl", "a") as file:
        file.write('{"time": 1, "ev')
    now.passes(50)
    with pytest.raises(OSError), train_events.Events(str(tmp_path)) as events:
        assert events.first_launch == 1000.0
        raise OSError("disk full")
    lines = (tmp_path / "events.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines if line.endswith("}")]
    assert [record["event"] for record in records] == ["launch", "skip", "launch", "error"]
    assert records[1]["step"] == 5 and records[3]["message"] == "disk full"
    assert records[0]["xla_flags"] == os.environ["XLA_FLAGS"] and records[0]["jaxlib"] == jax.lib.__version__


HOLD = """
import fcntl, sys
file = open(sys.argv[1], "a")
fcntl.lockf(file, fcntl.LOCK_EX)
file.write('{"event": "launch", "pid": 4321}\\n')
file.flush()
print("held", flush=True)
sys.stdin.read()
"""


def test_a_second_run_in_the_same_workdir_is_refused(tmp_path):
    inputs = tiny_runs.write_inputs(tmp_path / "inputs")
    workdir = tmp_path / "run"
    workdir.mkdir()
    command = [sys.executable, "-c", HOLD, str(workdir / "events.jsonl")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match=r"workdir .*/run is in use by process 4321: one run at a time"):
            train(tiny_runs.tiny_config(inputs), str(workdir))
    assert sorted(path.name for path in workdir.iterdir()) == ["events.jsonl"]


def test_a_profile_is_written_and_metrics_tell_of_time(tmp_path):
    inputs = tiny_runs.write_inputs(tmp_path / "inputs")
    config = tiny_runs.tiny_config(inputs, **{"log.profile_start_step": 2, "log.profile_steps": 2})
    train(config, str(tmp_path / "run"))
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["time/compile"] > 0 and lines[1]["time/compile"] == 0
    assert all(0 < line["goodput"] < 1 and line["time/data_wait"] >= 0 for line in lines)
    assert lines[3]["time/checkpoint_stall"] > 0  # of the save after step 3


@pytest.mark.parametrize(("field", "value"), [("profile_start_step", -1), ("profile_steps", 0)])
def test_bad_profile_fields_are_named(tmp_path, field, value):
    inputs = tiny_runs.write_inputs(tmp_path / "inputs")
    with pytest.raises(ValueError, match=rf"log\.{field} is {value}"):
        train(tiny_runs.tiny_config(inputs, **{f"log.{field}": value}), str(tmp_path / "run"))
