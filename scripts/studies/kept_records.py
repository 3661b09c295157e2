"""Kept records of the studies of configs/ladder.py, and figures that are made of measurements; not started by hand."""

import contextlib
import hashlib
import json
import pathlib
import runpy
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from safelm import cli
from safelm.config_files import load_config
from safelm.io.files import write_whole
from safelm.ladder import records
from safelm.report import table

HERE = pathlib.Path(__file__).parent
DATA = HERE.parents[1] / "docs" / "results" / "data"
_DIGITS = 8  # of a hash
_HEAD = "made with `safelm ladder --records=FOLDER`:\n"  # what the table of records follows, at the page's end


class Study(NamedTuple):
    """A study's config, a folder in which the jobs of its records are done, and what every table of it says."""

    config: ConfigDict
    output: pathlib.Path
    about: dict[str, str]


def are_kept(variant: str) -> bool:
    """Whether there are records of a study."""
    return (DATA / f"ladder_{variant}" / "settings.json").exists()


@contextlib.contextmanager
def opened(variant: str, models: Sequence[str] = ()) -> Iterator[Study]:
    """The study `variant` from docs/results/data/ladder_VARIANT.

    Args:
      models: those to look at, with the seeds that all of them have; none: all, with the seeds that any has.

    Raises `cli.UserError` if nothing is kept there.
    """
    config = load_config(f"configs/ladder.py:{variant}").copy_and_resolve_references()
    folder = DATA / f"ladder_{variant}"
    with tempfile.TemporaryDirectory() as place:
        output = pathlib.Path(place)
        config.models = tuple(models) or config.models
        kept = records.restore(config, output, folder)
        if not kept:
            raise cli.UserError(f"{folder}: no records yet")
        found = {(record["seed"], record["model"]) for record in kept}
        seeds = sorted({seed for seed, _ in found if all((seed, model) in found for model in models)})
        config.seeds = tuple(seeds)
        machines = ", ".join(sorted({record["machine"] for record in kept}))
        about = {
            "command": f"safelm ladder --config=configs/ladder.py:{variant}",
            "machine": f"{machines}; seeds {', '.join(map(str, seeds))}",
            "scale": "linear",
        }
        yield Study(config, output, about)


def fingerprints() -> str:
    """A table of all kept records: how many of which seeds, the hashes of their code and data, the time they took."""
    rows = []
    for folder in sorted(DATA.glob("ladder_*/")):
        kept = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("seed-*.json"))]
        seconds = sum(job["seconds"] for record in kept for job in record["jobs"].values())
        data = {_data_hash(record["data"]) for record in kept}
        rows.append(
            [
                f"`{folder.name.removeprefix('ladder_')}`",
                f"{len(kept)}",
                ", ".join(map(str, sorted({record["seed"] for record in kept}))),
                ", ".join(sorted({record["code"][:_DIGITS] for record in kept})),
                ", ".join(sorted(data)),
                f"{seconds / 3600:.1f}",
            ]
        )
    return table.markdown(["study", "rungs x seeds", "seeds", "code", "data", "hours"], rows)


def _data_hash(facts: Mapping[str, Any]) -> str:
    """Of the corpus; "none" of records from before real text had one."""
    corpus = facts.get("corpus", {})
    if "sha256" in corpus:
        return corpus["sha256"][:_DIGITS]
    if not (files := {name: file["sha256"] for name, file in corpus.get("files", {}).items()}):
        return "none"
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:_DIGITS]


def with_fingerprints(page: str) -> str:
    """The page with the table below its head of records written anew."""
    before, head, _ = page.partition(_HEAD)
    return f"{before}{head}\n{fingerprints()}" if head else page


def percent(values: Mapping[str, Any]) -> list[float]:
    """[value, low, high] of an estimate, in percent."""
    return [round(100 * values[name], 1) for name in ("value", "low", "high")]


def write(tables: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes the tables that have rows to docs/results/data, and then draws every picture and table anew."""
    for name, study in tables.items():
        if study["rows"]:
            write_whole(DATA / f"{name}.json", json.dumps(study, indent=1) + "\n")
    runpy.run_path(str(HERE / "draw_results.py"))["draw_all"]()
    page = DATA.parent / "README.md"
    write_whole(page, with_fingerprints(page.read_text(encoding="utf-8")))
