"""Compares rubrics of an LLM judge on a file of graded texts, with 95% intervals; any endpoint, any model of ours.

Each rubric judges every text; the first is what the others are compared with, on the texts that both scored. Ranks and
areas take a judge's expected score where it has one. Texts of one --group_column value (or equal texts) are resampled
together. Hashes and scores are kept in OUTPUT as they come, no text: a stopped run goes on.

- Spearman: rank correlation with the grades;
- AUROC at 1 and 3: how well texts graded 1 or more (3 or more) are told from the others;
- recall at 1 and 3, macro-F1: of the score given (the paper's columns);
- unscored: share of texts without a usable answer, which the other columns leave out.
"""

import argparse
import hashlib
import json
import math
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import quote

import numpy as np
from tqdm import tqdm

from safelm import cli
from safelm.evaluate.journal import open_journal
from safelm.evaluate.suites.prompt_files import read_rows
from safelm.io.files import write_whole
from safelm.report.table import Table, estimate, words
from safelm.safety.classifier import metrics
from safelm.safety.judge.rubric import load_rubric
from safelm.safety.scorer import Scorer, load_scorer
from safelm.stats.bootstrap import grouped_interval
from safelm.stats.comparison import paired_difference
from safelm.stats.intervals import Estimate, rate
from safelm.tags import MAX_SCORE

AT_ONCE = 32  # texts between two notes in the journal
Texts = dict[str, np.ndarray]  # text_n, grade_n, group_n
Measure = Callable[[np.ndarray, np.ndarray, np.ndarray], float]  # of grades, values, scores


def arguments() -> argparse.ArgumentParser:
    parser = cli.parser(
        "scripts.studies.compare_rubrics",
        __doc__,
        "python scripts/studies/compare_rubrics.py --data=graded.csv --judge='endpoint:http://HOST:8000/v1#MODEL' "
        "--rubric=1 --rubric=2 --output=rubrics",
    )
    parser.add_argument("--data", required=True, help="graded texts: CSV, JSON, JSON lines or Parquet, any place")
    parser.add_argument("--text_column", default="text")
    parser.add_argument("--score_column", default="harm_score", help="whole numbers from 0 to 5")
    parser.add_argument("--group_column", help="texts that aren't independent share a value")
    parser.add_argument("--limit", type=int, default=0, help="so many texts, evenly spread over the file; 0: all")
    parser.add_argument("--judge", required=True, help="judge:MODEL or endpoint:URL#MODEL, with options behind ?")
    parser.add_argument("--rubric", action="append", required=True, help="version of ours or a file; several times")
    parser.add_argument("--output", required=True, help="a folder")
    return parser


def main(flags: argparse.Namespace) -> None:
    """Judges, measures, prints the table and writes it."""
    if len(set(flags.rubric)) != len(flags.rubric):
        raise cli.UserError(f"--rubric={flags.rubric[-1]}: given twice")
    names = {rubric: load_rubric(rubric).hash[:12] for rubric in flags.rubric}
    texts = read_texts(flags)
    output = pathlib.Path(flags.output)
    output.mkdir(parents=True, exist_ok=True)
    found = {rubric: judged(with_rubric(flags.judge, rubric), texts, output) for rubric in names}
    result = compare(texts, found)
    facts = {"data": flags.data, "texts": len(texts["text"]), "judge": flags.judge, "rubrics": names}
    write_whole(output / "rubrics.json", (json.dumps(facts | result, indent=2) + "\n").encode())
    page = table(result).markdown()
    write_whole(output / "rubrics.md", (page + "\n").encode())
    print(page)


def read_texts(flags: argparse.Namespace) -> Texts:
    """Texts, grades and groups; a ValueError names file, row and column."""
    texts, grades, groups = [], [], []
    for number, row in read_rows(flags.data):
        where = f"{flags.data}: row {number}"
        columns = [flags.text_column, flags.score_column, *([flags.group_column] if flags.group_column else [])]
        if missing := [name for name in columns if name not in row]:
            raise ValueError(f"{where}: no column {missing[0]!r}; it has {', '.join(sorted(map(str, row)))}")
        text, grade = row[flags.text_column], row[flags.score_column]
        if not isinstance(text, str):
            raise ValueError(f"{where}: {flags.text_column} holds no text")
        if isinstance(grade, bool) or not re.fullmatch(rf"[0-{MAX_SCORE}](\.0+)?", str(grade)):
            raise ValueError(f"{where}: {flags.score_column}={grade!r}, want a whole number from 0 to {MAX_SCORE}")
        texts.append(text)
        grades.append(int(float(grade)))
        groups.append(str(row[flags.group_column]) if flags.group_column else text)
    if len(set(grades)) < 2:
        raise ValueError(f"{flags.data}: {len(texts)} texts of {len(set(grades))} grades; nothing to compare")
    kept = slice(None)
    if 0 < flags.limit < len(texts):
        kept = np.linspace(0, len(texts) - 1, flags.limit).round().astype(int)
    columns = {"text": np.array(texts, object), "grade": np.array(grades), "group": np.array(groups)}
    return {name: column[kept] for name, column in columns.items()}


