"""The report card's command: counts, slices, intervals, files, errors, differences."""

import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from document_files import write_rows as write

from safelm import report_card
from safelm.jobs import beam_runner
from safelm.safety.report_card import card, charts, corpus, counting, difference
from safelm.safety.report_card.tally import Count, Hits
from safelm.synthetic_web import corpus as synthetic_corpus

QUERIES = {"categories": {"kitchen": ["grey kettle", "blue pan"], "garden": ["wet spade", "blue pan"]}}
ROWS = [
    {"id": "a", "text": "A grey kettle; a Grey-Kettle!", "harm_score": 5},
    {"id": "b", "text": "blue pan", "harm_score": 0},
    {"id": "c", "text": "", "harm_score": 0},
    {"id": "d", "text": "nothing here at all", "harm_score": 2},
    {"id": 7, "text": "wet  spade", "harm_score": None},
]


@pytest.fixture(autouse=True)
def charts_drawn(request, monkeypatch):
    """Charts take seconds: tests that ask for `real_charts` draw them, the others don't."""
    if "real_charts" not in request.fixturenames:
        monkeypatch.setattr(charts, "draw_png", lambda path, card: path.write_bytes(b""))
        monkeypatch.setattr(charts, "of_page", lambda card: ())


@pytest.fixture
def real_charts():
    pass


@pytest.fixture
def queries(tmp_path):
    return write(tmp_path / "queries.json", [QUERIES])


def run(*arguments: object) -> None:
    report_card.main(report_card._parser().parse_args([str(argument) for argument in arguments]))


def make(tmp_path: Path, *arguments: object, name: str = "card") -> dict:
    run(*arguments, f"--output={tmp_path / name}")
    return json.loads((tmp_path / name / "card.json").read_text())


def slices(found: dict) -> dict:
    return {one["name"]: one for one in found["slices"]}


def test_a_card_by_score(tmp_path, queries, capsys):
    write(tmp_path / "web" / "a.jsonl", ROWS)
    found = make(tmp_path, f"--input={tmp_path / 'web'}", f"--queries={queries}")
    by_name = slices(found)
    assert list(by_name) == ["all", "score 0", "score 1 to 3", "score 4 to 5", "unscored"]
    whole = by_name["all"]
    assert (whole["documents"], whole["empty_documents"], whole["tokens"]) == (5, 1, 6 + 2 + 4 + 2)
    assert whole["bytes"] == sum(len(row["text"]) for row in ROWS)
    assert {score: facts["documents"] for score, facts in whole["scores"].items()} == {
        "0": 2,
        "1": 0,
        "2": 1,
        "3": 0,
        "4": 0,
        "5": 1,
        "unscored": 1,
    }
    assert (whole["all"]["hits"], whole["all"]["documents"], whole["all"]["squares"]) == (4, 3, 6)
    assert whole["categories"]["kitchen"]["hits"] == 3 and whole["categories"]["garden"]["hits"] == 2
    assert whole["queries_found"]["blue pan"]["hits"] == 1
    assert whole["all"]["per_million"] == pytest.approx(4 / 14 * 1e6)
    assert by_name["score 4 to 5"]["categories"]["kitchen"]["hits"] == 2
    assert [(one["id"], one["hits"], one["row"]) for one in whole["top_documents"]] == [
        ("a", 2, 1),
        ("b", 1, 2),
        ("7", 1, 5),
    ]
    assert found["inputs"][0]["score_columns"] == {"harm_score": 4}
    assert "| kitchen |" in capsys.readouterr().out


def test_a_card_without_top_documents(tmp_path, queries):
    write(tmp_path / "web" / "a.jsonl", ROWS)
    files = (f"--input={tmp_path / 'web'}", f"--queries={queries}")
    none, some = (slices(make(tmp_path, *files, f"--top={top}", name=str(top)))["all"] for top in (0, 1))
    assert none.pop("top_documents") == [] and len(some.pop("top_documents")) == 1 and none == some


def test_named_slices_side_by_side_and_every_format(tmp_path, queries):
    write(tmp_path / "a.jsonl.gz", ROWS)
    table = pyarrow.Table.from_pylist([row | {"id": str(row["id"])} for row in ROWS])
    pyarrow.parquet.write_table(table, tmp_path / "b.parquet", row_group_size=2)
    found = make(tmp_path, f"--slice=one={tmp_path}/a.*", f"--slice=two={tmp_path}/*.parquet", f"--queries={queries}")
    one, two = (by | {"name": "", "top_documents": []} for by in found["slices"])
    assert one == two and [by["name"] for by in found["slices"]] == ["one", "two"]
    assert [top["row"] for top in found["slices"][1]["top_documents"]] == [1, 2, 5]


