"""Selects a corpus for a budget of tokens: filtered by harm score, without copies and evaluation prompts, sampled.

Reads JSON lines (compressed or not) and Parquet, local, gs:// or hf://, twice: the first pass counts tokens and hashes
texts, the second copies the chosen rows as they are, Parquet as Parquet with all columns, JSON lines as .jsonl.gz.
Order and columns stay; those of --annotations are read and written as the rows' own. Steps, each with its counts in the
data card:

    scores          --min_score, --max_score; --class_threshold=4=0.5,5=0.95 lowers a row's score while the probability
                    of at least that score (in --probabilities_column) is below
    copies          --exact_duplicates; --near_duplicates=0.7 (MinHash of word 5-grams). Of copies the one with the
                    highest harm score stays, among these a random one
    contamination   --decontaminate: documents that share 13 words in a row with a prompt
    budget          --token_budget, shared among --strata (harm score, source, language or any column) in proportion to
                    their tokens, or by --mix=COLUMN:VALUE=SHARE,... in fixed shares; never more than the budget, and
                    short of it by less than a document
    matched safe    --matched_safe=1 marks all rows of --harmful_score (3) and more and as many tokens of safer rows
                    from the same strata in the column --mark_column; --only_matched writes those alone

A row's place in the draw depends on --seed, its file's name and content, and its number there: not on workers, on other
files or on their order. A smaller budget draws a part of a larger one's rows, but for one document a stratum.

    OUTPUT/train-*             the rows; with --output_rows=index, OUTPUT/rows lists file and row instead
    OUTPUT/data_card.md, .json counts, funnel, licences, contamination by suite: ids and counts, never texts
    OUTPUT/manifest.json       written last: settings, seed, checksums

A stopped run continues when the same command is given again.
"""

import argparse
import logging

from safelm import cli, documents
from safelm.documents import annotations
from safelm.evaluate.suites import prompt_sets
from safelm.io import hub, remote
from safelm.jobs import beam_runner
from safelm.selection import data_card, plan
from safelm.selection.contamination import PromptSet
from safelm.selection.plan import Input, Selection
from safelm.selection.settings import SelectSettings, parse_mix, parse_thresholds, parse_tokens
from safelm.text.tokenizer import Tokenizer

_logger = logging.getLogger("safelm.select")


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = cli.parser(
        "safelm.select",
        __doc__ + "\n" + beam_runner.__doc__.split("\n\n", 2)[2],
        "python -m safelm.select --input=scored --output=selected --token_budget=1B --tokenizer=hf:ORG/NAME\n"
        "  python -m safelm.select --source=web='scored/web' --source=wiki='scored/wiki' --output=mixed "
        "--token_budget=200M --token_column=num_tokens --mix=source:web=0.8,wiki=0.2 --strata=source,score "
        "--exact_duplicates --decontaminate=advbench:advbench.csv",
        buckets=("output",),
    )
    add = parser.add_argument
    add("--input", nargs="+", action="extend", default=[], metavar="FILES", help="files, folders or patterns")
    add(
        "--source",
        action="append",
        default=[],
        metavar="NAME=FILES",
        help="an input whose rows have the source NAME (repeatable; several patterns by comma)",
    )
    add("--output", required=True, help="folder, local or gs://")
    add("--token_budget", metavar="N", help="tokens to select: 1500000, 1.5M, 2B (default: all that pass)")
    add("--tokenizer", default="", help="whose tokens count: a folder, a GGUF file, hf:ORG/NAME")
    add("--token_column", default="", help="column with each row's number of tokens, in place of a tokenizer")
    add("--text_column", default="text", help="(default %(default)s)")
    add("--score_column", help="column with harm scores 0 to 5 (default: see safelm.documents.harm)")
    add("--annotations", metavar="FOLDER,...", help="annotations of the inputs (safelm.annotate), perhaps NAME=FOLDER")
    add(
        "--licence_column",
        help="column of licences for the data card, empty for none (default: license or licence, if there)",
    )
    _add_filters(parser)
    _add_sampling(parser)
    add(
        "--output_rows",
        choices=("documents", "index"),
        default="documents",
        help="copy the rows, or list file and row (default %(default)s)",
    )
    add("--part_mb", type=int, default=64, help="size above which files are split into shards (default %(default)s)")
    documents.add_limit_flags(parser)
    beam_runner.add_flags(parser, default="local")
    return parser


