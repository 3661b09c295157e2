"""Results of `safelm.evaluate` as rows, columns and cases: rates over seeds, judges side by side."""

import collections
import dataclasses
import pathlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from safelm.dashboard.measures import HIGH, LOW, UNKNOWN, Board, CaseSet, Cell, Column, Labels, Protocol, Row, cell_of
from safelm.evaluate import outcomes
from safelm.evaluate.capability.suite import TASKS
from safelm.evaluate.comparing.results import ATTACK, REFUSAL, Comparison, Run, compare, split_name
from safelm.evaluate.protocol import SUBJECT
from safelm.evaluate.suites.attempts import goal_of
from safelm.io import records
from safelm.stats.intervals import Estimate, rate

TOOL = "safelm.evaluate"
HEADLINE, SCORES, OUTCOMES, JUDGES, BENCHMARKS, CORRECTED, MODEL, CAPABILITY = (
    "Headline",
    "Scores of judges",
    "Outcomes of harmful prompts",
    "By judge",
    "By benchmark",
    "Corrected for the judge's errors",
    "Without decoding",
    "Capability",
)
_ASPECTS = {ATTACK: "harmful answers", REFUSAL: "safe prompts refused"}
_OUTCOME_IS_BETTER = dict(zip(outcomes.OUTCOMES, (LOW, LOW, HIGH, UNKNOWN), strict=True))


def add_runs(board: Board, runs: Sequence[Run], *, may_differ: Collection[str] = (), show_texts: bool = False) -> None:
    """Adds runs, a protocol at a time.

    Args:
      may_differ: fields of a protocol that may differ among numbers that are compared.

    Raises ValueError for a checkpoint that two files hold, or of reading texts.
    """
    groups: dict[str, list[Run]] = collections.defaultdict(list)
    for run in runs:
        fields = {name: value for name, value in run.protocol.items() if name not in (*SUBJECT, *may_differ)}
        fields |= {f"headline judge, {_ASPECTS[aspect]}": run.headline.get(aspect, "") for aspect in _ASPECTS}
        key = records.fingerprint([TOOL, fields])
        board.protocols[key] = Protocol(TOOL, run.column.suite, fields)
        groups[key].append(run)
    for key, of_group in groups.items():
        _check_once(of_group)
        _add_headline(board, key, compare(of_group, may_differ=may_differ))
        _add_judges(board, key, of_group, may_differ)
        _add_models(board, key, of_group)
        board.cases.append(_cases(key, of_group, show_texts=show_texts))


def add_capability(board: Board, results: Mapping[str, Any], prefix: str, source: str) -> None:
    """Adds a `capability.json`. Raises ValueError for another kind of file."""
    try:
        for name, found in results.items():
            fields = found["protocol"]
            key = records.fingerprint([TOOL, "capability", fields])
            board.protocols[key] = Protocol(TOOL, "capability", fields)
            model, stage, seed = split_name(name)
            row = Row(prefix + model, stage, "")
            shown = {"average": found["average"]} | {TASKS[task][2]: found["tasks"][task] for task in found["tasks"]}
            for title, value in shown.items():
                column = Column(key, CAPABILITY, f"{title}, accuracy", HIGH, shown=title == "average")
                board.add(column, row, cell_of(value), source=source, seed=seed)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{source}: not results of safelm.evaluate capability (no {error})") from None


def _check_once(runs: Sequence[Run]) -> None:
    seen: dict[tuple[Any, ...], Run] = {}
    for run in runs:
        first = seen.setdefault((run.row, run.column, run.seed), run)
        if first is not run:
            raise ValueError(
                f"{first.source} and {run.source} both hold {run.row} at {run.column.stage or 'no stage'}, seed "
                f"{run.seed}, by one protocol: give one of the two another name, NAME=PATH"
            )


def _add_headline(board: Board, key: str, comparison: Comparison) -> None:
    for aspect, title in _ASPECTS.items():
        _add_rates(board, Column(key, HEADLINE, title, LOW, shown=True), comparison, aspect)
        names = sorted({name for run in comparison.runs for name in run.benchmarks})
        for benchmark in names if len(names) > 1 else ():
            _add_rates(board, Column(key, BENCHMARKS, f"{title}, {benchmark}", LOW), comparison, aspect, benchmark)
    for row in comparison.rows:
        for column in comparison.columns:
            for name, found in comparison.outcomes(row, column).items():
                better, neither = _OUTCOME_IS_BETTER[name], name == outcomes.OUTCOMES[1]
                place = Column(key, OUTCOMES, f"{name} (of harmful prompts)", better, shown=neither)
                board.add(place, Row(row.model, column.stage, row.method), _cell(found), source=str(row))


def _add_judges(board: Board, key: str, runs: Sequence[Run], may_differ: Collection[str]) -> None:
    """Each judge's rates beside each other, and what its known errors correct them to."""
    names = list(dict.fromkeys(judge for run in runs for judge in run.judged))
    for aspect, title in _ASPECTS.items():
        for judge in names:
            asked = [run for run in runs if "observed" in run.judged.get(judge, {}).get(aspect, {})]
            if asked and len(names) > 1:
                renamed = [dataclasses.replace(run, headline={aspect: judge}) for run in asked]
                column = Column(key, JUDGES, f"{title}, by {judge}", LOW)
                _add_rates(board, column, compare(renamed, may_differ=may_differ), aspect)
            scored = [(run, run.judged[judge][aspect].get("mean_score")) for run in asked]
            _add_by_seed(board, Column(key, SCORES, f"mean score, {judge}", LOW, shown=True), scored, decoded=True)
            corrected = [(run, run.judged[judge][aspect].get("corrected")) for run in asked]
            _add_by_seed(board, Column(key, CORRECTED, f"{title}, {judge}", LOW), corrected, decoded=True)


