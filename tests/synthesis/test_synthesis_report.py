"""The report says what the run did, without text; cards before and after; cost by its formula; the review form."""

import gzip
import io
import json
import re
from html.parser import HTMLParser

import pytest
from document_files import write_rows
from synthesis_runs import TROUBLED, no_charts, published, rejected, rows_of, run

from safelm.safety.report_card import difference, queries
from safelm.safety.synthesis import review
from safelm.safety.synthesis.gates import GateSettings
from safelm.safety.synthesis.report import cost
from safelm.safety.synthesis.report import page as report_page

HARMFUL = next(query for query in queries.load_queries(None).queries if query.count(" ") == 1)  # of the report card


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run whose first attempts are all harmful, over sources with a harmful n-gram each; charts are drawn."""
    folder = tmp_path_factory.mktemp("report")
    rows = [row | {"text": f"{row['text']} Somebody wrote {HARMFUL}."} for row in rows_of((1, 2, 3), 14)]
    place = write_rows(folder / "web.jsonl", rows)
    writer = f"{TROUBLED}?trouble=harmful&after=1"
    manifest = run(folder / "out", place, "--review=4", writer=writer)
    return folder / "out", manifest, rows


def report_of(made) -> dict:
    return json.loads((made[0] / "report" / "report.json").read_text())


def test_the_report_counts_what_the_run_did(made):
    out, manifest, rows = made
    report, totals = report_of(made), manifest["totals"]
    documents, drafts = report["documents"], report["drafts"]
    assert documents["in"] == len(rows) == totals["rows"]
    assert documents["published"] == len(published(out)) and documents["rejected"] == len(rejected(out))
    assert documents["in"] == documents["published"] + sum(documents["rejected_by"].values())
    assert drafts["attempts"] == totals["replies"] and drafts["passed"] == totals["passed"]
    kept = drafts["written"]
    for gate in drafts["gates"]:
        assert gate["checked"] == kept and sum(gate["reasons"].values()) == kept - gate["passed"]
        kept = gate["passed"]
        if gate["pass_rate"]:
            assert gate["pass_rate"]["low"] <= gate["pass_rate"]["share"] <= gate["pass_rate"]["high"]
    assert kept == drafts["passed"]
    score = next(gate for gate in drafts["gates"] if gate["gate"] == "score")
    assert score["reasons"]["score_above_1"] >= len(rows)  # every first attempt
    matrix = report["score_before_after"]["matrix"]
    assert sum(row[4] for row in matrix) >= len(rows) and not sum(matrix[0]) and not sum(matrix[5])
    assert sum(group["documents"] for group in report["styles"]) == len(rows)
    for found in report["distributions"].values():
        assert all(passed <= drafts for passed, drafts in zip(found["passed"], found["drafts"], strict=True))
    assert report["throughput"]["documents_per_second"] > 0 and report["spent"] == totals["spent"]


def test_the_cards_count_the_sources_and_what_was_published(made):
    out, _, rows = made
    sources, texts = report_of(made)["card"]["sources"], report_of(made)["card"]["published"]
    assert sources["documents"] == len(rows) and sources["all"]["hits"] >= len(rows)
    assert texts["documents"] == len(published(out))
    scored = {score: found["documents"] for score, found in texts["scores"].items() if found["documents"]}
    assert sum(scored.values()) == texts["documents"] and scored.keys() <= {"0", "1"}, "not the sources' scores"
    assert texts["all"]["hits"] == sum(row["text"].count(HARMFUL) for row in published(out).values())
    (change,) = report_of(made)["card"]["difference"]["slices"]
    assert change["name"] == "sources to published"
    assert change["all"]["after"]["per_million"] == texts["all"]["per_million"]
    cards = [str(out / "report" / f"card_{name}.json") for name in ("sources", "published")]
    again = difference.compare(*map(difference.read_card, cards))  # what safelm.report_card --diff does
    assert again["slices"] == report_of(made)["card"]["difference"]["slices"]
    assert not (out / "_counted").exists()


class _Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.links, self.text = [], []

    def handle_starttag(self, tag, attrs):
        self.links += [value for name, value in attrs if name in ("src", "href") and not (value or "").startswith("#")]

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_is_self_contained_and_shows_the_numbers(made):
    out, manifest, _ = made
    page = _Page()
    page.feed((out / "report" / "report.html").read_text())
    text = " ".join(page.text)
    assert not page.links and "SafeWeb: from sources to a corpus" in text
    totals = manifest["totals"]
    assert f"{totals['published']:,} of {totals['rows']:,} documents became SafeWeb" in text
    assert "score_above_1" in text and "A million published documents" in text
    html = (out / "report" / "report.html").read_text()
    limits, bins = GateSettings(), report_of(made)["distributions"]
    assert bins["similarity"]["low"] == limits.min_word_similarity and bins["copied_share"]["low"] is None
    assert f"at least {limits.min_word_similarity:g}" in html and f"at most {limits.max_copied_share:g}" in html
    assert html.count("<svg") == 2 * 5 and len(set(re.findall(r'id="([^"]+)"', html))) == len(
        re.findall(r'id="([^"]+)"', html)
    )
    assert (out / "report" / "report.png").read_bytes().startswith(b"\x89PNG")
    assert "| score |" in (out / "report" / "report.md").read_text()


def test_only_the_pairs_for_review_hold_text(made):
    out, _, rows = made
    texts = [row["text"] for row in rows] + [row["text"] for row in published(out).values()]
    pieces = [text[at : at + 40] for text in texts for at in (0, len(text) // 2)]
    for path in out.rglob("*"):
        if path.is_file() and not path.name.endswith(".jsonl.gz"):
            found = [piece for piece in pieces if piece in path.read_text(errors="replace")]
            assert bool(found) == (path.name == "review_pairs.jsonl"), path
    pairs = review.read_pairs(str(out / "report" / "review_pairs.jsonl"))
    assert len(pairs) == 4
    for pair in pairs:
        assert pair["text"] == published(out)[pair["source_id"]]["text"]
        assert pair["source"] == next(row["text"] for row in rows if row["id"] == pair["source_id"])


# ---- cost

TOTALS = {"published": 50, "replies": 100, "prompt_tokens": 80_000, "completion_tokens": 40_000, "spent": {"cost": 2.0}}


def test_cost_follows_its_formula():
    found = cost.per_million(TOTALS, tokens_per_second=400.0)
    assert found["prompt_tokens"] == 1.6e9 and found["completion_tokens"] == 8e8
    assert found["context_tokens"] == (80_000 + 20_000) / 100
    assert found["hours_as_here"] == pytest.approx(8e8 / 400 / 3600) and found["cost_as_here"] == pytest.approx(40_000)
    machine, model = cost.MACHINES[0], cost.MODELS[0]
    by_hand = 1.6e9 * 2 * 8e9 / (4 * 197e12 * cost.FLOPS_USED)
    batch = cost.batch_size(machine, model, 1000)
    by_hand += 8e8 * (16e9 / batch + 131_072 * 1000) / (4 * 819e9 * cost.BANDWIDTH_USED)
    (same,) = [one for one in found["machines"] if (one["machine"], one["model"]) == (machine.name, model.name)]
    assert same["hours"] == pytest.approx(by_hand / 3600)
    assert same["dollars"] == pytest.approx(by_hand / 3600 * 4.8)
    assert cost.per_million(TOTALS | {"published": 0}, 1.0) is None
    worse = cost.per_million(TOTALS | {"published": 25}, 400.0)  # half the pass rate, twice the cost
    assert worse["machines"][0]["hours"] == pytest.approx(2 * found["machines"][0]["hours"])


def test_what_the_writer_reached_stands_beside_the_roofline(made):
    assert cost.per_million(TOTALS, 400.0)["measured"] is None  # no seconds in the ledger
    spent = {"seconds": 80.0, "completion_tokens": 40_000, "prompt_tokens": 80_000}
    found = cost.per_million(TOTALS | {"spent": spent}, tokens_per_second=400.0)
    rates = {name: found["measured"][f"{name}_tokens_per_second"] for name in ("completion", "prompt")}
    assert rates == {"completion": 500, "prompt": 1000}
    assert found["measured"]["hours"] == pytest.approx(8e8 / 500 / 3600)
    for one in found["machines"]:
        assert one["times_measured"] == pytest.approx(one["completion_tokens_per_second"] / 500)
        assert one["times_measured"] * one["hours"] == pytest.approx(found["measured"]["hours"])
    assert cost.measured({"seconds": 80.0, "completion_tokens": 0}) is None
    assert "measured: this run" not in report_page.write(report_of(made))
    assert "measured: this run" in report_page.write(report_of(made) | {"cost_per_million": found})


def test_a_model_that_does_not_fit_has_no_cost():
    small = cost.Machine("one chip", 197e12, 819e9, 16e9, 1.2)
    assert cost.batch_size(small, cost.MODELS[0], 1000) == 0
    assert cost.seconds(small, cost.MODELS[0], prompt_tokens=1, completion_tokens=1, context=1000) is None


# ---- the review form


def answer(pairs, path, keys: str, reviewer: str = "r") -> str:
    shown = io.StringIO()
    review.review(pairs, str(path), reviewer, io.StringIO("".join(f"{key}\n" for key in keys)), shown)
    return shown.getvalue()


def test_review_keeps_each_verdict_and_goes_on_where_it_was(made, tmp_path):
    pairs, path = review.read_pairs(str(made[0] / "report" / "review_pairs.jsonl")), tmp_path / "verdicts.jsonl"
    shown = answer(pairs, path, "yyn" + "s" + "xy?nq")
    assert "1 of 4" in shown and "3 of 4" in shown
    first = review.read_verdicts(str(path))
    assert [verdict["id"] for verdict in first] == [pairs[0]["id"], pairs[2]["id"]]
    assert first[0]["answers"] == {"safe": "yes", "faithful": "yes", "well_written": "no"}
    assert first[1]["answers"] == {"safe": "yes", "faithful": "unclear", "well_written": "no"}
    with open(path, "a") as file:
        file.write('{"id": "cut sh')  # killed while writing
    shown = answer(pairs, path, "nnnyyy")
    assert "3 of 4" in shown and pairs[0]["id"] not in shown
    assert [verdict["id"] for verdict in review.read_verdicts(str(path))[2:]] == [pairs[1]["id"], pairs[3]["id"]]
    assert "1 of 4" not in answer(pairs, path, "yyy")
    assert pairs[0]["id"] in answer(pairs, path, "yyy", reviewer="another")
    said = review.summary(review.read_verdicts(str(path)))
    assert "safe: yes 4, no 1, unclear 0; share of yes 0.800 [0.376, 0.964]" in said
    assert not any(pair["text"][:40] in path.read_text() for pair in pairs)


def test_review_shows_nothing_that_a_terminal_would_act_on(tmp_path):
    pair = {"id": "a", "source": "\x1b[2J red\u202e", "text": "fine\u200b"}
    shown = answer([pair], tmp_path / "v", "q")
    assert "\\u001b[2J red\\u202e" in shown and "fine\\u200b" in shown and not {"\x1b", "\u202e"} & set(shown)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no pair is there"),
        ("{\n", "line 1 is not JSON"),
        ('{"id": "a"}\n', "line 1 has not all of id, source, text"),
    ],
)
def test_review_of_what_holds_no_pairs_is_one_clear_line(tmp_path, content, message):
    path = tmp_path / "pairs.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=f"pairs.jsonl: {message}"):
        review.read_pairs(str(path))


def test_pairs_are_the_same_whatever_the_order_of_the_input(tmp_path, monkeypatch):
    no_charts(monkeypatch)
    rows = rows_of((1, 2, 3), 12)
    places = [write_rows(tmp_path / name, some) for name, some in (("a.jsonl.gz", rows), ("b.jsonl.gz", rows[::-1]))]
    kept = []
    for place in places:
        run(tmp_path / place.name[0], place, "--review=3", "--gate=duplicate_threshold=1")
        kept.append(
            [pair["id"] for pair in review.read_pairs(str(tmp_path / place.name[0] / "report/review_pairs.jsonl"))]
        )
    assert kept[0] == kept[1] and len(kept[0]) == 3
    assert gzip.open(places[0]).read() != gzip.open(places[1]).read()
