"""Documents in files: which files an input names, and their rows, streamed, whatever columns they have.

An input is a file, a folder (every file below it that this can read, through links; names that begin with `_` or `.`
and plain `.json` files, often side files, are left out) or a pattern with `*`, `**`, `?` or `[...]`, local or behind a
URL (`gs://`, `hf://`). A name that is there as it is written is that file or folder, whatever characters it holds. A
pipe or a device is an error. Formats: JSON lines (`.jsonl`, `.ndjson`, `.json`; also packed: `.gz`, `.zst`, `.bz2`,
`.xz`) and Parquet; what a file is packed with is decided by its content. A `.json` file may be one array of objects.

A row is malformed when it is not UTF-8, not JSON, no object, longer than MAX_ROW_BYTES (64 MiB), or when its text is
missing, null, no string or holds half a Unicode pair. Such a row is reported with its number (from 1: the line of a
JSON lines file, blank ones counted; the row of a Parquet file) and the reason, and reading goes on. An empty text is
not malformed. A file in which no row has a text column is an error that lists the columns there are.
No message holds a document's text.

What of our own output folders is taken: `outputs`. The id of a row: `identity`. Its harm score: `harm`.
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
    field_names,
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
    "suffix",
    "without_place",
]