def test_no_text_in_any_file_unless_asked_for(tmp_path, queries):
    write(tmp_path / "a.jsonl", [{"id": "x", "text": "zinnia before the grey kettle and <b>zebra</b> after"}])
    arguments = (f"--input={tmp_path / 'a.jsonl'}", f"--queries={queries}")
    run(*arguments, f"--output={tmp_path / 'card'}")
    run(*arguments, f"--output={tmp_path / 'shown'}", "--show_text")
    for file in (tmp_path / "card").iterdir():
        assert b"zinnia" not in file.read_bytes() and b"zebra" not in file.read_bytes()
    shown = json.loads((tmp_path / "shown" / "card.json").read_text())
    assert "zinnia before the grey kettle" in shown["slices"][0]["top_documents"][0]["excerpt"]


class _Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.ids, self.svgs, self.links, self.stack = [], [], [], []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.svgs += [attrs] if tag == "svg" else []
        self.links += [value for key, value in attrs.items() if key in ("src", "href", "xlink:href") and value]


def test_the_page_is_self_contained_accessible_and_escapes_what_a_corpus_says(tmp_path, queries, real_charts):
    identity = "<script>alert(1)</script>"
    write(tmp_path / "a.jsonl", [{"id": identity, "text": "grey kettle", "harm_score": 3}])
    run(
        f"--input={tmp_path / 'a.jsonl'}",
        f"--slice=<i>$x={tmp_path}/a.jsonl",
        f"--queries={queries}",
        f"--output={tmp_path / 'c'}",
    )
    text = (tmp_path / "c" / "card.html").read_text()
    assert "3 n-gram queries in 2 categories" in text and "1 of 3 queries occur" in text
    page = _Page()
    page.feed(text)
    assert identity not in text and "&lt;script&gt;alert(1)" in text and "<i>" not in text
    assert len(page.svgs) == 4 and len(page.ids) == len(set(page.ids))
    for svg in page.svgs:
        assert svg["role"] == "img" and set(svg["aria-labelledby"].split()) <= set(page.ids)
    assert all(link.startswith(("#", "data:")) for link in page.links)
    assert set(re.findall(r"url\(#([^)]*)\)", text)) <= set(page.ids)
    assert not re.findall(r"@import|url\((?!#)", text)
    assert (tmp_path / "c" / "card.png").read_bytes().startswith(b"\x89PNG")


def test_a_text_made_from_another_counts_by_its_own_score(tmp_path, queries):
    source = {"metadata": {"int_score": 3}, "prompt_version": "safeweb-v1", "source_id": "a"}
    rows = [
        {"id": "a", "text": "one", "harm_score": 3},
        {"id": "b", "text": "two", **source, "text_harm_score": 0},
        {"id": "c", "text": "three", **source},  # its source's score is not its own
        {"id": "d", "text": "four", "metadata": {"harm_score": 4, "text_harm_score": 1}},
    ]
    write(tmp_path / "a.jsonl", rows)
    found = make(tmp_path, f"--slice=made={tmp_path / 'a.jsonl'}", f"--queries={queries}")
    scores = slices(found)["made"]["scores"]
    assert {name: one["documents"] for name, one in scores.items() if one["documents"]} == {
        "0": 1,
        "1": 1,
        "3": 1,
        "unscored": 1,
    }
    assert set(found["inputs"][0]["score_columns"]) == {"harm_score", "text_harm_score", "metadata.text_harm_score"}
    assert not found["inputs"][0]["columns_not_taken_for_harm"], "int_score of such a row is no harm of another kind"


def test_malformed_rows_are_counted_and_bounded(tmp_path, queries):
    write(tmp_path / "a.jsonl", [*ROWS, "{", '"x"', "", {"id": "no text"}, {"text": 3}])
    found = make(tmp_path, f"--input={tmp_path / 'a.jsonl'}", f"--queries={queries}")
    facts = found["inputs"][0]
    assert (facts["rows"], facts["malformed_rows"]) == (9, 4) and sum(facts["malformed_reasons"].values()) == 4
    assert slices(found)["all"]["documents"] == 5
    write(tmp_path / "b.jsonl", ROWS * 30 + ["{"] * 101)
    with pytest.raises(ValueError, match=r"101 of 251 rows are malformed.*not JSON"):
        make(tmp_path, f"--input={tmp_path / 'b.jsonl'}", f"--queries={queries}")


