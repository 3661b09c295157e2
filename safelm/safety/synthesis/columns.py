"""The columns of synthetic documents: those of the published sets, followed by each text's origin.

id              of the source, followed by the kind: the same source gives the same id
text
metadata        of the source: dump, url, date, file_path, language, language_score, token_count (null where it had
                none), and its harm score as score and int_score
style           name of the prompt's style
category        of the harm, as the writer of a dialogue named it, else as the source's columns do; may be empty
model           name of the writer
prompt_version  kind, version and hash of the prompts
source_id       id of the web document
gates           JSON: what each gate measured
text_harm_score of the text itself, by the run's scorer (score and int_score are the source's)
"""

import datetime
import gzip
import json
from collections.abc import Mapping, Sequence
from typing import Any

from safelm.safety.escaping import without_surrogates
from safelm.safety.synthesis.gate import Finding
from safelm.safety.synthesis.kinds import Draft, Source

PARQUET, JSON_LINES = ".parquet", ".jsonl.gz"
_METADATA = {
    "dump": "string",
    "url": "string",
    "date": "timestamp[s]",
    "file_path": "string",
    "language": "string",
    "language_score": "float64",
    "token_count": "int64",
    "score": "float64",
    "int_score": "int64",
}
_STRINGS = ("id", "text", "metadata", "style", "category", "model", "prompt_version", "source_id", "gates")
_GROUP_BYTES = 32 << 20
_LEVEL = 6


def row_id(source: Source, kind: str) -> str:
    """The id of a text made from a source."""
    return f"{source.id}-{kind}"


def make_row(
    draft: Draft, findings: Sequence[Finding], model: str, prompt_version: str, category: str
) -> dict[str, Any]:
    """The published row of a draft that passed; its date is a datetime."""
    gates = {finding.gate: dict(finding.values) for finding in findings}
    return {
        "id": row_id(draft.source, draft.kind),
        "text": draft.text,
        "metadata": _metadata(draft.source),
        "style": draft.style,
        "category": category,
        "model": model,
        "prompt_version": prompt_version,
        "source_id": draft.source.id,
        "gates": json.dumps(gates, sort_keys=True),
        "text_harm_score": next((values["score_after"] for values in gates.values() if "score_after" in values), None),
    }


def _metadata(source: Source) -> dict[str, Any]:
    """The row's own metadata, otherwise its columns of these names (as in FineWeb)."""
    nested = source.metadata.get("metadata")
    found = {**source.metadata, **(nested if isinstance(nested, Mapping) else {})}
    values = {name: _typed(found.get(name), kind) for name, kind in _METADATA.items()}
    return values | {"score": float(source.harm_score), "int_score": source.harm_score}


def _typed(value: Any, kind: str) -> Any:
    """The value if it can be converted to the type, otherwise None."""
    if kind == "string":
        return without_surrogates(value) if isinstance(value, str) else None
    if kind == "timestamp[s]":
        return _date(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        return None
    if abs(value) >= 1 << 63:
        return None
    return float(value) if kind == "float64" else int(value)


def _date(value: Any) -> datetime.datetime | None:
    """A moment in UTC without time zone, in whole seconds."""
    if isinstance(value, str):
        try:
            value = datetime.datetime.fromisoformat(value)
        except ValueError:
            return None
    if not isinstance(value, datetime.datetime):
        return None
    if value.tzinfo is not None:
        try:
            value = value.astimezone(datetime.UTC).replace(tzinfo=None)
        except OverflowError:  # before the year 1 or after 9999
            return None
    return value.replace(microsecond=0)


def schema() -> Any:
    """The Arrow schema of the rows."""
    import pyarrow

    types = {name: pyarrow.type_for_alias(kind) for name, kind in _METADATA.items()}
    columns = {name: pyarrow.string() for name in _STRINGS} | {"metadata": pyarrow.struct(list(types.items()))}
    return pyarrow.schema(columns | {"text_harm_score": pyarrow.int64()})


def suffix(input_path: str) -> str:
    """The suffix of an input file's output files."""
    return PARQUET if input_path.endswith(PARQUET) else JSON_LINES


class RowFile:
    """Writes rows to a file, Parquet or JSON lines (gzip) by `kind`; equal rows give equal bytes."""

    def __init__(self, path: str, kind: str):
        self.rows, self._pending, self._bytes = 0, [], 0
        self._parquet = self._file = None
        if kind == PARQUET:
            import pyarrow.parquet

            self._parquet = pyarrow.parquet.ParquetWriter(path, schema())
        else:
            self._file = open(path, "wb")
            self._gzip = gzip.GzipFile("", "wb", _LEVEL, self._file, mtime=0)

    def add(self, row: Mapping[str, Any]) -> None:
        """Writes one row."""
        self.rows += 1
        if self._file is not None:
            self._gzip.write(json.dumps(row, default=_plain).encode() + b"\n")
            return
        self._pending.append(row)
        self._bytes += len(row["text"])
        if self._bytes >= _GROUP_BYTES:
            self._flush()

    def close(self) -> None:
        """Finishes the file."""
        if self._file is not None:
            self._gzip.close()
            self._file.close()
            return
        self._flush()
        self._parquet.close()

    def __enter__(self) -> "RowFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _flush(self) -> None:
        import pyarrow

        if self._pending:
            table = pyarrow.Table.from_pylist(self._pending, schema())
            self._parquet.write_table(table, row_group_size=max(1, table.num_rows))
        self._pending, self._bytes = [], 0


def read_rows(path: str, kind: str) -> Any:
    """The rows of a file written by `RowFile`, in order; the file's name doesn't matter."""
    if kind == PARQUET:
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(path) as table:
            for batch in table.iter_batches(1024):
                yield from batch.to_pylist()
        return
    with gzip.open(path, "rb") as file:
        for line in file:
            yield json.loads(line)


def _plain(value: Any) -> str:
    return value.isoformat()
