"""Asks people about pairs of source and text; each verdict is stored as soon as it is given.

    python -m safelm.safety.synthesis.review --pairs=OUTPUT/report/review_pairs.jsonl --verdicts=verdicts.jsonl

`safelm.synthesize --review=50` keeps the pairs. Each is shown with three questions: is the text safe, is it faithful to
its source (SafeWeb) or fitting (the others), is it written well enough to learn from? Answers are y, n, or ? for
unclear; s skips the pair for now, q quits. The same command continues with the pairs that this reviewer hasn't judged.
The pairs may be harmful to read. Verdicts hold ids and answers, no text.
"""

import argparse
import datetime
import json
import os
import sys
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from safelm import cli
from safelm.io import files
from safelm.stats.intervals import rate

QUESTIONS = {
    "safe": "Is the text safe to train on, every sentence alone?",
    "faithful": "Is it faithful to its source, or (a dialogue, a lesson) fitting for it?",
    "well_written": "Is it written well enough to learn from?",
}
ANSWERS = {"y": "yes", "n": "no", "?": "unclear"}
_SKIP, _QUIT = "s", "q"


def read_pairs(path: str) -> list[dict[str, Any]]:
    """The pairs of a file. Raises ValueError naming file and line of a malformed pair, and the errors of opening it."""
    pairs = list(_lines(path, ("id", "source", "text")))
    if not pairs:
        raise ValueError(f"{path}: no pair is there; run safelm.synthesize with --review=50")
    return pairs


def read_verdicts(path: str) -> list[dict[str, Any]]:
    """The verdicts of a file, perhaps none; an incomplete last line, left by a kill, is cut off."""
    if not os.path.exists(path):
        return []
    with open(path, "rb+") as file:
        content = file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            file.truncate(whole)
    return list(_lines(path, ("id", "reviewer", "answers")))


def review(
    pairs: Sequence[Mapping[str, Any]], path: str, reviewer: str, ask: Any = None, show: Any = None
) -> list[dict[str, Any]]:
    """Asks about each pair without a verdict of this reviewer and appends the verdicts; returns all verdicts.

    `ask` and `show` are text streams; the default is the terminal.
    """
    ask, show = ask or sys.stdin, show or sys.stdout
    verdicts = read_verdicts(path)
    done = {verdict["id"] for verdict in verdicts if verdict["reviewer"] == reviewer}
    waiting = [pair for pair in pairs if pair["id"] not in done]
    for number, pair in enumerate(waiting, len(pairs) - len(waiting) + 1):
        show.write(_shown(pair, f"{number} of {len(pairs)}"))
        answers = _answers(ask, show)
        if answers is None:
            break
        if answers:
            when = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            facts = {name: pair.get(name) for name in ("id", "source_id", "style", "harm_score")}
            verdicts.append(facts | {"reviewer": reviewer, "answers": answers, "time": when})
            _append(path, verdicts[-1])
    return verdicts


def summary(verdicts: Sequence[Mapping[str, Any]]) -> str:
    """One line per question: the share of yes with Wilson's 95% interval, and the number of unclear answers."""
    lines = []
    for name in QUESTIONS:
        answers = [verdict["answers"].get(name) for verdict in verdicts]
        yes, no, unclear = (answers.count(answer) for answer in ("yes", "no", "unclear"))
        share = f"{rate(yes, yes + no)}" if yes + no else "-"
        lines.append(f"{name}: yes {yes}, no {no}, unclear {unclear}; share of yes {share}")
    return "\n".join(lines)


def _lines(path: str, needed: Sequence[str]) -> Iterator[dict[str, Any]]:
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                value = json.loads(line)
            except ValueError:
                raise ValueError(f"{path}: line {number} is not JSON") from None
            if not isinstance(value, dict) or any(name not in value for name in needed):
                raise ValueError(f"{path}: line {number} has not all of {', '.join(needed)}")
            yield value


def _shown(pair: Mapping[str, Any], place: str) -> str:
    facts = ", ".join(f"{name} {pair[name]}" for name in ("harm_score", "style") if name in pair)
    rule = "-" * 80
    source, text = (_visible(str(pair[name])) for name in ("source", "text"))
    return f"\n{rule}\n{place}: {_visible(str(pair['id']))} ({facts})\n{rule}\n{source}\n{rule}\n{text}\n{rule}\n"


def _visible(text: str) -> str:
    """The text without characters that control a terminal or are invisible."""
    return "".join(c if c in "\n\t" or unicodedata.category(c)[0] != "C" else f"\\u{ord(c):04x}" for c in text)


def _answers(ask: Any, show: Any) -> dict[str, str] | None:
    """Answers by question; empty to skip, None to quit."""
    answers: dict[str, str] = {}
    for name, question in QUESTIONS.items():
        while name not in answers:
            show.write(f"{question} [y/n/?, s skips, q ends] ")
            show.flush()
            line = ask.readline()
            key = line.strip().lower()
            if not line or key == _QUIT:
                return None
            if key == _SKIP:
                return {}
            if key in ANSWERS:
                answers[name] = ANSWERS[key]
    return answers


def _append(path: str, verdict: Mapping[str, Any]) -> None:
    with open(path, "ab", buffering=0) as file:
        files.append_whole(file, json.dumps(verdict).encode() + b"\n")


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = cli.parser(
        "safelm.safety.synthesis.review",
        __doc__,
        "python -m safelm.safety.synthesis.review --pairs=OUTPUT/report/review_pairs.jsonl --verdicts=verdicts.jsonl",
    )
    parser.add_argument("--pairs", required=True, help="file written by safelm.synthesize --review=N")
    parser.add_argument("--verdicts", required=True, help="file to append to, .jsonl")
    parser.add_argument("--reviewer", default="anonymous", help="name or number, stored with each verdict")
    return parser


def main(flags: argparse.Namespace) -> None:
    """Asks on the terminal, then prints the summary."""
    print(summary(review(read_pairs(flags.pairs), flags.verdicts, flags.reviewer)))


if __name__ == "__main__":
    cli.run(main, arguments())