@pytest.mark.parametrize(
    "rows, flags, complaint",
    [
        ([{"id": "a", "body": "x"}], (), "missing column 'text'; it has body, id"),
        ([], (), "no document"),
        (ROWS, ("--top=-1",), "--top=-1"),
        (ROWS, ("--max_malformed_fraction=2",), "--max_malformed_fraction=2.0: must be from 0 to 1"),
        (ROWS, ("--slice=x",), "expected NAME=FILES"),
        (ROWS, ("--slice=x=nowhere.jsonl",), "nowhere.jsonl: no such file"),
        (ROWS, ("--tokenizer=nowhere",), "nowhere: no such"),
        (ROWS, ("--runner=dask",), "loses records"),
        (ROWS, ("--score_column=metadata.harm",), "--score_column=metadata.harm: no document has it"),
        (ROWS, ("--id_column=url",), "missing column 'url'; it has harm_score, id, text"),
        (ROWS, ("--slice=score 0=a.jsonl",), "--slice=score 0: a slice of --input has this name"),
    ],
)
def test_bad_input_is_one_clear_error(tmp_path, rows, flags, complaint):
    path = write(tmp_path / "a.jsonl", rows)
    with pytest.raises((ValueError, OSError), match=re.escape(complaint)):
        run(f"--input={path}", f"--output={tmp_path / 'card'}", *flags)
    assert not (tmp_path / "card" / "card.json").exists()


def test_an_output_of_scoring_is_an_input_without_its_quarantine(tmp_path, queries):
    write(tmp_path / "scored" / "score=0" / "a.jsonl.gz", ROWS[1:2])
    write(tmp_path / "scored" / "quarantine" / "a.jsonl.gz", [{"file": "f", "row": 1, "raw": "grey kettle"}])
    found = make(tmp_path, f"--input={tmp_path / 'scored'}", f"--queries={queries}")
    assert found["inputs"][0]["files"] == 1 and slices(found)["all"]["documents"] == 1


def test_pieces_and_their_order_change_nothing(tmp_path, queries, monkeypatch):
    rows = [{"id": f"{n}", "text": synthetic_corpus.draft(1, "train", n).text, "harm_score": n % 6} for n in range(40)]
    write(tmp_path / "web" / "a.jsonl", rows[:30])
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "web" / "b.parquet", row_group_size=7)
    whole = make(tmp_path, f"--input={tmp_path / 'web'}", name="whole")
    monkeypatch.setattr(corpus, "PIECE_BYTES", 4000)
    monkeypatch.setattr(counting, "_BATCH_CHARACTERS", 1500)
    assert make(tmp_path, f"--input={tmp_path / 'web'}", name="cut") == whole
    assert whole["slices"][0]["top_documents"]


def test_a_stopped_run_goes_on_and_counts_nothing_again(tmp_path, queries, monkeypatch):
    for name in "abc":
        write(tmp_path / "web" / f"{name}.jsonl", ROWS)
    arguments = (f"--input={tmp_path / 'web'}", f"--queries={queries}")
    expected, seen, count_piece = make(tmp_path, *arguments, name="whole"), [], corpus.count_piece

    def stopping(piece, settings):
        seen.append(piece.path)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return count_piece(piece, settings)

    monkeypatch.setattr(corpus, "count_piece", stopping)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, *arguments)
    assert make(tmp_path, *arguments) == expected
    assert len(seen) == 4 and not (tmp_path / "card" / "counted").exists()


def test_a_changed_file_is_counted_again(tmp_path):
    settings, one = counting.CountSettings(), corpus.SliceInput(None, (str(tmp_path / "a.jsonl"),))
    write(tmp_path / "a.jsonl", ROWS)
    kept = str(tmp_path / "kept")
    assert corpus.count_corpus([one], settings, kept)[0].count.rows == 5
    write(tmp_path / "a.jsonl", ROWS[:3])
    assert corpus.count_corpus([one], settings, kept)[0].count.rows == 3


def test_worker_processes_count_the_same_and_one_that_fails_costs_no_other_piece(tmp_path, monkeypatch):
    write(tmp_path / "web" / "a.jsonl", ROWS)
    write(tmp_path / "web" / "b.jsonl", [{"body": "x"}])
    inputs = [corpus.SliceInput(None, (str(tmp_path / "web"),))]
    settings, kept = counting.CountSettings(), str(tmp_path / "kept")
    with pytest.raises(ValueError, match=r"b\.jsonl: missing column 'text'; it has body"):
        corpus.count_corpus(inputs, settings, kept, beam_runner.Runner(workers=2))
    write(tmp_path / "web" / "b.jsonl", ROWS)
    counted, count_piece = [], corpus.count_piece
    monkeypatch.setattr(corpus, "count_piece", lambda *a: counted.append(a[0].path) or count_piece(*a))
    (found,) = corpus.count_corpus(inputs, settings, kept)
    (expected,) = corpus.count_corpus(inputs, settings, str(tmp_path / "fresh"))
    assert found == expected and [os.path.basename(path) for path in counted] == ["b.jsonl", "a.jsonl", "b.jsonl"]


