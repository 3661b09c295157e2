"""Reads documents: finds the files that an input names and streams their rows, whatever columns they have.

An input is a file, a folder or a pattern with `*`, `**`, `?` or `[...]`, local or behind a URL (`gs://`, `hf://`). A
folder stands for every readable file below it, links followed, except names that begin with `_` or `.` and plain
`.json` files, which are often side files. A name that exists literally is that file or folder, even if it contains
pattern characters. A pipe or a device is an error. Formats: JSON lines (`.jsonl`, `.ndjson`, `.json`; also packed:
`.gz`, `.zst`, `.bz2`, `.xz`) and Parquet; compression is detected from the content. A `.json` file may be one array of
objects. A file of 0 bytes has no rows.

A row is malformed if it is not UTF-8, not JSON, not an object, longer than MAX_ROW_BYTES (64 MiB), or if its text is
missing, null, not a string or contains a lone surrogate. It is reported with its number (from 1: the line of a JSON
lines file, blank lines counted; the row of a Parquet file) and the reason, and reading goes on. An empty text is not
malformed. If no row of a file has the text column, that is an error listing the file's columns. No message contains a
document's text.

See `outputs` for reading the folders that our commands write, `identity` for a row's id and `harm` for its harm score.
"""

from safelm.documents.files import (
    PARQUET,
    SUFFIXES,
    TSV_SUFFIXES,
    DocumentFile,
    check_apart,
    content_sha256,
    describe,
    file_at,
    find,
    find_named,
    has_changed,
    list_files,
    sample_sha256,
    suffix,
    without_place,
)
from safelm.documents.harm import HarmScore, harm_score
from safelm.documents.identity import ID_COLUMN, content_id, is_content_id, required_id, row_id
from safelm.documents.json_lines import (
    MAX_ROW_BYTES,
    JsonRow,
    MissingColumnError,
    OnMalformed,
    Part,
    check_text,
    field,
    iter_json,
    lines_before,
    missing_column,
    parse_object,
)
from safelm.documents.malformed import (
    Malformed,
    MalformedError,
    MalformedLimit,
    Quarantine,
    RowTally,
    add_limit_flags,
    limit_from_flags,
)
from safelm.documents.opening import is_compressed, open_binary, read_text
from safelm.documents.outputs import MANIFEST_NAME, SETTINGS_NAME, WRITTEN_BY, declare_no_documents
from safelm.documents.parquet import (
    batch_rows,
    check_columns,
    codec_of,
    field_names,
    has_no_columns,
    iter_parquet,
    may_be_null,
    open_parquet,
    raw_parquet,
)
from safelm.documents.rows import Row, check_names, iter_rows, read_rows

__all__ = [
    "ID_COLUMN",
    "MANIFEST_NAME",
    "MAX_ROW_BYTES",
    "PARQUET",
    "SETTINGS_NAME",
    "SUFFIXES",
    "TSV_SUFFIXES",
    "WRITTEN_BY",
    "DocumentFile",
    "HarmScore",
    "JsonRow",
    "Malformed",
    "MalformedError",
    "MalformedLimit",
    "MissingColumnError",
    "OnMalformed",
    "Part",
    "Quarantine",
    "Row",
    "RowTally",
    "add_limit_flags",
    "batch_rows",
    "check_apart",
    "check_columns",
    "check_names",
    "check_text",
    "codec_of",
    "content_id",
    "content_sha256",
    "declare_no_documents",
    "describe",
    "field",
    "field_names",
    "file_at",
    "find",
    "find_named",
    "harm_score",
    "has_changed",
    "has_no_columns",
    "is_compressed",
    "is_content_id",
    "iter_json",
    "iter_parquet",
    "iter_rows",
    "limit_from_flags",
    "lines_before",
    "list_files",
    "may_be_null",
    "missing_column",
    "open_binary",
    "open_parquet",
    "parse_object",
    "raw_parquet",
    "read_rows",
    "read_text",
    "required_id",
    "row_id",
    "sample_sha256",
    "suffix",
    "without_place",
]
