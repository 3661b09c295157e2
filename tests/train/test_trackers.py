"""Curves in TensorBoard, W&B and MLflow: the numbers of metrics.jsonl, once each, over stops and failures."""

import importlib.machinery
import json
import sys
import types

import pytest
import tiny_runs

from safelm.train import run, trackers
from safelm.train.preemption import Preempted

NAMES = ("tensorboard", "wandb", "mlflow")


class FakeWandb(types.ModuleType):
    """What we use of wandb; `runs` has every init's arguments, `logged` the rows by the run's id."""

    def __init__(self):
        super().__init__("wandb")
        self.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
        self.runs, self.logged, self.finished, self.fails = [], {}, 0, False

    @staticmethod
    def Settings(**fields):
        return fields

    def init(self, **arguments):
        self.runs.append(arguments)
        rows = self.logged.setdefault(arguments["id"], [])

        class Run:
            @staticmethod
            def define_metric(name, step_metric):
                assert (name, step_metric) == ("*", "step")

            @staticmethod
            def log(row):
                if self.fails:
                    raise ConnectionError("no route")
                rows.append(row)

            @staticmethod
            def finish():
                self.finished += 1

        return Run()


class FakeMlflow(types.ModuleType):
    """What we use of mlflow, with one client's state."""

    def __init__(self):
        super().__init__("mlflow")
        self.__spec__ = importlib.machinery.ModuleSpec("mlflow", None)
        self.uris, self.rows, self.params, self.states, outer = [], [], {}, [], self
        self.entities = types.SimpleNamespace(
            Metric=lambda key, value, timestamp, step: (key, value, step), Param=lambda key, value: (key, value)
        )

        class MlflowClient:
            def __init__(self, uri):
                outer.uris.append(uri)

            def get_experiment_by_name(self, name):
                return None

            def create_experiment(self, name):
                return f"experiment {name}"

            def create_run(self, experiment, run_name):
                return types.SimpleNamespace(info=types.SimpleNamespace(run_id=f"{experiment}, {run_name}"))

            def log_batch(self, run_id, metrics=(), params=()):
                outer.rows += [(run_id, *metric) for metric in metrics]
                outer.params |= dict(params)

            def update_run(self, run_id, status):
                outer.states.append(status)

            def set_terminated(self, run_id):
                outer.states.append("FINISHED")

        self.MlflowClient = MlflowClient


@pytest.fixture
def fakes(monkeypatch):
    """wandb and mlflow that only take notes."""
    found = FakeWandb(), FakeMlflow()
    for fake in found:
        monkeypatch.setitem(sys.modules, fake.__name__, fake)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return found


def test_all_trackers_have_the_numbers_of_metrics_jsonl_once_though_the_run_was_killed(
    inputs, tmp_path, fakes, monkeypatch
):
    wandb, mlflow = fakes
    config, workdir = tiny_runs.tiny_config(inputs, **{"log.trackers": NAMES}), tmp_path / "run"
    update = run.Run._update

    def killed_before_step_6(self, batch):
        if self.step == 6:
            raise RuntimeError("killed")
        update(self, batch)

    monkeypatch.setattr(run.Run, "_update", killed_before_step_6)
    with pytest.raises(RuntimeError, match="killed"):
        run.train(config, str(workdir))
    assert len(next(iter(wandb.logged.values()))) >= 4  # the checkpoint is of step 3
    monkeypatch.setattr(run.Run, "_update", update)
    run.train(config, str(workdir))
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    (rows,) = wandb.logged.values()
    assert [row["step"] for row in rows] == [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [row["loss"] for row in rows] == [line["loss"] for line in lines]
    assert rows[0].keys() == lines[0].keys()
    losses = [(step, value) for _, key, value, step in mlflow.rows if key == "loss"]
    assert losses == [(line["step"], line["loss"]) for line in lines]
    assert {run_id for run_id, *_ in mlflow.rows} == {"experiment safelm, run"} and mlflow.params["total_steps"] == "6"
    assert mlflow.uris[0] == f"sqlite:///{workdir}/mlflow.db" and mlflow.states == ["FINISHED", "RUNNING", "FINISHED"]
    first, second = wandb.runs
    assert first["id"] == second["id"] and second["resume"] == "allow" and first["project"] == "safelm"
    assert first["config"]["total_steps"] == 6 and first["settings"]["console"] == "off"
    assert (workdir / "tensorboard").is_dir()


def test_a_step_whose_evaluation_is_made_up_for_twice_is_there_once(inputs, tmp_path, fakes, monkeypatch):
    wandb, _ = fakes
    options = {"log.trackers": ("wandb",), "eval.every_steps": 2, "eval.sources": ("safeweb",)}
    config, workdir = tiny_runs.tiny_config(inputs, **options), tmp_path / "run"

    def killed(self):
        raise RuntimeError("killed")

    with monkeypatch.context() as patched, pytest.raises(Preempted):
        patched.setattr(run.Run, "_should_stop", lambda self: self.step == 2)
        run.train(config, str(workdir))
    assert [line["step"] for line in tiny_runs.metric_lines(workdir)] == [1]
    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="killed"):
        patched.setattr(run.Run, "_next_batch", killed)
        run.train(config, str(workdir))
    assert "eval_loss/safeweb" in tiny_runs.metric_lines(workdir)[1]
    run.train(config, str(workdir))
    (rows,) = wandb.logged.values()
    assert [line["step"] for line in tiny_runs.metric_lines(workdir)] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]


