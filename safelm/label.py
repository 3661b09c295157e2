"""Labels documents for harm in a browser: the ones that scorers are least sure of, and a random share of all.

Serves a page on this machine that shows one document at a time, blurred until it is revealed, and takes a score from 0
to 5 and kinds of harm (keys 0 to 5; space reveals, s skips, u takes back, n writes a note). Every answer is on the disk
before the next document is shown: whoever kills the command loses none, and the same command goes on.

--input is what safelm.score wrote, or other documents with harm scores; with --scorers (as safelm.score takes them) a
random sample of any documents is scored first, and kept only as far as it is chosen. Which documents:

    disagreement   the largest distance between scorers (the default where there are several)
    entropy        the flattest probabilities of one scorer (the default where it gives any)
    margin         the smallest distance between its two likeliest classes
    score          as many of each score (the default where there is nothing but scores)
    random         all of them drawn alike

Of those no two are nearly alike. --random_share of the documents are drawn from all alike instead: only these say how
often the scorers err on the corpus, with an interval that is printed at the end. The choice depends on --seed alone and
is made once; later runs need only --output. Each --annotator has a journal of their own, OUTPUT/_journals/NAME.jsonl,
and is shown all documents; a colleague's journal of the same choice, made elsewhere and put beside it, counts too. At
the end, and at the page's button, OUTPUT/labels.jsonl is written, one row a document (`harm_score` is the annotators'
mean, `harm_votes` how many gave each score). safelm.train_classifier takes it as --data=harm_score:OUTPUT/labels.jsonl.
--export writes it without a page. OUTPUT holds texts, which may be harmful; logs hold none.
"""

import argparse
import asyncio
import itertools
import logging
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from safelm import cli, documents
from safelm.io import remote
from safelm.jobs import settings
from safelm.safety.labelling import export, folder, journal, pool, uncertainty
from safelm.safety.labelling.choice import ChoiceSettings, Chooser
from safelm.safety.labelling.folder import LabelFolder
from safelm.safety.labelling.session import Session
from safelm.safety.scoring import scorers
from safelm.serving import label_page
from safelm.stats.intervals import Estimate

_logger = logging.getLogger("safelm.label")
_CHOICE = {  # the flags that make the choice, and what they are where they aren't given
    "documents": 200,
    "random_share": 0.2,
    "choose_by": None,
    "seed": 0,
    "scorers": None,
    "sample": 1000,
    "text_column": "text",
    "id_column": documents.ID_COLUMN,
    "score_column": None,
}
_HEAD = 1000  # documents that say which columns there are
_LEVELS = {"exact": "another score", "1": "wrong at 1 or more", "3": "at 3 or more"}


def arguments() -> argparse.ArgumentParser:
    """The command's flags. Those that make the choice have no default here: a later run keeps what was chosen."""
    example = "python -m safelm.label --input=runs/scored --output=runs/labels --annotator=ada"
    parser = cli.parser("safelm.label", __doc__, example)
    add = parser.add_argument
    add("--input", nargs="+", action="extend", metavar="FILES", help="files, folders or patterns; once for an output")
    add("--output", required=True, help="a folder on this machine")
    add("--annotator", default="anonymous", help="a name or number, kept with each label (default %(default)s)")
    add("--port", type=int, default=8010, help="0 for any free one (default %(default)s)")
    add("--export", action="store_true", help="write the training file of the labels so far, and end")
    add("--documents", type=int, metavar="N", help="to choose (default 200)")
    add("--random_share", type=float, metavar="SHARE", help="of them, drawn from all documents alike (default 0.2)")
    add("--choose_by", choices=uncertainty.METHODS, help="the others; see above")
    add("--seed", type=int, help="of the choice (default 0)")
    add("--scorers", metavar="KIND:PLACE,...", help="score a sample now; see safelm.score")
    add("--sample", type=int, metavar="N", help="documents that are scored now (default 1000)")
    add("--text_column", help="(default text)")
    add("--id_column", help="(default id)")
    add("--score_column", help="holds the harm score; not needed for what safelm.score wrote")
    documents.add_limit_flags(parser)
    return parser


