"""Runs of safelm.synthesize on synthetic documents, and what they leave: for the tests of them."""

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
from document_files import write_rows

from safelm import synthesize
from safelm.safety.synthesis.kinds import SOURCE_SCORES
from safelm.safety.synthesis.report import charts
from safelm.synthetic_web import corpus

HELPERS = Path(__file__).parent
ROOT = HELPERS.parents[1]
SCORER = "python:safelm.safety.lexicon_scorer:LexiconScorer"
TROUBLED = "python:writers_for_tests:TroubledWriter"
NAMES = ("podcast", "page-1", "validation-00000")


def no_charts(monkeypatch) -> None:
    """Charts take seconds: most tests draw none."""
    monkeypatch.setattr(charts, "draw_png", lambda path, report: path.write_bytes(b""))
    monkeypatch.setattr(charts, "of_page", lambda report: {})


def rows_of(scores, count: int, start: int = 0) -> list[dict]:
    """Synthetic documents of these scores, scored by what the lexicon scorer says of them."""
    rows, number = [], start
    while len(rows) < count:
        document = corpus.draft(3, "train", number)
        if document.score in scores:
            metadata = {"language": "en", "category": document.topic.category, "url": f"https://web.invalid/{number}"}
            rows.append(
                {"id": f"doc-{number}", "text": document.text, "metadata": metadata, "harm_score": document.score}
            )
        number += 1
    return rows


def write_sources(root: Path) -> Path:
    """A folder a kind: three files of documents with the scores that the kind is made from."""
    for kind, scores in SOURCE_SCORES.items():
        rows = rows_of(scores, 36)
        for at, name in enumerate(NAMES):
            write_rows(root / kind / f"{name}.jsonl", rows[12 * at : 12 * at + 12])
    return root


def run(output: Path, inputs, *more: str, kind: str = "safeweb", writer: str = "template:") -> dict:
    """Runs the command in this process; the manifest."""
    argv = [f"--kind={kind}", f"--output={output}", f"--writer={writer}", f"--scorer={SCORER}"]
    argv += [f"--input={one}" for one in ([inputs] if isinstance(inputs, str | Path) else inputs)]
    argv += [] if any(flag.startswith("--workers") for flag in more) else ["--workers=1"]
    synthesize.main(synthesize.arguments().parse_args([*argv, *more]))
    return json.loads((output / "manifest.json").read_text())


def published(output: Path) -> dict[str, dict]:
    """Rows by source id; every id there once."""
    rows = []
    for path in sorted(output.iterdir()):
        if path.name.endswith(".jsonl.gz"):
            rows += [json.loads(line) for line in gzip.open(path, "rt")]
        elif path.suffix == ".parquet":
            rows += pyarrow.parquet.read_table(path).to_pylist()
    found = {row["source_id"]: row for row in rows}
    assert len(found) == len(rows) == len({row["id"] for row in rows})
    return found


def rejected(output: Path) -> dict[str, dict]:
    """What was dropped, by source id."""
    lines = [json.loads(line) for path in (output / "rejected").glob("*.rejected") for line in open(path)]
    return {line["source_id"]: line for line in lines if "source_id" in line}


def data(output: Path) -> dict[str, bytes]:
    """What a run leaves for others, by name: all but what depends on the clock."""
    skipped = ("report", ".lock", ".workers", "manifest.json")
    files = [p for p in output.rglob("*") if p.is_file() and p.relative_to(output).parts[0] not in skipped]
    return {str(path.relative_to(output)): path.read_bytes() for path in files}


def comparable(manifest: dict) -> dict:
    """A manifest without what depends on the clock."""
    shards = [{key: value for key, value in shard.items() if key != "seconds"} for shard in manifest["shards"]]
    return manifest | {"shards": shards, "speed": None}
