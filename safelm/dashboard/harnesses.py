"""Results of other harnesses: Inspect's logs and lm-evaluation-harness's result files.

Both give a value and, mostly, its standard error; the 95% interval is then the normal one, within 0 and 1 for shares.
Of Inspect's samples ids and scores are taken, never texts.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from safelm.dashboard.measures import HIGH, LOW, UNKNOWN, Board, CaseSet, Cell, Column, Labels, Protocol, Row
from safelm.evaluate.comparing.results import split_name
from safelm.evaluate.suites.benchmarks import short_id
from safelm.io import records
from safelm.stats.intervals import Z_95, wilson

INSPECT, LM_EVAL = "Inspect", "lm-eval"
_GRADES = {"C": "correct", "I": "incorrect", "P": "partial", "N": "no answer"}


def is_inspect(values: Mapping[str, Any]) -> bool:
    """Whether an object is an Inspect log."""
    return isinstance(values.get("eval"), Mapping) and "task" in values["eval"] and "status" in values


def is_lm_eval(values: Mapping[str, Any]) -> bool:
    """Whether an object is a result file of lm-evaluation-harness."""
    return isinstance(values.get("results"), Mapping) and isinstance(values.get("versions"), Mapping)


def add_inspect(board: Board, log: Mapping[str, Any], name: str, source: str) -> str:
    """Adds an Inspect log; returns a note for the list of sources.

    Args:
      name: MODEL[@STAGE][#SEED]; "" for the last part of the log's model.

    Raises ValueError for a log without results.
    """
    spec, results = log["eval"], log.get("results") or {}
    scores = results.get("scores") or []
    if not scores:
        raise ValueError(f"{source}: an Inspect log without results (status {log['status']})")
    fields = {
        "task": spec["task"],
        "task version": spec.get("task_version", 0),
        "task arguments": spec.get("task_args") or {},
        "data set": (spec.get("dataset") or {}).get("name"),
        "samples": (spec.get("dataset") or {}).get("samples"),
        "epochs": (spec.get("config") or {}).get("epochs"),
        "limit": (spec.get("config") or {}).get("limit"),
        "solver": spec.get("solver"),
        "generation": {k: v for k, v in (spec.get("model_generate_config") or {}).items() if v is not None},
        "scorers": [score["name"] for score in scores],
    }
    fields = _said(fields)
    key = records.fingerprint([INSPECT, fields])
    task = str(spec["task"]).rpartition("/")[2]
    board.protocols[key] = Protocol(INSPECT, task, fields)
    model, stage, seed = split_name(name or str(spec.get("model", "")).rstrip("/").rpartition("/")[2] or "model")
    method = (spec.get("model_args") or {}).get("method", "")
    row = Row(model, stage, str(method) if method else INSPECT)
    for score in scores:
        for column, cell in _score_cells(key, task, score):
            board.add(column, row, cell, source=source, seed=seed)
    if samples := log.get("samples") or []:
        _add_samples(board, key, row, seed, samples)
    return "" if log["status"] == "success" else f"not finished: its status is {str(log['status'])[:20]}"


def _score_cells(key: str, task: str, score: Mapping[str, Any]) -> Iterator[tuple[Column, Cell]]:
    metrics = score.get("metrics") or {}
    error = _number((metrics.get("stderr") or {}).get("value"))
    main = next((name for name in metrics if name not in ("stderr", "std", "var")), None)
    for name, metric in metrics.items():
        value = _number(metric.get("value"))
        if name == "stderr" or value is None:
            continue
        is_share = name in ("accuracy", "mean") and 0 <= value <= 1
        title = f"{task}, {score['name']}: {name}" if score["name"] != task else f"{task}: {name}"
        column = Column(key, INSPECT, title, UNKNOWN, percent=is_share, shown=name == main)
        cases = int(score.get("scored_samples") or 0)
        yield column, _with_error(value, error if name == main else None, cases, is_share)


def _add_samples(board: Board, key: str, row: Row, seed: int, samples: Sequence[Mapping[str, Any]]) -> None:
    several = any(sample.get("epoch", 1) > 1 for sample in samples)
    ids = [
        short_id(str(sample.get("id"))) + (f" (epoch {sample.get('epoch', 1)})" if several else "")
        for sample in samples
    ]
    scorers = list(dict.fromkeys(name for sample in samples for name in sample.get("scores") or {}))
    labels = {
        name: [_grade(((sample.get("scores") or {}).get(name) or {}).get("value")) for sample in samples]
        for name in scorers
    }
    board.cases.append(CaseSet(key, ids, [""] * len(ids), [None] * len(ids), [Labels(row, seed, labels)]))


def _grade(value: Any) -> str | None:
    """A score as a label; a text, which may be a model's, only as `text`."""
    if value is None:
        return None
    if isinstance(value, bool | int | float):
        return f"{value:g}" if not isinstance(value, bool) else str(value).lower()
    return _GRADES.get(value, "text") if isinstance(value, str) else type(value).__name__


def add_lm_eval(board: Board, found: Mapping[str, Any], name: str, source: str) -> None:
    """Adds a result file of lm-evaluation-harness.

    Args:
      name: MODEL[@STAGE][#SEED]; "" for the last part of the file's model.

    Raises ValueError for a file without a task.
    """
    if not found["results"]:
        raise ValueError(f"{source}: a result file of lm-eval without a task")
    model, stage, seed = split_name(name or _model_name(found))
    row = Row(model, stage, "")
    for task, metrics in found["results"].items():
        if not isinstance(metrics, Mapping):
            raise ValueError(f"{source}: the metrics of {task} are no object")
        fields = {
            "task": task,
            "version": found["versions"].get(task),
            "shots": (found.get("n-shot") or {}).get(task),
            "items": ((found.get("n-samples") or {}).get(task) or {}).get("effective"),
            "limit": (found.get("config") or {}).get("limit"),
            "chat template": found.get("chat_template_sha"),
            "system": found.get("system_instruction_sha"),
            "generation": (found.get("configs") or {}).get(task, {}).get("generation_kwargs"),
            "task hash": (found.get("task_hashes") or {}).get(task),
        }
        fields = _said(fields)
        key = records.fingerprint([LM_EVAL, fields])
        board.protocols[key] = Protocol(LM_EVAL, task, fields)
        for column, cell in _lm_eval_cells(key, task, metrics, (found.get("higher_is_better") or {}).get(task) or {}):
            board.add(column, row, cell, source=source, seed=seed)


def _lm_eval_cells(
    key: str, task: str, metrics: Mapping[str, Any], higher_is_better: Mapping[str, Any]
) -> list[tuple[Column, Cell]]:
    names = [name for name in metrics if "," in name and "_stderr," not in name]
    preferred = next((name for name in names if name.startswith("acc_norm,")), names[0] if names else None)
    cells = []
    for name in names:
        value = _number(metrics[name])
        if value is None:
            continue
        metric, _, chosen = name.partition(",")
        is_share = metric.startswith(("acc", "exact_match", "f1", "em")) and 0 <= value <= 1
        better = {True: HIGH, False: LOW}.get(higher_is_better.get(metric), UNKNOWN)
        title = f"{task}: {metric}" + (f", {chosen}" if chosen not in ("", "none") else "")
        error = _number(metrics.get(f"{metric}_stderr,{chosen}"))
        column = Column(key, LM_EVAL, title, better, percent=is_share, shown=name == preferred)
        cells.append((column, _with_error(value, error, int(metrics.get("sample_len") or 0), is_share)))
    return cells


def _model_name(found: Mapping[str, Any]) -> str:
    arguments = (found.get("config") or {}).get("model_args") or {}
    if isinstance(arguments, str):
        arguments = dict(part.split("=", 1) for part in arguments.split(",") if "=" in part)
    named = arguments.get("checkpoint") or found.get("model_name") or "model"
    return str(named).rstrip("/").rpartition("/")[2] or "model"


def _with_error(value: float, error: float | None, cases: int, is_share: bool) -> Cell:
    if error is None:
        return Cell(value, cases=cases)
    if is_share and not error and cases:  # all right or all wrong
        return Cell(value, *wilson(value, cases), cases)
    low, high = value - Z_95 * error, value + Z_95 * error
    return Cell(value, max(0.0, low), min(1.0, high), cases) if is_share else Cell(value, low, high, cases)


def _said(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that have a value."""
    return {name: value for name, value in fields.items() if value not in (None, {}, [])}


def _number(value: Any) -> float | None:
    """A finite number, else None: harnesses write "N/A" where they have none."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None
