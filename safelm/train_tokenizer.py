"""Trains a byte-level BPE vocabulary, harm tag included, on the text column of jsonl(.gz) or parquet files.

Files may be local or on any fsspec store (gs://, hf://). They are streamed: memory holds word counts, not text. A row
that can't be used is counted, the first few are named, and training goes on, unless such rows outnumber the documents.
The result is a folder that `safelm.tokenizer.Tokenizer.from_pretrained` and `transformers` load.
"""

import argparse
import dataclasses
import json
import logging
import zlib
from collections.abc import Iterator, Sequence

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from safelm import cli
from safelm.tokenizer import Tokenizer

log = logging.getLogger(__name__)

_JSONL_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz")
_MAX_NAMED = 10  # malformed rows named one by one; the others are only counted
_PARQUET_BATCH_ROWS = 1024


@dataclasses.dataclass
class CorpusCounts:
    """What was read: documents used, their bytes in UTF-8, rows that could not be used and the first such row."""

    documents: int = 0
    num_bytes: int = 0
    malformed: int = 0
    first_malformed: str = ""

    def add_malformed(self, place: str, reason: str) -> None:
        self.malformed += 1
        self.first_malformed = self.first_malformed or f"{place}: {reason}"
        if self.malformed <= _MAX_NAMED:
            log.warning("skipped %s: %s", place, reason)


def find_files(patterns: Sequence[str]) -> list[str]:
    """The files that the patterns match, each once, sorted within a pattern.

    Raises:
        FileNotFoundError: a pattern that matches no file.
        ValueError: a file that is neither jsonl(.gz) nor parquet.
    """
    files: dict[str, None] = {}
    for pattern in patterns:
        filesystem, inner = fsspec.core.url_to_fs(pattern)
        found = sorted(path for path in filesystem.glob(inner) if filesystem.isfile(path))
        if not found:
            raise FileNotFoundError(f"--input={pattern}: no such file")
        is_local = isinstance(filesystem, fsspec.get_filesystem_class("file"))
        files |= dict.fromkeys(path if is_local else filesystem.unstrip_protocol(path) for path in found)
    for file in files:
        if not file.endswith((*_JSONL_SUFFIXES, ".parquet")):
            raise ValueError(f"--input: {file} is neither {', '.join(_JSONL_SUFFIXES)} nor .parquet")
    return list(files)


def read_texts(files: Sequence[str], text_column: str, counts: CorpusCounts) -> Iterator[str]:
    """The texts of `files` in order; `counts` is kept up to date while they are read.

    Raises:
        ValueError: a file that can't be read to its end, or a parquet file without the column `text_column`.
    """
    for file in files:
        rows = _parquet_rows(file, text_column) if file.endswith(".parquet") else _jsonl_rows(file, text_column)
        for place, text, reason in rows:
            if text is None:
                counts.add_malformed(place, reason)
                continue
            counts.documents += 1
            counts.num_bytes += len(text.encode())
            yield text


def train_tokenizer(patterns: Sequence[str], *, text_column: str, vocab_size: int) -> tuple[Tokenizer, CorpusCounts]:
    """Trains on every document that `patterns` match.

    Raises:
        FileNotFoundError, ValueError: bad input, no text in any row, or more malformed rows than documents.
    """
    counts = CorpusCounts()
    texts = read_texts(find_files(patterns), text_column, counts)
    with tqdm(texts, desc="read", unit=" documents", disable=None) as progress:
        tokenizer = Tokenizer.train((text for text in progress), vocab_size)
    if counts.malformed > counts.documents:
        raise ValueError(
            f"--input={' '.join(patterns)}: {counts.malformed} malformed rows, {counts.documents} documents; "
            f"the first: {counts.first_malformed}"
        )
    if not counts.num_bytes:
        raise ValueError(f"--input={' '.join(patterns)}: the corpus has no text ({counts.documents} empty documents)")
    return tokenizer, counts


