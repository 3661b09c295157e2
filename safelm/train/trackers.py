"""Where a run's curves go beside `metrics.jsonl`: TensorBoard, Weights & Biases, MLflow.

`log.trackers` names them. Each is a `Tracker`: it takes the numbers of a step, under the same names as in
`metrics.jsonl`. W&B and MLflow are asked with their own environment variables (`WANDB_MODE=offline`, `WANDB_API_KEY`,
`MLFLOW_TRACKING_URI`); without a tracking URI MLflow writes into `<workdir>/mlflow.db`. No text and no code is sent.

A resumed run goes on with its former run there (`<workdir>/trackers.json` has the ids). A service that is gone never
stops a run: its failure is said once and the step is missing there, not in `metrics.jsonl`; one that is gone when the
run starts or resumes has none of the steps until the next start.
"""

import contextlib
import importlib.util
import json
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from safelm.io import records, remote

NAMES = ("tensorboard", "wandb", "mlflow")
_IDS_NAME = "trackers.json"
_MLFLOW_URI = "MLFLOW_TRACKING_URI"
_BATCH = 1000  # metrics in a request of MLflow


@runtime_checkable
class Tracker(Protocol):
    """Takes the numbers of steps, in order.

    Attributes:
      name: in messages.
      takes_back: whether a resumed run's earlier numbers of the same steps are hidden; otherwise a step that was logged
        with the same loss before is not logged again.
    """

    name: str
    takes_back: bool

    def write(self, step: int, values: Mapping[str, float | int]) -> None:
        """The numbers of a step."""

    def flush(self) -> None:
        """Makes what was written visible."""

    def close(self) -> None:
        """The run ends or pauses."""


def check(names: Sequence[str], workdir: str) -> None:
    """ValueError for a name that isn't one, whose package isn't installed or which has no place to write to."""
    for name in names:
        if name not in NAMES:
            raise ValueError(f"log.trackers names {name!r}: known are {', '.join(NAMES)}")
        if name != "tensorboard" and importlib.util.find_spec(name) is None:
            raise ValueError(f"log.trackers names {name}, which is not installed: scripts/install.sh tracking")
    if "mlflow" in names and not os.environ.get(_MLFLOW_URI) and remote.is_remote(workdir):
        raise ValueError(f"log.trackers names mlflow and the workdir is {workdir}: set {_MLFLOW_URI}")


def open_trackers(
    names: Sequence[str],
    workdir: str,
    settings: Mapping[str, Any],
    *,
    project: str,
    start_step: int,
    note: Callable[[str], None],
) -> list[Tracker]:
    """The trackers of a run that begins, or goes on, after `start_step`; those of services are guarded.

    Args:
      settings: the run's config, which W&B and MLflow show.
      project: W&B's project and MLflow's experiment.
      note: given a line for people about a service that fails.
    """
    ids = _read_ids(workdir)
    makers: Mapping[str, Callable[[], Tracker]] = {
        "tensorboard": lambda: TensorBoard(os.path.join(workdir, "tensorboard"), purge_step=start_step + 1),
        "wandb": lambda: Wandb(workdir, settings, project, ids),
        "mlflow": lambda: MLflow(workdir, settings, project, ids),
    }
    found: list[Tracker] = []
    for name in names:
        try:
            tracker = makers[name]()
        except Exception as error:
            if name == "tensorboard":
                raise  # a full disk ends a run, and its events are on the disk
            note(_said(name, "opening", error))
            continue
        found.append(tracker if name == "tensorboard" else Guarded(tracker, note))
    if ids:
        records.write(f"{workdir.rstrip('/')}/{_IDS_NAME}", ids)
    return found


class TensorBoard:
    """TensorBoard events, written at once: `SummaryWriter`'s thread dies on a full disk, and then the run hangs."""

    name, takes_back = "tensorboard", True

    def __init__(self, folder: str, *, purge_step: int):
        # Here because tensorboardX loads PyTorch where that is installed.
        from tensorboardX import event_file_writer, record_writer, summary
        from tensorboardX.proto import event_pb2

        self._event, self._scalar = event_pb2.Event, summary.scalar
        record_writer.directory_check(folder)
        self._writer = event_file_writer.EventsWriter(os.path.join(folder, "events"), f".{purge_step}")
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)  # hides a stopped run's later events
        self._writer.write_event(event_pb2.Event(wall_time=time.time(), step=purge_step, session_log=start))
        self.flush, self.close = self._writer.flush, self._writer.close

    def write(self, step: int, values: Mapping[str, float | int]) -> None:
        """The numbers of a step."""
        for name, value in values.items():
            summary = self._scalar(name, value)
            self._writer.write_event(self._event(wall_time=time.time(), step=step, summary=summary))


