"""Finds and reads what lies below the places that the command line names."""

import dataclasses
import logging
import os
import pathlib
from collections.abc import Collection, Sequence

from safelm.dashboard import evaluations, harnesses, inspect_logs, studies, training
from safelm.dashboard.measures import Board, Source
from safelm.evaluate.comparing.results import Row, Run, runs_of
from safelm.io import records, remote

_logger = logging.getLogger("safelm.dashboard")

METRICS, CAPABILITY, RESULTS = "metrics.jsonl", "capability.json", "results.json"
_NOT_ENTERED = ("checkpoints", "tokenizer", "tokens", "tensorboard", "corpus", "compiled")
LEFT_OUT = "left out"


@dataclasses.dataclass(frozen=True)
class Place:
    """A place to read.

    Attributes:
      name: put before the names of its models, or the model's name where a file of another harness holds one; or "".
    """

    name: str
    path: pathlib.Path


def parse_place(flag: str) -> Place:
    """The place of `PATH` or `NAME=PATH`. Raises ValueError for a remote one, FileNotFoundError if nothing is there."""
    name, equals, path = flag.partition("=")
    if not equals or "/" in name or os.path.exists(flag):
        name, path = "", flag
    if remote.is_remote(path):
        raise ValueError(f"{flag}: the dashboard reads local files; copy it first")
    if not path or not os.path.exists(path):
        raise FileNotFoundError(f"{flag}: no such file or folder")
    return Place(name.strip(), pathlib.Path(path))


def read_board(places: Sequence[Place], *, may_differ: Collection[str] = (), show_texts: bool = False) -> Board:
    """Reads everything below the places.

    Below a folder, files that the dashboard does not know or that are damaged are left out, and the list of sources
    says why; a file that is named itself must be one it knows.

    Raises ValueError or OSError naming the file; ValueError for a place with nothing to show.
    """
    board, runs = Board(), []
    for place in places:
        files = [place.path] if place.path.is_file() else _files(place.path)
        found = [_take(board, runs, place, path) for path in files]
        board.sources += found
        unknown = next((source for source in found if source.kind == LEFT_OUT), None)
        if unknown is not None and place.path.is_file():
            raise ValueError(f"{unknown.path}: {unknown.note}")
        if all(source.kind == LEFT_OUT for source in found):
            why = f"; {unknown.path}: {unknown.note}" if unknown else ""
            raise ValueError(
                f"{place.path}: nothing to show there: no {RESULTS} or {CAPABILITY} of safelm.evaluate, no {METRICS} "
                f"of a training run, no log of Inspect, no result file of lm-eval{why}"
            )
    evaluations.add_runs(board, runs, may_differ=may_differ, show_texts=show_texts)
    return board


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The files below a folder that may be read, without entering data and checkpoints."""
    found = []
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in _NOT_ENTERED and not name.startswith("."))
        paths = [pathlib.Path(root, name) for name in sorted(names) if _may_be_read(name)]
        found += [path for path in paths if path.is_file()]
    return found


def _may_be_read(name: str) -> bool:
    is_results = name.startswith("results") and name.endswith(".json")
    is_inspect = name[:4].isdigit() and name.endswith(".json")  # Inspect begins a log's name with the time
    return name in (METRICS, CAPABILITY) or is_results or is_inspect or name.endswith(".eval")


def _take(board: Board, runs: list[Run], place: Place, path: pathlib.Path) -> Source:
    """Reads one file; one that was found below a folder and is not as its kind is written is left out.

    Raises ValueError naming the file if it was named itself, or a number of it is there already.
    """
    own, own_runs = Board(), []
    try:
        source = _read(own, own_runs, place, path)
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        if isinstance(error, ValueError):
            reason = str(error).removeprefix(f"{path}: ")
        else:
            reason = f"not as such a file is written ({type(error).__name__}: {error})"
        if place.path.is_file():
            raise ValueError(f"{path}: {reason}") from error
        _logger.warning("left out: %s: %s", path, reason)
        return Source(str(path), LEFT_OUT, reason)
    board.merge(own, source=str(path))
    runs += own_runs
    return source


def _read(board: Board, runs: list[Run], place: Place, path: pathlib.Path) -> Source:
    """Reads one file into an empty board."""
    prefix = f"{place.name}/" if place.name else ""
    if path.name == METRICS:
        inner = str(path.parent.relative_to(place.path)) if place.path.is_dir() else "."
        name = prefix + inner if inner != "." else place.name or path.resolve().parent.name
        board.curves.append(training.read_curves(path, name))
        return Source(str(path), "training run")
    values = inspect_logs.read_eval_log(path) if path.suffix == ".eval" else records.read(path, "leave it out")
    if harnesses.is_inspect(values):
        return Source(str(path), "Inspect log", harnesses.add_inspect(board, values, place.name, str(path)))
    if harnesses.is_lm_eval(values):
        harnesses.add_lm_eval(board, values, place.name, str(path))
        return Source(str(path), "lm-eval results")
    if "headline" in values and "runs" in values:
        found = runs_of(values, str(path))
        runs += [dataclasses.replace(run, row=Row(prefix + run.row.model, run.row.method)) for run in found]
        return Source(str(path), "evaluation", "" if found else "no answers: likelihoods alone")
    if path.name == CAPABILITY:
        evaluations.add_capability(board, values, prefix, str(path))
        return Source(str(path), "capability")
    if studies.is_gate(values):
        studies.add_gate(board, values, prefix, str(path))
        return Source(str(path), "release gate")
    if studies.is_ladder(values):
        studies.add_ladder(board, values, prefix, str(path))
        return Source(str(path), "ladder")
    unlike = (
        "neither results of safelm.evaluate, release_gate or ladder nor a log of Inspect nor a result file of lm-eval"
    )
    return Source(str(path), LEFT_OUT, unlike)
