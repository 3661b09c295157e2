"""Files of documents: JSON lines, perhaps compressed, and Parquet."""

import bz2
import gzip
import json
import lzma
from pathlib import Path

import pyarrow
import pyarrow.parquet
import zstandard

PACK = {  # what makes a compressed file's bytes, by the end of its name
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.compress,
    ".zstd": zstandard.compress,
}


def write_rows(path: Path, rows: list, row_group_size: int | None = 7) -> Path:
    """Writes a file of the kind that its name says; a row that is a string stands in it as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=row_group_size)
    else:
        lines = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
        path.write_bytes(PACK.get(path.suffix, bytes)(lines.encode()))
    return path
