"""Makes the data safety report card of a corpus: its harm scores and its frequencies of harmful n-grams by category.

See Maini et al. 2025, section 3.5 and appendix D.

Takes any jsonl or Parquet files, local, gs:// or hf://, and folders written by safelm.score. --input is cut into
slices by harm score (0, 1 to 3, 4 to 5, unscored); --slice adds files as a slice of their own. Writes card.json,
card.html (one self-contained page) and card.png, and prints a table. Documents are named by id only. --diff compares
two cards. Apache Beam counts large corpora, by default with a process for each core of this machine; a stopped run
continues where it was.
"""

import argparse

from safelm import api, cli, documents
from safelm.documents import annotations
from safelm.io import remote
from safelm.jobs import beam_runner
from safelm.jobs.output import OutputFolder
from safelm.safety.report_card import card, corpus, difference, output
from safelm.safety.report_card import queries as query_sets
from safelm.safety.report_card.corpus import SliceInput
from safelm.safety.report_card.counting import CountSettings


def main(arguments: argparse.Namespace) -> None:
    remote.check_output(arguments.output)
    out = OutputFolder(arguments.output)
    if arguments.diff:
        if arguments.input or arguments.slice:
            raise cli.UserError("--diff: compares cards; leave out --input and --slice")
        before, after = (difference.read_card(path) for path in arguments.diff)
        found = difference.compare(before, after)
        with out.only_writer():
            output.write_difference(out, found)
        return
    inputs, runner, settings = _inputs(arguments), beam_runner.from_flags(arguments), _settings(arguments)
    limit = documents.limit_from_flags(arguments)
    card.definitions(query_sets.load_queries(settings.queries), settings)  # errors show before the corpus is read
    with out.only_writer():
        output.write_card(out, card.count_and_build(inputs, settings, out.path("counted"), runner, limit))
        corpus.forget(out.path("counted"))


def _settings(arguments: argparse.Namespace) -> CountSettings:
    if arguments.top < 0:
        raise cli.UserError(f"--top={arguments.top}: must be at least 0")
    names = ("queries", "tokenizer", "text_column", "id_column", "score_column", "top", "show_text")
    values = {name: getattr(arguments, name) for name in names}
    return CountSettings(**values, annotations=annotations.parse(arguments.annotations))


def _inputs(arguments: argparse.Namespace) -> list[SliceInput]:
    inputs = [SliceInput(None, tuple(arguments.input))] if arguments.input else []
    for value in arguments.slice:
        name, separator, pattern = value.partition("=")
        if not separator or not name.strip() or not pattern:
            raise cli.UserError(f"--slice={value}: expected NAME=FILES")
        inputs.append(SliceInput(name.strip(), tuple(pattern.split(","))))
    if not inputs:
        raise cli.UserError("--input or --slice: one is needed")
    names = [one.name for one in inputs]
    for name in names:
        if arguments.input and name in card.AUTOMATIC:
            raise cli.UserError(f"--slice={name}: a slice of --input has this name")
        if names.count(name) > 1:
            raise cli.UserError(f"--slice={name}: given twice; separate several patterns of one slice by commas")
    return inputs


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser(
        "safelm.report_card",
        __doc__ + "\n" + beam_runner.__doc__.split("\n\n", 2)[2],
        "python -m safelm.report_card --input=W/scored --slice=SafeWeb='W/corpus/safeweb/*.jsonl.gz' --output=W/card\n"
        "  python -m safelm.report_card --diff W/before/card.json W/after/card.json --output=W/diff",
        buckets=("output",),
    )
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument(
        "--input", nargs="+", action="extend", default=[], metavar="FILES", help="files, folders or patterns"
    )
    parser.add_argument(
        "--slice",
        action="append",
        default=[],
        metavar="NAME=FILES",
        help="files that form a slice of their own (repeatable; comma-separated)",
    )
    parser.add_argument("--diff", nargs=2, metavar="CARD", help="compare two card.json, before and after")
    parser.add_argument("--queries", help='other queries: JSON {"categories": {name: [query, ...]}}')
    parser.add_argument("--tokenizer", help="count this tokenizer's tokens instead of words")
    parser.add_argument("--text_column", default="text", help="(default %(default)s)")
    parser.add_argument(
        "--id_column", default=documents.ID_COLUMN, help="column that names documents (default %(default)s)"
    )
    parser.add_argument(
        "--score_column",
        help="column with harm scores 0 to 5, e.g. metadata.harm_score (default: see safelm.documents.harm)",
    )
    parser.add_argument(
        "--annotations",
        metavar="FOLDER,...",
        help="folders by safelm.score with harm scores of --input beside its text",
    )
    parser.add_argument(
        "--top", type=int, default=20, help="number of documents to list, those with most hits (default %(default)s)"
    )
    parser.add_argument("--show_text", action="store_true", help="quote the words around their first hit")
    documents.add_limit_flags(parser)
    beam_runner.add_flags(parser, default="local")
    return parser


cli.make_callable(__name__, api.report_card)

if __name__ == "__main__":
    cli.run(main, _parser())
