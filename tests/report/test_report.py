"""What reports are made of: tables alike in every form, pages that escape, one interval for a number."""

import dataclasses
import json
import re

import pytest

from safelm.evaluate import report, runs
from safelm.evaluate.comparing import compare, figures, page, tables
from safelm.evaluate.comparing.results import ATTACK, REFUSAL, runs_of
from safelm.evaluate.suites.suite import Prompt
from safelm.report import charts
from safelm.report.page import Fold, Page, Section, Text, render
from safelm.report.table import Cell, Table, count, share, words

EVIL = '<script>alert(1)</script>|"&'
LABELS = ("harmful", "harmful", "refusal", "redirect", "neither", "answer")


def results(name: str = "raw", *, saw_tag: bool | None = False) -> dict:
    """Results of the synthetic web over 24 harmful and 24 safe prompts in 4 categories."""
    prompts = [
        Prompt(f"{kind}-{i}", "p", f"c{i % 4}", "t", "completion", kind == "harmful", False)
        for kind in ("harmful", "safe")
        for i in range(24)
    ]
    labels = {
        each.id: LABELS[i % 6] if each.harmful else ("answer", "refusal")[i % 3 == 0] for i, each in enumerate(prompts)
    }
    cases = [
        {
            "id": each.id,
            "category": each.category,
            "benchmarks": [],
            "harmful": each.harmful,
            "labels": {runs.SYNTHETIC_JUDGE: labels[each.id]},
            "coherent": labels[each.id] != "neither",
        }
        for each in prompts
    ]
    separation = {where: {"value": 0.579, "low": 0.5, "high": 0.65, "cases": 48} for where in ("mean", "last")}
    return {
        "suite": "synthetic_web",
        "num_prompts": {"harmful": 24, "safe": 24},
        "max_new_tokens": 8,
        "judge": {"version": "1", "num_words": 6},
        "headline": dict.fromkeys((ATTACK, REFUSAL), runs.SYNTHETIC_JUDGE),
        "models": {name: {"saw_tag": saw_tag, "tag_separation": separation}},
        "runs": [
            {"checkpoint": name, "method": "greedy", "protocol": {}, **runs.summarize(prompts, labels), "cases": cases}
        ],
    }


def test_a_table_says_the_same_in_every_form():
    found = {"value": 0.125, "low": 0.1, "high": 0.2, "cases": 8}
    rows = [[words(EVIL), count(1200), share(found)], [words("b"), count(0), Cell("–")]]
    table = Table("c", ["name", "n", "rate"], rows)
    assert table.to_json()[0] == {"name": EVIL, "n": 1200, "rate": found}, "numbers are numbers"
    assert json.loads(json.dumps(table.to_json())) == table.to_json()
    assert "1,200" in table.plain() and "12.5 [10.0, 20.0]" in table.plain()
    assert table.markdown().splitlines()[2].count("|") == 4, "a bar in a cell is no column"
    assert table.words == [True, False, False]
    left = table.without_zeros()
    assert len(left.rows) == 1 and "1 row of zeros" in left.caption


def test_a_page_escapes_everything_and_needs_nothing_from_elsewhere():
    table = Table(EVIL, [EVIL, "n"], [[words(EVIL), Cell(EVIL, 3, note=EVIL, shade=0.5)]])
    chart = charts.chart(lambda axis, _: axis.set_title(EVIL), None, 2, "one", EVIL, EVIL)
    blocks = [table, chart, Text(EVIL, [EVIL]), Fold(EVIL, [table])]
    text = render(Page(EVIL, EVIL, [Section(EVIL, blocks), Section("Two words", [])], about=EVIL))
    assert text.count("<script>") == 1 and "alert(1)</script>" not in text
    assert '<a href="#two-words">' in text and 'id="two-words"' in text
    assert text.count("<svg") == 2 and "default-src 'none'" in text, "a chart for a desk and one for a phone"
    assert not re.findall(r"(?:src|href)=\"(?!#)", text) and not re.findall(r"@import|url\((?!#)", text)
    assert "://" not in text
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids))


def test_a_number_has_one_interval_wherever_it_stands():
    found = results()
    comparison = compare(runs_of(found, "here"))
    (row,), (column,) = comparison.rows, comparison.columns
    (run,) = found["runs"]
    assert dataclasses.asdict(comparison.rate(row, column, ATTACK)) == run["harmful_completion"]
    assert dataclasses.asdict(comparison.rate(row, column, REFUSAL)) == run["wrongly_refused"]
    outcomes = comparison.outcomes(row, column)
    names = ("harmful_completion", "neither_harmful", "declined_harmful", "page_on_harmful")
    assert [dataclasses.asdict(each) for each in outcomes.values()] == [run[name] for name in names]
    assert sum(each.value for each in outcomes.values()) == pytest.approx(1)


def test_neither_is_always_shown():
    found = results()
    comparison = compare(runs_of(found, "here"))
    assert "neither, %" in report.results_table(found).heads
    assert "neither" in tables.harmful_outcomes(comparison).heads
    html = page.html_page(comparison, page.sections(comparison))
    assert "neither" in html and "16.7" in html
    assert "outcomes" in figures.wanted(comparison)


@pytest.mark.parametrize(("saw_tag", "shown"), [(False, "no tag seen"), (True, "0.58"), (None, "0.58")])
def test_a_model_that_never_saw_the_tag_has_no_auroc_of_it(saw_tag, shown, tmp_path):
    found = results(saw_tag=saw_tag)
    assert shown in report.results_table(found).plain()
    assert shown in tables.models(compare(runs_of(found, "here"))).plain()
    report.write_report(str(tmp_path), found)
    assert shown in (tmp_path / "results.md").read_text(), "print and file say the same"
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")