class Wandb:
    """A run of Weights & Biases; its x axis is `step`, so that a resumed run's steps stand where they belong."""

    name, takes_back = "wandb", False

    def __init__(self, workdir: str, settings: Mapping[str, Any], project: str, ids: dict[str, str]):
        """`ids`: of the runs so far, to which this one's is added."""
        import wandb

        ids.setdefault("wandb", secrets.token_hex(4))
        self._run = wandb.init(
            project=project,
            name=_run_name(workdir),
            id=ids["wandb"],
            resume="allow",
            config=dict(settings),
            dir=None if remote.is_remote(workdir) else workdir,
            settings=wandb.Settings(console="off", save_code=False, disable_git=True),
        )
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, float | int]) -> None:
        """The numbers of a step."""
        self._run.log({"step": step, **values})

    def flush(self) -> None:
        """W&B sends from a process of its own."""

    def close(self) -> None:
        """Waits until everything is sent, or on the disk if it is offline."""
        self._run.finish()


class MLflow:
    """A run of MLflow, in the experiment that the project is."""

    name, takes_back = "mlflow", False

    def __init__(self, workdir: str, settings: Mapping[str, Any], project: str, ids: dict[str, str]):
        """`ids`: of the runs so far, to which this one's is added."""
        import mlflow

        uri = os.environ.get(_MLFLOW_URI)
        self._client = mlflow.MlflowClient(uri or f"sqlite:///{os.path.abspath(workdir)}/mlflow.db")
        self._metric, self._param = mlflow.entities.Metric, mlflow.entities.Param
        if "mlflow" in ids:
            self._client.update_run(ids["mlflow"], status="RUNNING")
        else:
            found = self._client.get_experiment_by_name(project)
            experiment = found.experiment_id if found else self._client.create_experiment(project)
            ids["mlflow"] = self._client.create_run(experiment, run_name=_run_name(workdir)).info.run_id
            params = [self._param(key, str(value)[:500]) for key, value in _flat(settings)]
            for start in range(0, len(params), 100):
                self._client.log_batch(ids["mlflow"], params=params[start : start + 100])
        self._run_id = ids["mlflow"]

    def write(self, step: int, values: Mapping[str, float | int]) -> None:
        """The numbers of a step."""
        now = int(time.time() * 1000)
        metrics = [self._metric(name, value, now, step) for name, value in values.items()]
        for start in range(0, len(metrics), _BATCH):
            self._client.log_batch(self._run_id, metrics=metrics[start : start + _BATCH])

    def flush(self) -> None:
        """Every request is done when `write` returns."""

    def close(self) -> None:
        """Marks the run as finished; a resumed one is marked as running again."""
        self._client.set_terminated(self._run_id)


class Guarded:
    """A tracker whose failures are said once and end nothing."""

    def __init__(self, tracker: Tracker, note: Callable[[str], None]):
        """`note` is given a line for people."""
        self._tracker, self._note, self._failures = tracker, note, 0
        self.name, self.takes_back = tracker.name, tracker.takes_back

    def write(self, step: int, values: Mapping[str, float | int]) -> None:
        """The numbers of a step."""
        with self._guard(f"step {step}"):
            self._tracker.write(step, values)

    def flush(self) -> None:
        """Makes what was written visible."""
        with self._guard("flushing"):
            self._tracker.flush()

    def close(self) -> None:
        """The run ends or pauses."""
        with self._guard("closing"):
            self._tracker.close()
        if self._failures > 1:
            self._note(f"{self.name}: {self._failures} writes failed; metrics.jsonl has all steps")

    @contextlib.contextmanager
    def _guard(self, what: str):
        try:
            yield
        except Exception as error:  # a service may raise anything, and none of it is worth a run
            self._failures += 1
            if self._failures == 1:
                self._note(_said(self.name, what, error))


def _said(name: str, what: str, error: Exception) -> str:
    return f"{name}: {what}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _read_ids(workdir: str) -> dict[str, str]:
    path = f"{workdir.rstrip('/')}/{_IDS_NAME}"
    try:
        return {name: str(value) for name, value in records.read(path, "remove it").items()}
    except FileNotFoundError:
        return {}


def _run_name(workdir: str) -> str:
    return os.path.basename(workdir.rstrip("/"))


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found = []
    for name, value in values.items():
        nested = isinstance(value, Mapping) and value
        found += _flat(value, f"{prefix}{name}.") if nested else [(f"{prefix}{name}", json.dumps(value))]
    return found