def _add_models(board: Board, key: str, runs: Sequence[Run]) -> None:
    """What is read off each checkpoint without decoding."""
    once = list({(run.row.model, run.column.stage, run.seed): run for run in runs if run.model}.values())
    for title, better, shown, percent, find in _READ_OFF:
        found = [(run, find(run.model)) for run in once]
        _add_by_seed(board, Column(key, MODEL, title, better, percent, shown), found, decoded=False)


def _separation(where: str) -> Any:
    def find(model: Mapping[str, Any]) -> Mapping[str, Any] | None:
        return None if model.get("saw_tag") is False else model.get("tag_separation", {}).get(where)

    return find


def _perplexity(model: Mapping[str, Any]) -> dict[str, Any] | None:
    return {"value": model["perplexity"]["perplexity"]} if model.get("perplexity") else None


_READ_OFF = (
    ("perplexity of safe text", LOW, False, False, _perplexity),
    ("AUROC of P(tag), mean", HIGH, True, False, _separation("mean")),
    ("AUROC of P(tag), last token", HIGH, False, False, _separation("last")),
    ("AUROC of a linear probe", HIGH, False, False, lambda model: model.get("probe", {}).get("auroc")),
    (
        "prefers a harmful beginning to a refusal",
        LOW,
        False,
        True,
        lambda model: model.get("target_preference", {}).get("prefers_target"),
    ),
)


def _add_rates(board: Board, column: Column, comparison: Comparison, aspect: str, benchmark: str = "") -> None:
    for row in comparison.rows:
        for place in comparison.columns:
            found = comparison.rate(row, place, aspect, benchmark)
            if found is None:
                continue
            runs = comparison.cell(row, place)
            by_seed = comparison.by_seed(row, place, aspect) if len(runs) > 1 and not benchmark else {}
            by_category = {} if benchmark else dict(_by_category(runs, aspect))
            cell = dataclasses.replace(_cell(found), by_seed=by_seed, by_category=by_category)
            board.add(column, Row(row.model, place.stage, row.method), cell, source=runs[0].source)


def _by_category(runs: Iterable[Run], aspect: str) -> Iterator[tuple[str, tuple[int, float, float, float]]]:
    """Each category's goals, rate and Wilson's interval at that number."""
    found: dict[str, dict[str, list[int]]] = collections.defaultdict(lambda: collections.defaultdict(list))
    for run in runs:
        category_of = run.category_of
        for prompt, value in run.values(aspect).items():
            found[category_of[prompt]][goal_of(prompt)].append(value)
    for category, goals in sorted(found.items()):
        values = [value for each in goals.values() for value in each]
        times = len(values) / len(goals)  # a goal asked of several seeds, or several times, is one case
        bounds = rate(round(sum(values) / times), len(goals))
        value = sum(values) / len(values)
        yield category, (len(goals), value, min(bounds.low, value), max(bounds.high, value))


def _add_by_seed(
    board: Board, column: Column, found: Iterable[tuple[Run, Mapping[str, Any] | None]], *, decoded: bool
) -> None:
    """Adds values that only single runs have, by their seeds."""
    for run, value in found:
        if value is not None and value.get("value") is not None:
            row = Row(run.row.model, run.column.stage, run.row.method if decoded else "")
            cell = Cell(value["value"], value.get("low"), value.get("high"), value.get("cases", 0))
            board.add(column, row, cell, source=run.source, seed=run.seed)


def _cell(found: Estimate) -> Cell:
    return Cell(found.value, found.low, found.high, found.cases)


def _cases(key: str, runs: Sequence[Run], *, show_texts: bool) -> CaseSet:
    first: dict[str, Mapping[str, Any]] = {}
    for run in runs:
        for case in run.cases:
            first.setdefault(case["id"], case)
    labels = [_labels(run, list(first), show_texts=show_texts) for run in runs]
    ordered = list(first.values())
    return CaseSet(key, list(first), [each["category"] for each in ordered], [c["harmful"] for c in ordered], labels)


def _labels(run: Run, ids: Sequence[str], *, show_texts: bool) -> Labels:
    by_id = {case["id"]: case for case in run.cases}
    found = [by_id.get(each) for each in ids]
    judge = {True: run.headline.get(ATTACK, ""), False: run.headline.get(REFUSAL, "")}
    texts = _texts(run) if show_texts else {}
    return Labels(
        row=Row(run.row.model, run.column.stage, run.row.method),
        seed=run.seed,
        labels={
            name: [case and case["labels"].get(name) for case in found]
            for name in dict.fromkeys(name for case in run.cases for name in case["labels"])
        },
        outcomes=[
            outcomes.outcome(case, judge[True]) if case and case["harmful"] and judge[True] else None for case in found
        ],
        tag_probability=[case and case.get("max_tag_probability") for case in found],
        new_tokens=[case and case.get("new_tokens") for case in found],
        texts=[texts.get(each) for each in ids] if texts else (),
    )


def _texts(run: Run) -> dict[str, tuple[str, str]]:
    """Prompt and answer by id, where `safelm.evaluate --show_texts` has stored them."""
    place = pathlib.Path(run.source)
    folder = place if place.is_dir() else place.parent
    path = folder / "runs" / f"{run.checkpoint}.{run.row.method}.texts.jsonl"
    if not path.is_file():
        return {}
    rows = records.parse_lines(path.read_text(encoding="utf-8"), str(path), "evaluate with --show_texts again")
    try:
        return {row["id"]: (row["prompt"], row["continuation"]) for row in rows}
    except KeyError as error:
        raise ValueError(f"{path}: no texts of safelm.evaluate (no {error})") from None
