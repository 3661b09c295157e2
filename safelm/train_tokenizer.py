"""Trains a byte-level BPE vocabulary, harm tag included, on the text column of JSON lines or Parquet files.

Inputs are files, folders or patterns, local or on any fsspec store (gs://, hf://), read as `safelm.documents` says.
Files are streamed: memory holds word counts, not text. A row that can't be used is counted, the first few are named,
and training goes on, unless such rows outnumber the documents.
The result is a folder that `safelm.tokenizer.Tokenizer.from_pretrained` and `transformers` load.
"""

import argparse
import dataclasses
import logging
from collections.abc import Iterator, Sequence

import fsspec
from tqdm import tqdm

from safelm import cli, documents
from safelm.tokenizer import Tokenizer

log = logging.getLogger(__name__)

_MAX_NAMED = 10  # malformed rows named one by one; the others are only counted


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


def read_texts(files: Sequence[str], text_column: str, counts: CorpusCounts) -> Iterator[str]:
    """The texts of `files` in order; `counts` is kept up to date while they are read.

    Raises:
        ValueError: a file that can't be read to its end, or that lacks the column `text_column`.
    """
    for file in files:

        def skip(malformed: documents.Malformed, file: str = file) -> None:
            counts.add_malformed(f"{file} row {malformed.row}", malformed.reason)

        for row in documents.iter_rows(file, skip, text_column=text_column, columns=()):
            text = row.values[text_column]
            counts.documents += 1
            counts.num_bytes += len(text.encode())
            yield text


def train_tokenizer(patterns: Sequence[str], *, text_column: str, vocab_size: int) -> tuple[Tokenizer, CorpusCounts]:
    """Trains on every document that `patterns` match.

    Raises:
        FileNotFoundError, ValueError: bad input, no text in any row, or more malformed rows than documents.
    """
    counts = CorpusCounts()
    texts = read_texts(documents.list_files(patterns), text_column, counts)
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
    arguments.add_argument("--input", nargs="+", action="extend", required=True, help="files, folders or patterns")
    arguments.add_argument("--text_column", default="text", help="column that holds the text (default: %(default)s)")
    arguments.add_argument("--vocab_size", type=int, default=2048, help="ids to end with (default: %(default)s)")
    arguments.add_argument("--output", required=True, help="folder for tokenizer.json")
    return arguments


if __name__ == "__main__":
    cli.run(main, parser())