def with_rubric(spec: str, rubric: str) -> str:
    """The string of a judge that is told a rubric."""
    kind, _, rest = spec.partition(":")
    if kind not in ("judge", "endpoint"):
        raise cli.UserError(f"--judge={spec}: only judge:... and endpoint:... are told a rubric")
    options = rest.partition("#")[2] if kind == "endpoint" else rest
    return f"{spec}{'&' if '?' in options else '?'}rubric={quote(rubric, safe='')}"


def judged(spec: str, texts: Texts, output: pathlib.Path) -> dict[str, np.ndarray]:
    """`score` (NaN: unscored) and `value`, the expected score where the judge has one, of every text."""
    judge = load_scorer(spec)
    keys = [hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32] for text in texts["text"]]
    with open_journal(output / f"verdicts.{judge.fingerprint[:16]}.jsonl") as journal:
        _judge_missing(judge, dict(zip(keys, texts["text"], strict=True)), journal, spec)
        rows = [journal.rows[key] for key in keys]
    return {name: np.array([row[name] for row in rows], np.float64) for name in ("score", "value")}


def _judge_missing(judge: Scorer, texts: Mapping[str, str], journal: Any, spec: str) -> None:
    missing = [(key, text) for key, text in texts.items() if journal.rows.get(key, {}).get("score") is None]
    for start in tqdm(range(0, len(missing), AT_ONCE), desc=spec.rpartition("rubric=")[2], disable=None):
        batch = missing[start : start + AT_ONCE]
        rows = {}
        for (key, _), verdict in zip(batch, judge.score([text for _, text in batch]), strict=True):
            value = verdict.score if verdict.score is None else verdict.details.get("expected_score", verdict.score)
            rows[key] = {"score": verdict.score, "value": value}
        journal.add(rows)


def _area(level: int) -> Measure:
    def area(grade_n: np.ndarray, value_n: np.ndarray, _: np.ndarray) -> float:
        found = metrics.area(grade_n >= level, value_n)
        return found.value if found else math.nan

    return area


def _recall(level: int) -> Measure:
    def recall(grade_n: np.ndarray, _: np.ndarray, score_n: np.ndarray) -> float:
        found = metrics.recall_at(level, grade_n, score_n)
        return found.value if found else math.nan

    return recall


MEASURES: dict[str, Measure] = {
    "Spearman": lambda grade_n, value_n, _: metrics.spearman(grade_n.astype(np.float64), value_n),
    "AUROC at 1": _area(1),
    "AUROC at 3": _area(3),
    "recall at 1": _recall(1),
    "recall at 3": _recall(3),
    "macro-F1": lambda grade_n, _, score_n: metrics.macro_f1(grade_n, score_n),
}


def compare(texts: Texts, found: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, Any]:
    """Every rubric's measures, and each later one's less the first's."""
    is_scored = {rubric: ~np.isnan(columns["score"]) for rubric, columns in found.items()}
    first, result = next(iter(found)), {"alone": {}, "difference": {}}
    for rubric, columns in found.items():
        own_n = is_scored[rubric]
        alone = {name: _measured(measure, texts, own_n, [columns]) for name, measure in MEASURES.items()}
        alone["unscored"] = vars(rate(int((~own_n).sum()), len(own_n)))
        result["alone"][rubric] = alone
        if rubric == first:
            continue
        both_n, pair = own_n & is_scored[first], [columns, found[first]]
        less = {name: _measured(measure, texts, both_n, pair) for name, measure in MEASURES.items()}
        less["unscored"] = vars(paired_difference(~own_n, ~is_scored[first], texts["group"].tolist()))
        result["difference"][rubric] = less
    return result


def _measured(
    measure: Measure, texts: Texts, which_n: np.ndarray, of: Sequence[Mapping[str, np.ndarray]]
) -> dict[str, float] | None:
    """A measure of one judge, or of the first less that of the second, with its bootstrap interval; None for none."""
    columns = [column for judge in of for column in (judge["value"][which_n], judge["score"][which_n].astype(np.int64))]

    def statistic(grade_n: np.ndarray, *columns: np.ndarray) -> float:
        one, *other = (measure(grade_n, *columns[at : at + 2]) for at in range(0, len(columns), 2))
        return one - sum(other)

    grade_n = texts["grade"][which_n]
    value = statistic(grade_n, *columns) if which_n.any() else math.nan
    if math.isnan(value):
        return None
    low, high = grouped_interval(statistic, grade_n, *columns, groups=texts["group"][which_n])
    return vars(Estimate(value, min(value, low), max(value, high), int(which_n.sum())))


def table(result: Mapping[str, Any]) -> Table:
    """A row a rubric, and a row a difference."""
    first, heads = next(iter(result["alone"])), (*MEASURES, "unscored")
    named = {f"rubric {name}": row for name, row in result["alone"].items()}
    named |= {f"{name} less {first}": row for name, row in result["difference"].items()}
    rows = [[words(name), *(estimate(row[head], 3) for head in heads)] for name, row in named.items()]
    return Table("Rubrics on graded texts, 95% intervals.", ("", *heads), rows)


if __name__ == "__main__":
    cli.run(main, arguments())