def main(flags: argparse.Namespace) -> None:
    """Chooses where nothing was chosen, then serves the page; ValueError or OSError with one line for bad input."""
    journal.check_name(flags.annotator)
    if not 0 <= flags.port < 65536:
        raise ValueError(f"--port={flags.port}: want 0 to 65535")
    remote.check_local_output(flags.output)
    root = pathlib.Path(flags.output)
    if not root.is_dir() and not flags.input:
        raise ValueError(f"--output={root}: no such folder; give --input to begin one")
    with folder.only_process(root):
        if flags.input and not (root / documents.MANIFEST_NAME).exists():
            choose(root, flags)
        found = LabelFolder(root)
        _check_same(found, flags)
        if not flags.export:
            with found.journal(flags.annotator) as own:
                asyncio.run(label_page.serve(Session(found, own), flags.port, started=_tell_url))
            if not found.labels():
                _logger.info("%s: no label yet", root)
                return
        _report(root, export.export(found))


def choose(root: pathlib.Path, flags: argparse.Namespace) -> None:
    """Chooses the documents and begins the folder."""
    if others := [name for name in os.listdir(root) if not name.startswith((".", "_"))]:
        raise ValueError(f"--output={root}: holds {min(others)!r}, which isn't labels: choose another folder")
    documents.check_apart(flags.input, str(root))
    given = _CHOICE | {name: value for name in _CHOICE if (value := getattr(flags, name)) is not None}
    wanted = {name: given[name] for name in ("documents", "random_share", "seed")}
    ChoiceSettings(**wanted)  # so that bad flags are told before anything is read
    columns = {name: given[name] for name in ("text_column", "id_column", "score_column", "sample", "seed")}
    wanted_pool = pool.PoolSettings(tuple(flags.input), limit=documents.limit_from_flags(flags), **columns)
    loaded = scorers.load_scorers(scorers.parse_specs(given["scorers"])) if given["scorers"] else ()
    candidates = pool.read(wanted_pool, loaded)
    head = list(itertools.islice(candidates, _HEAD))
    method = uncertainty.check_method(given["choose_by"], [each.opinions for each in head])
    chooser = Chooser(ChoiceSettings(method=method, **wanted))
    for candidate in itertools.chain(head, candidates):
        chooser.add(candidate)
    chosen = chooser.chosen()
    if not chosen:
        raise ValueError(f"--input={' '.join(flags.input)}: no document there has a text and a score")
    _logger.info(
        "%s: %d of %d documents chosen by %s, %d of them at random, %d near-duplicates passed over",
        *(root, len(chosen), chooser.seen, method, sum(is_random for _, is_random in chosen), chooser.near_duplicates),
    )
    folder.begin(root, given | {"choose_by": method, "input": _described(flags.input)}, chosen)


def _described(patterns: Sequence[str]) -> list[dict[str, Any]]:
    return [documents.without_place(documents.describe(file)) for file in documents.find(patterns)]


def _check_same(found: LabelFolder, flags: argparse.Namespace) -> None:
    """Raises ValueError where a flag asks for another choice than the folder's."""
    now = {name: value for name in _CHOICE if (value := getattr(flags, name)) is not None}
    if flags.input:
        now["input"] = _described(flags.input)
    named = {name: f"--{name}" for name in found.settings}
    settings.check_same(str(found.root), found.settings, found.settings | now, named, remedy="choose another --output")


def _tell_url(url: str) -> None:
    sys.stdout.write(f"listening on {url}\n")
    sys.stdout.flush()


def _report(root: pathlib.Path, measured: dict[str, Any]) -> None:
    """What was written, and what the labels say, a line each."""
    _logger.info("%s/%s: %d documents, labels %s", root, export.NAME, measured["labelled"], measured["labels"])
    random = measured["random"]
    for name, errors in measured["error"].items():
        shown = ", ".join(f"{_LEVELS[level]} {_shown(errors[level])}" for level in _LEVELS)
        on = f"{random['labelled']} of {random['documents']} random documents"
        _logger.info("error of %s on %s: %s", name or "harm_score", on, shown)
    if measured["alpha"]:
        _logger.info("agreement of annotators, alpha: %s", _shown(measured["alpha"]))


def _shown(estimate: dict[str, Any] | None) -> str:
    return str(Estimate(**estimate)) if estimate else "unknown"


if __name__ == "__main__":
    cli.run(main, arguments())
