"""Runs of safelm.score --output_rows=annotations by a scorer that reads a level from the text, and what they leave."""

import json

import pyarrow.parquet

from safelm import documents, score
from safelm.safety.scoring import columns
from safelm.safety.scoring.annotating import AnnotateWork
from safelm.safety.scoring.scorers import describe, load_scorers, parse_specs

SCORER = "python:scorers_for_tests:LevelScorer"


def annotate(output, *inputs, scorers=SCORER, workers=1, **flags):
    """The manifest of a run, None where a slice leaves shards to others."""
    argv = [f"--output={output}", f"--scorers={scorers}", "--output_rows=annotations"]
    argv += [] if "array_task" in flags else [f"--workers={workers}"]
    argv += [f"--input={path}" for path in inputs] + [f"--{name}={value}" for name, value in flags.items()]
    score.main(score.arguments().parse_args(argv))
    manifest = output / "manifest.json"
    return json.loads(manifest.read_text()) if manifest.exists() else None


def work_for(output, spec=SCORER, **settings):
    specs = parse_specs(spec)
    loaded = load_scorers(specs)
    return AnnotateWork(str(output), describe(specs, loaded), columns.probe(loaded), "text", "id", **settings)


def rows(path):
    return pyarrow.parquet.read_table(path).to_pylist()


def find(*paths):
    return documents.find([str(path) for path in paths])


def contents(folder):
    """The bytes of all files of annotations, by name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.parquet"))}