def _add_filters(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--min_score", type=int, default=0, help="lowest harm score to take (default %(default)s)")
    add("--max_score", type=int, default=5, help="highest harm score to take (default %(default)s)")
    add(
        "--class_threshold",
        default="",
        metavar="SCORE=P,...",
        help="probability of at least SCORE from which a row keeps that score, else it gets the next lower one",
    )
    add(
        "--probabilities_column",
        default="safety_probs",
        help="list of six probabilities, of the scores 0 to 5, or six columns NAME_0 to NAME_5 (default %(default)s)",
    )
    add("--exact_duplicates", action="store_true", help="keep one copy of each text")
    add(
        "--near_duplicates",
        type=float,
        default=0.0,
        metavar="SIMILARITY",
        help="keep one of documents this similar, e.g. 0.7 (default: all)",
    )
    add(
        "--decontaminate",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME:FILE",
        help="prompts to keep out, as safelm.evaluate's --data; capability:FOLDER for its capability tasks; or a "
        "folder of safelm.synthetic_web's prompts",
    )
    add(
        "--min_prompt_words",
        type=int,
        default=6,
        help="prompts of fewer words are not looked for (default %(default)s)",
    )


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--strata",
        default="score",
        metavar="COLUMN,...",
        help="columns whose values share the budget in proportion; score is the harm score, source the name in "
        "--source; empty for none (default %(default)s)",
    )
    add("--detect_language", action="store_true", help="detect the stratum language instead of reading a column")
    add("--mix", default="", metavar="COLUMN:VALUE=SHARE,...", help="fixed shares of one of the strata; others are out")
    add(
        "--matched_safe",
        type=float,
        default=0.0,
        metavar="RATIO",
        help="tokens of safer rows to mark for a harmful one",
    )
    add("--harmful_score", type=int, default=3, help="lowest score of a harmful row there (default %(default)s)")
    add("--only_matched", action="store_true", help="write marked rows alone")
    add("--mark_column", default="matched", help="column of the marks (default %(default)s)")
    add("--seed", type=int, default=0, help="of the draw (default %(default)s)")


def main(flags: argparse.Namespace) -> None:
    """Selects what the flags say; ValueError or OSError with one clear line for bad input."""
    runner = beam_runner.from_flags(flags)
    if flags.part_mb < 1:
        raise ValueError(f"--part_mb must be at least 1, got {flags.part_mb}")
    remote.check_output(flags.output)
    flags.tokenizer = hub.pinned(flags.tokenizer)
    inputs, settings = _inputs(flags), _settings(flags)
    tokenizer_hash = Tokenizer.from_pretrained(flags.tokenizer).hash if flags.tokenizer else ""
    read = prompt_sets.read_prompt_sets(flags.decontaminate, "--decontaminate")
    sets = [PromptSet(suite, tuple(ids), tuple(texts)) for suite, (ids, texts) in read.items()]
    output = flags.output.rstrip("/")
    manifest = plan.select(Selection(output, inputs, settings, sets, tokenizer_hash, flags.part_mb << 20), runner)
    print(data_card.markdown(manifest))
    _logger.info("%s: %d documents, %d tokens", output, *manifest["selected"].values())


def _settings(flags: argparse.Namespace) -> SelectSettings:
    names = (
        "tokenizer token_column text_column score_column min_score max_score probabilities_column detect_language "
        "licence_column matched_safe harmful_score only_matched mark_column exact_duplicates near_duplicates "
        "min_prompt_words seed"
    ).split()
    return SelectSettings(
        token_budget=parse_tokens(flags.token_budget) if flags.token_budget else None,
        class_thresholds=parse_thresholds(flags.class_threshold),
        strata=tuple(name.strip() for name in flags.strata.split(",") if name.strip()),
        mix=parse_mix(flags.mix),
        index_only=flags.output_rows == "index",
        annotations=annotations.parse(flags.annotations),
        limit=documents.limit_from_flags(flags),
        **{name: getattr(flags, name) for name in names},
    )


def _inputs(flags: argparse.Namespace) -> list[Input]:
    patterns = {"": list(flags.input)} if flags.input else {}
    for value in flags.source:
        name, separator, files = value.partition("=")
        if not separator or not name.strip() or not files:
            raise ValueError(f"--source={value}: want NAME=FILES")
        patterns.setdefault(name.strip(), []).extend(files.split(","))
    if not patterns:
        raise ValueError("--input or --source: one is needed")
    documents.check_apart([pattern for some in patterns.values() for pattern in some], flags.output)
    inputs = [Input(name, documents.find(some)) for name, some in patterns.items()]
    seen: set[str] = set()
    for file in (file for one in inputs for file in one.files):
        if file.path in seen:
            raise ValueError(f"{file.path}: it lies in two inputs")
        seen.add(file.path)
    return inputs


if __name__ == "__main__":
    cli.run(main, arguments())
