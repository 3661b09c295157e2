"""Runs of safelm.score by a scorer that reads a level from the text, and what they leave: for the tests of them."""

import json

from safelm import documents, score
from safelm.jobs.output import OutputFolder
from safelm.safety.scoring import columns, shard
from safelm.safety.scoring.scorers import describe, load_scorers, parse_specs

SCORER = "python:scorers_for_tests:LevelScorer"
FOLDERS = (*columns.FOLDERS, columns.QUARANTINE)


def run(output, *inputs, scorers=SCORER, workers=1, **flags):
    argv = [f"--output={output}", f"--scorers={scorers}", f"--workers={workers}"]
    argv += [f"--input={path}" for path in inputs] + [f"--{name}={value}" for name, value in flags.items()]
    score.main(score.arguments().parse_args(argv))
    return json.loads((output / "manifest.json").read_text())


def rows_of(output, folder):
    found = []
    for path in documents.list_files(str(output / folder)) if (output / folder).exists() else []:
        found += [row for _, row in documents.read_rows(path)]
    return found


def data(output):
    """The bytes of all scored and quarantined rows, by file."""
    return {
        str(path.relative_to(output)): path.read_bytes()
        for folder in FOLDERS
        for path in sorted((output / folder).glob("*"))
    }


def make_rows(count, first=0):
    return [{"id": f"d{i}", "text": f"Document {i} has level{i % 6}.", "n": i} for i in range(first, first + count)]


def work_for(output, spec=SCORER, text_column="text"):
    specs = parse_specs(spec)
    loaded = load_scorers(specs)
    return shard.ScoreWork(str(output), describe(specs, loaded), columns.probe(loaded), text_column, "id")


def score_one(output, path, part=None, spec=SCORER):
    """One shard without Beam; its record."""
    work, out = work_for(output, spec), OutputFolder(str(output))
    job = shard.ShardJob(0, f"000000-{'whole' if part is None else part.start}", str(path), part)
    return shard.score_shard(job, work, work.load(), out)