def main(arguments: argparse.Namespace) -> None:
    """Trains, saves and prints one line about the result."""
    filesystem, inner = fsspec.core.url_to_fs(arguments.output)
    if filesystem.isfile(inner):
        raise ValueError(f"--output={arguments.output}: is a file, not a folder")
    tokenizer, counts = train_tokenizer(
        arguments.input, text_column=arguments.text_column, vocab_size=arguments.vocab_size
    )
    if tokenizer.vocab_size < arguments.vocab_size:
        log.warning(
            "the corpus is too small for --vocab_size=%d: it gave %d ids", arguments.vocab_size, tokenizer.vocab_size
        )
    tokenizer.save(arguments.output)
    print(
        f"{arguments.output}: {tokenizer.vocab_size} ids from {counts.documents} documents ({counts.num_bytes} bytes), "
        f"{counts.malformed} malformed rows skipped, harm tag id {tokenizer.harm_tag_id}, sha256 {tokenizer.hash}"
    )


def parser() -> argparse.ArgumentParser:
    arguments = cli.parser(
        "safelm.train_tokenizer",
        __doc__,
        "python -m safelm.train_tokenizer --input 'corpus/*/train-*.jsonl.gz' --vocab_size 2048 --output tokenizer",
    )
    arguments.add_argument(
        "--input", nargs="+", action="extend", required=True, help="jsonl(.gz) or parquet files, or glob patterns"
    )
    arguments.add_argument("--text_column", default="text", help="column that holds the text (default: %(default)s)")
    arguments.add_argument("--vocab_size", type=int, default=2048, help="ids to end with (default: %(default)s)")
    arguments.add_argument("--output", required=True, help="folder for tokenizer.json")
    return arguments


_Row = tuple[str, str | None, str]  # place, text, and where there is no text the reason


def _jsonl_rows(file: str, text_column: str) -> Iterator[_Row]:
    try:
        with fsspec.open(file, "rb", compression="infer") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield (f"{file} line {number}", *_json_text(line, text_column))
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{file}: can't be read to its end ({error})") from error


def _json_text(line: bytes, text_column: str) -> tuple[str | None, str]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return None, f"not JSON ({error})"
    if not isinstance(row, dict):
        return None, f"a JSON {type(row).__name__}, not an object"
    if text_column not in row:
        return None, f"no column {text_column!r} (has {', '.join(map(repr, row))})"
    text = row[text_column]
    if not isinstance(text, str):
        return None, f"column {text_column!r} holds {type(text).__name__}, not a string"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return None, f"column {text_column!r} has a lone surrogate at character {error.start}"
    return text, ""


def _parquet_rows(file: str, text_column: str) -> Iterator[_Row]:
    with fsspec.open(file, "rb") as handle:
        try:
            table = pq.ParquetFile(handle)
            schema = table.schema_arrow
            if text_column not in schema.names:
                raise ValueError(f"no column {text_column!r} (has {', '.join(map(repr, schema.names))})")
            if not _is_string(schema.field(text_column).type):
                raise ValueError(f"column {text_column!r} is {schema.field(text_column).type}, not a string")
            row = 0
            for batch in table.iter_batches(batch_size=_PARQUET_BATCH_ROWS, columns=[text_column]):
                for scalar in batch.column(0):
                    row += 1
                    yield (f"{file} row {row}", *_parquet_text(scalar, text_column))
        except (ValueError, OSError) as error:  # pyarrow's own errors are ValueError or OSError
            raise ValueError(f"{file}: {error}") from error


def _parquet_text(scalar: pa.Scalar, text_column: str) -> tuple[str | None, str]:
    try:
        text = scalar.as_py()
    except UnicodeDecodeError as error:
        return None, f"column {text_column!r} isn't UTF-8 ({error.reason} at byte {error.start})"
    return text, f"column {text_column!r} is null"


def _is_string(type_: pa.DataType) -> bool:
    return pa.types.is_string(type_) or pa.types.is_large_string(type_) or pa.types.is_string_view(type_)


if __name__ == "__main__":
    cli.run(main, parser())
