"""Trains a byte-level BPE vocabulary, harm tag included, on the text column of JSON lines or Parquet files.

Files may be local or behind a URL (gs://, hf://). They are streamed, so memory holds word counts and no text. Unusable
rows are counted up to a limit, and the first few are named. Files without the column, such as conversations beside web
text, are named and skipped, unless no file has it.
The result is a folder that `safelm.text.tokenizer.Tokenizer.from_pretrained` and `transformers` load. One that holds
another vocabulary is left alone without --overwrite.
"""

import argparse
import contextlib
import dataclasses
import logging
import os
from collections.abc import Iterator, Sequence

from safelm import cli, documents
from safelm.documents import MalformedLimit
from safelm.io import remote
from safelm.io.progress import Bar
from safelm.text.control_tokens import with_control_tokens
from safelm.text.tokenizer import Tokenizer
from safelm.text.tokenizer_sources import TOKENIZER_FILE

log = logging.getLogger(__name__)

_MAX_NAMED = 10  # malformed rows named one by one; the others are only counted


@dataclasses.dataclass
class CorpusCounts:
    """What was read: documents used, their bytes in UTF-8, rows that could not be used."""

    documents: int = 0
    num_bytes: int = 0
    malformed: int = 0


def read_texts(
    files: Sequence[str], text_column: str, counts: CorpusCounts, limit: MalformedLimit | None = None
) -> Iterator[str]:
    """The texts of `files` in order; `counts` is kept up to date while they are read.

    Raises ValueError for a file that can't be read to its end or has too many malformed rows, and where no file has the
    column.
    """
    lacking: list[documents.MissingColumnError] = []
    for file in files:
        tally = documents.RowTally(file, limit or MalformedLimit())
        skipped = _Skipped(file, counts, tally)
        try:
            for row in documents.iter_rows(file, skipped.add, text_column=text_column, columns=[]):
                tally.add()
                text = row.values[text_column]
                counts.documents += 1
                counts.num_bytes += len(text.encode())
                yield text
        except documents.MissingColumnError as error:
            lacking.append(error)
            continue
        skipped.tell()
        tally.finish()
    if len(lacking) == len(files):
        raise lacking[0]
    for error in lacking:
        log.warning("left out: %s", error)


class _Skipped:
    """The malformed rows of one file, which are told once it is read: in one that lacks the column no row is."""

    def __init__(self, file: str, counts: CorpusCounts, tally: documents.RowTally):
        self._file, self._counts, self._tally = file, counts, tally
        self._named: list[tuple[int, str]] = []

    def add(self, malformed: documents.Malformed) -> None:
        """Takes a row."""
        self._tally.add(malformed)
        if len(self._named) < _MAX_NAMED:
            self._named.append((malformed.row, malformed.reason))

    def tell(self) -> None:
        """Adds the rows to the counts, and names the first of the corpus."""
        for row, reason in self._named[: max(0, _MAX_NAMED - self._counts.malformed)]:
            log.warning("skipped %s row %d: %s", self._file, row, reason)
        self._counts.malformed += self._tally.malformed


def train_tokenizer(
    patterns: Sequence[str], *, text_column: str, vocab_size: int, limit: MalformedLimit | None = None
) -> tuple[Tokenizer, CorpusCounts]:
    """Trains on every document in the files that `patterns` name.

    Raises FileNotFoundError or ValueError for bad input, no text in any row, or too many malformed rows.
    """
    counts = CorpusCounts()
    texts = read_texts(documents.list_files(patterns), text_column, counts, limit)
    with Bar(texts, desc="read", unit=" documents", disable=None) as progress:
        tokenizer = Tokenizer.train((text for text in progress), vocab_size)
    if not counts.num_bytes:
        raise ValueError(
            f"--input={' '.join(patterns)}: the corpus has no text ({counts.documents} empty documents, "
            f"{counts.malformed} malformed rows)"
        )
    return tokenizer, counts


@contextlib.contextmanager
def writable_output(output: str, *, overwrite: bool) -> Iterator[None]:
    """Checks that the folder can be written; if the block fails, a local one that was made for that is removed.

    Raises ValueError or OSError naming --output.
    """
    remote.check_output(output)
    before = remote.kind(output)
    if before == "file":
        raise ValueError(f"--output={output}: is a file, not a folder")
    remote.check_writable(output)
    if not overwrite and remote.exists(f"{output.rstrip('/')}/{TOKENIZER_FILE}"):
        log.warning("--output=%s holds a vocabulary: without --overwrite another one is refused in the end", output)
    try:
        yield
    except BaseException:
        if before is None and not remote.is_remote(output):
            with contextlib.suppress(OSError):
                os.rmdir(output)
        raise


def save(tokenizer: Tokenizer, output: str, *, overwrite: bool) -> None:
    """Writes the folder, unless it holds the same vocabulary.

    Raises FileExistsError for one that holds another, if it is not to be overwritten.
    """
    try:
        former = "" if overwrite else Tokenizer.from_pretrained(output).hash
    except FileNotFoundError:
        former = ""
    except ValueError:
        former = "of no known form"
    if former not in ("", tokenizer.hash):
        raise FileExistsError(
            f"--output={output}: holds another vocabulary (sha256 {former}) than the trained one ({tokenizer.hash}); "
            "nothing was written: choose another folder, or give --overwrite"
        )
    if not former:
        tokenizer.save(output)


def main(arguments: argparse.Namespace) -> None:
    """Trains, saves and prints one line about the result."""
    with writable_output(arguments.output, overwrite=arguments.overwrite):
        tokenizer, counts = train_tokenizer(
            arguments.input,
            text_column=arguments.text_column,
            vocab_size=arguments.vocab_size,
            limit=documents.limit_from_flags(arguments),
        )
    if tokenizer.vocab_size < arguments.vocab_size:
        log.warning(
            "the corpus is too small for --vocab_size=%d: it gave %d ids", arguments.vocab_size, tokenizer.vocab_size
        )
    if arguments.control_tokens:
        tokenizer = with_control_tokens(tokenizer, arguments.control_tokens.split(","))
    save(tokenizer, arguments.output, overwrite=arguments.overwrite)
    print(
        f"{arguments.output}: {tokenizer.vocab_size} ids from {counts.documents} documents ({counts.num_bytes} bytes), "
        f"{counts.malformed} malformed rows skipped, harm tag id {tokenizer.harm_tag_id}, sha256 {tokenizer.hash}"
    )


def parser() -> argparse.ArgumentParser:
    arguments = cli.parser(
        "safelm.train_tokenizer",
        __doc__,
        "python -m safelm.train_tokenizer --input 'corpus/*/train-*.jsonl.gz' --vocab_size 2048 --output tokenizer",
        buckets=("output",),
    )
    arguments.add_argument(
        "--input", nargs="+", action="extend", required=True, metavar="FILES", help="files, folders or patterns"
    )
    arguments.add_argument("--text_column", default="text", help="column that holds the text (default: %(default)s)")
    arguments.add_argument("--vocab_size", type=int, default=2048, help="size of the vocabulary (default: %(default)s)")
    arguments.add_argument(
        "--control_tokens",
        metavar="TOKEN,...",
        help="special tokens to add on top of --vocab_size, such as <good>,<bad>",
    )
    arguments.add_argument("--output", required=True, help="folder for tokenizer.json")
    arguments.add_argument("--overwrite", action="store_true", help="replace another vocabulary in the folder")
    documents.add_limit_flags(arguments)
    return arguments


if __name__ == "__main__":
    cli.run(main, parser())