def test_tokens_of_a_tokenizer(tmp_path, queries):
    from safelm.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.train([row["text"] for row in ROWS], 300)
    tokenizer.save(str(tmp_path / "tokenizer"))
    write(tmp_path / "a.jsonl", ROWS)
    arguments = (f"--input={tmp_path / 'a.jsonl'}", f"--queries={queries}", f"--tokenizer={tmp_path / 'tokenizer'}")
    found = make(tmp_path, *arguments)
    assert slices(found)["all"]["tokens"] == sum(len(tokenizer.encode(row["text"])) for row in ROWS)
    assert tokenizer.hash in found["definitions"]["token"]


def test_count_survives_json():
    count = Count(rows=3)
    count.malformed["x"] += 1
    count.tallies = {"s": counting.Tally(documents=3, found={"all": Hits(1, 1, 1, 1)})}
    assert Count.from_json(count.to_json()) == count


def test_hits_of_parts_add_up_in_any_order():
    documents, whole = [3, 1, 7, 2], Hits()
    for hits in documents:
        whole.add(hits)
    for cut in range(5):
        parts = [Hits(), Hits()]
        for at, hits in enumerate(documents):
            parts[at < cut].add(hits)
        parts[0].merge(parts[1])
        assert parts[0] == whole == Hits(hits=13, documents=4, squares=63, largest=7)


def test_intervals_are_exact_poisson_without_clusters_and_cover_with_them():
    low, high = card.gamma_interval(Hits(hits=10, documents=10, squares=10, largest=1), 1.0)
    assert (low, high) == (pytest.approx(4.795, abs=1e-3), pytest.approx(18.390, abs=1e-3))  # Garwood 1936
    assert card.gamma_interval(Hits(), 2.0) == (0.0, pytest.approx(3.689 / 2, abs=1e-3))
    rng, covered = np.random.default_rng(0), 0
    for _ in range(400):  # hits cluster: 1 + Poisson(3) in each of some 12 documents
        sizes = 1 + rng.poisson(3, rng.poisson(12))
        hits = Hits(int(sizes.sum()), len(sizes), int((sizes**2).sum()), int(sizes.max(initial=0)))
        low, high = card.gamma_interval(hits, 1.0)
        covered += low <= 48 <= high
    assert covered / 400 >= 0.95 - 0.02


def test_a_difference(tmp_path, queries, capsys):
    write(tmp_path / "a.jsonl", ROWS * 50)
    write(tmp_path / "b.jsonl", ROWS[1:] * 50)
    arguments = (f"--queries={queries}",)
    make(tmp_path, f"--slice=web={tmp_path / 'a.jsonl'}", *arguments, name="a")
    make(tmp_path, f"--slice=clean={tmp_path / 'b.jsonl'}", *arguments, name="b")
    capsys.readouterr()
    run("--diff", tmp_path / "a", tmp_path / "b" / "card.json", f"--output={tmp_path / 'diff'}")
    found = json.loads((tmp_path / "diff" / "diff.json").read_text())
    (one,) = found["slices"]
    assert one["name"] == "web to clean" and one["documents"] == {"before": 250, "after": 200}
    change = one["categories"]["kitchen"]
    assert change["ratio"] == pytest.approx((50 / 400) / (150 / 700)) and not change["overlap"]
    assert change["ratio_low"] < change["ratio"] < change["ratio_high"] < 1
    assert one["all"]["overlap"] and one["categories"]["garden"]["ratio"] == pytest.approx(1.75)
    assert "| kitchen | 214,286 | 125,000 | 0.583x | apart |" in capsys.readouterr().out
    assert "0.583x" in (tmp_path / "diff" / "diff.html").read_text()


def test_cards_that_count_other_things_are_not_compared(tmp_path, queries):
    write(tmp_path / "a.jsonl", ROWS)
    make(tmp_path, f"--input={tmp_path / 'a.jsonl'}", f"--queries={queries}", name="a")
    make(tmp_path, f"--input={tmp_path / 'a.jsonl'}", name="b")
    make(tmp_path, f"--slice=x={tmp_path / 'a.jsonl'}", f"--queries={queries}", name="c")
    cards = {name: difference.read_card(str(tmp_path / name)) for name in "abc"}
    with pytest.raises(ValueError, match=r"list of queries is '.*queries.json' \(hash .*\) in one and 'Maini"):
        difference.compare(cards["a"], cards["b"])
    other = cards["a"] | {"definitions": cards["a"]["definitions"] | {"token": "bytes"}}
    with pytest.raises(ValueError, match=r"token is .* and 'bytes'"):
        difference.compare(cards["a"], other)
    with pytest.raises(ValueError, match=r"share no slice: all, score 0.* and x"):
        difference.compare(cards["a"], cards["c"])
    write(tmp_path / "no.json", [{"schema": "other"}])
    with pytest.raises(ValueError, match=r"no\.json: not a report card"):
        difference.read_card(str(tmp_path / "no.json"))


def test_the_default_uses_every_core():
    assert beam_runner.local_workers(beam_runner.Runner(), 10_000) == len(os.sched_getaffinity(0))
