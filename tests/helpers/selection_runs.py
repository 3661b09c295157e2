"""Runs of safelm.select on small corpora, and what they leave: for the tests of it."""

import json

from safelm import documents, select


def corpus(count, first=0, **columns):
    """Rows with scores, languages and numbers of tokens that a budget counts; `columns` override values by row."""
    rows = []
    for at in range(first, first + count):
        row = {
            "id": f"d{at}",
            "text": f"Page {at} of the {at % 13}th almanac says that {at * 7} lamps were lit.",
            "harm_score": at * at % 6,
            "language": "en" if at % 3 else "fr",
            "tokens": 10 + at % 17,
        }
        rows.append(row | {name: value(at) for name, value in columns.items()})
    return rows


def run(output, *inputs, **flags):
    """The manifest of a run."""
    argv = [f"--output={output}"] + [f"--input={path}" for path in inputs]
    if "tokenizer" not in flags:
        flags.setdefault("token_column", "tokens")
    for name, value in flags.items():
        values = value if isinstance(value, list) else [value]
        argv += [f"--{name}" if each is True else f"--{name}={each}" for each in values]
    select.main(select.arguments().parse_args(argv))
    return json.loads((output / "manifest.json").read_text())


def ids(output):
    """The ids of all rows that were written, in the files' order."""
    return [row["id"] for path in documents.list_files(str(output)) for _, row in documents.read_rows(path)]


def files(output):
    """Every file of documents or lists by name, as bytes."""
    return {path.name: path.read_bytes() for path in sorted(output.rglob("train-*")) if path.suffix != ".json"}


def step(manifest, name):
    """(documents, tokens) of a step of the funnel."""
    return next((each["documents"], each["tokens"]) for each in manifest["funnel"] if each["step"] == name)