def test_a_service_that_is_gone_is_said_once_and_stops_nothing(inputs, tmp_path, fakes, capsys):
    wandb, _ = fakes
    wandb.fails = True
    run.train(tiny_runs.tiny_config(inputs, **{"log.trackers": ("wandb",)}), str(tmp_path / "run"))
    assert len(tiny_runs.metric_lines(tmp_path / "run")) == 6 and not (tmp_path / "run/tensorboard").exists()
    said = capsys.readouterr().err
    assert said.count("wandb: step 1: ConnectionError: no route") == 1
    assert "wandb: 6 writes failed; metrics.jsonl has all steps" in said


def test_a_service_that_is_gone_at_the_start_or_a_resume_stops_nothing(inputs, tmp_path, fakes, monkeypatch, capsys):
    wandb, mlflow = fakes

    def refused(*_, **__):
        raise ConnectionError("no route")

    config = tiny_runs.tiny_config(inputs, **{"log.trackers": NAMES, "total_steps": 3})
    monkeypatch.setattr(mlflow.MlflowClient, "create_run", refused)
    run.train(config, str(tmp_path / "run"))
    monkeypatch.setattr(wandb, "init", refused)
    run.train(config, str(tmp_path / "run"))
    said = capsys.readouterr().err
    assert said.count("mlflow: opening: ConnectionError: no route") == 2 and said.count("wandb: opening:") == 1
    (rows,) = wandb.logged.values()
    assert (
        [row["step"] for row in rows]
        == [1, 2, 3]
        == [line["step"] for line in tiny_runs.metric_lines(tmp_path / "run")]
    )


def test_unknown_and_missing_trackers_are_named_before_anything_begins(inputs, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"log.trackers names 'comet': known are tensorboard, wandb, mlflow"):
        run.train(tiny_runs.tiny_config(inputs, **{"log.trackers": ("comet",)}), str(tmp_path / "run"))
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"log.trackers names mlflow, which is not installed"):
        run.train(tiny_runs.tiny_config(inputs, **{"log.trackers": ("mlflow",)}), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_remote_run_must_say_where_mlflow_is(fakes):
    with pytest.raises(ValueError, match=r"names mlflow and the workdir is gs://bucket/run: set MLFLOW_TRACKING_URI"):
        trackers.check(("mlflow",), "gs://bucket/run")


def test_the_real_packages_take_a_run_offline(inputs, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="W&B is not installed")
    mlflow = pytest.importorskip("mlflow", reason="MLflow is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run.train(tiny_runs.tiny_config(inputs, **{"log.trackers": NAMES}), str(tmp_path / "run"))
    lines = tiny_runs.metric_lines(tmp_path / "run")
    ids = json.loads((tmp_path / "run/trackers.json").read_text())
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/run/mlflow.db")
    history = client.get_metric_history(ids["mlflow"], "loss")
    assert [(each.step, each.value) for each in history] == [(line["step"], line["loss"]) for line in lines]
    assert list((tmp_path / "run/wandb").glob(f"offline-run-*-{ids['wandb']}/run-{ids['wandb']}.wandb"))


def test_the_progress_file_of_a_run(inputs, tmp_path):
    run.train(tiny_runs.tiny_config(inputs), str(tmp_path / "run"))
    found = json.loads((tmp_path / "run/progress.json").read_text())
    assert found["state"] == "done" and (found["step"], found["done"], found["total"]) == (6, 6, 6)
    assert found["tokens"] == 6 * 8 * 16
    assert found["loss"] == tiny_runs.metric_lines(tmp_path / "run")[-1]["loss"]
