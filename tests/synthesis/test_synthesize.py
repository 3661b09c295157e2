"""Whole runs of safelm.synthesize with a writer that needs no model: what comes out, what is refused."""

import json

import pyarrow
import pyarrow.parquet
import pytest
from document_files import write_rows
from synthesis_runs import (
    NAMES,
    TROUBLED,
    comparable,
    data,
    no_charts,
    published,
    rejected,
    rows_of,
    run,
    write_sources,
)

from safelm.safety.lexicon_scorer import LexiconScorer
from safelm.safety.synthesis import columns
from safelm.safety.synthesis.kinds import KINDS
from safelm.safety.synthesis.prompt_files import choose_style, load_prompts


@pytest.fixture(autouse=True)
def without_charts(monkeypatch):
    no_charts(monkeypatch)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return write_sources(tmp_path_factory.mktemp("sources"))


# ---- what comes out


@pytest.mark.parametrize("kind", KINDS)
def test_every_document_is_published_or_rejected_and_rows_say_where_they_come_from(sources, tmp_path, kind):
    manifest = run(tmp_path / "out", sources / kind, kind=kind)
    rows, others = published(tmp_path / "out"), rejected(tmp_path / "out")
    given = {json.loads(line)["id"]: json.loads(line) for p in (sources / kind).iterdir() for line in open(p)}
    repeated = manifest["totals"]["near_duplicates"]
    assert not rows.keys() & others.keys() and len(rows) + len(others) + repeated == 36
    assert rows.keys() | others.keys() <= given.keys() and len(rows) >= 24
    prompts = load_prompts(kind)
    for identity, row in rows.items():
        source = given[identity]
        assert row["id"] == f"{identity}-{kind}" and row["model"] == "template"
        assert row["prompt_version"] == f"{kind}-v1-{prompts.hash[:12]}" and row["style"] in prompts.styles
        assert row["metadata"]["int_score"] == source["harm_score"]
        assert row["metadata"]["url"] == source["metadata"]["url"] and row["category"]
        assert {"score", "sentences", "copying", "faithfulness"} < json.loads(row["gates"]).keys()
        assert LexiconScorer().score([row["text"]])[0].score <= (2 if kind == "refuseweb" else 1)
    assert manifest["totals"]["published"] == len(rows) == sum(f["rows"] for f in manifest["files"].values())
    assert {"validation" if name.startswith("validation-") else "train" for name in manifest["files"]} == {
        "train",
        "validation",
    }
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if p.name.startswith("_")) == ["_settings.json"]


def test_parquet_in_and_out_says_the_same(sources, tmp_path):
    rows = [json.loads(line) for line in open(sources / "refuseweb" / "podcast.jsonl")]
    write_rows(tmp_path / "in" / "podcast.parquet", rows)
    run(tmp_path / "out", tmp_path / "in", kind="refuseweb")
    (path,) = (tmp_path / "out").glob("*.parquet")
    written, wanted = pyarrow.parquet.read_schema(path), columns.schema()
    assert written.names == wanted.names
    of = {schema: {field.name: field.type for field in schema.field("metadata").type} for schema in (written, wanted)}
    assert of[written] | {"date": None} == of[wanted] | {"date": None}  # Parquet knows no whole seconds
    run(tmp_path / "json", sources / "refuseweb" / "podcast.jsonl", kind="refuseweb")
    assert published(tmp_path / "out") == published(tmp_path / "json")


def test_moral_education_is_made_from_refuseweb_too(sources, tmp_path):
    run(tmp_path / "refuseweb", sources / "refuseweb", kind="refuseweb")
    manifest = run(tmp_path / "moral", tmp_path / "refuseweb", kind="moral_education")
    dialogues, lessons = published(tmp_path / "refuseweb"), published(tmp_path / "moral")
    assert lessons.keys() <= dialogues.keys() and len(lessons) >= 24
    for identity, row in lessons.items():
        assert row["id"] == f"{identity}-moral_education" and row["category"] == dialogues[identity]["category"]
        assert row["metadata"]["int_score"] == dialogues[identity]["metadata"]["int_score"]
    assert manifest["funnel"]["categories"].keys() == {row["category"] for row in dialogues.values()}
    for other in ("safeweb", "refuseweb"):
        with pytest.raises(ValueError, match=f"row 1 is text of refuseweb already; {other} is made from web documents"):
            run(tmp_path / other[::-1], tmp_path / "refuseweb", "--scores=4,5", kind=other)


def test_a_seed_decides_styles_and_texts(sources, tmp_path):
    place = sources / "safeweb" / "podcast.jsonl"
    one, again, other = tmp_path / "one", tmp_path / "again", tmp_path / "other"
    assert comparable(run(one, place)) == comparable(run(again, place)) and data(one) == data(again)
    run(other, place, "--seed=1")
    first, second = published(one), published(other)
    both = first.keys() & second.keys()
    assert sum(first[key]["style"] != second[key]["style"] for key in both) > len(both) / 2


def test_parts_of_a_file_give_the_same_documents(sources, tmp_path):
    rows = [json.loads(line) for name in NAMES for line in open(sources / "safeweb" / f"{name}.jsonl")]
    for row in rows:
        row["padding"] = "x" * 60_000
    place = write_rows(tmp_path / "in" / "web.jsonl", rows)
    manifest = run(tmp_path / "parts", place, "--part_mb=1")
    assert len(manifest["shards"]) > 1
    run(tmp_path / "whole", place)
    assert published(tmp_path / "parts") == published(tmp_path / "whole")
    assert rejected(tmp_path / "parts") == rejected(tmp_path / "whole")  # row numbers too


# ---- gates and attempts


def test_what_fails_is_written_again_in_another_style(sources, tmp_path):
    place, prompts = sources / "safeweb" / "podcast.jsonl", load_prompts("safeweb")
    manifest = run(tmp_path / "out", place, writer=f"{TROUBLED}?trouble=harmful&after=2")
    rows = published(tmp_path / "out")
    assert rows
    for identity, row in rows.items():
        assert row["style"] == choose_style(prompts, identity, 0, attempt=2)
    assert set(manifest["funnel"]["attempts_needed"]) == {"3"}
    assert manifest["funnel"]["gates"]["score"]["reason:score_above_1"] >= 24


def test_what_always_fails_is_dropped_with_every_attempt_on_record_and_no_text(sources, tmp_path, caplog):
    place = sources / "safeweb" / "podcast.jsonl"
    manifest = run(tmp_path / "out", place, "--attempts=2", writer=f"{TROUBLED}?trouble=harmful")
    assert manifest["totals"]["published"] == 0 and manifest["files"] == {}
    assert "no document passed the gates" in caplog.text
    lines = rejected(tmp_path / "out")
    assert len(lines) == 12
    for line in lines.values():
        assert len({attempt["style"] for attempt in line["attempts"]}) == 2 and line["row"] >= 1
        assert [attempt["failure"] for attempt in line["attempts"]] == ["score:score_above_1"] * 2
        assert "text" not in line["attempts"][0]
    report = json.loads((tmp_path / "out" / "report" / "report.json").read_text())
    assert report["card"]["published"] is None and report["cost_per_million"] is None
    run(tmp_path / "kept", place, "--attempts=1", "--keep_rejected_text", writer=f"{TROUBLED}?trouble=harmful")
    assert all("Nobody will trace it." in line["attempts"][0]["text"] for line in rejected(tmp_path / "kept").values())


def test_near_duplicates_are_published_once(tmp_path):
    rows = rows_of((1, 2, 3), 6)
    copies = [row | {"id": f"{row['id']}-copy"} for row in rows]
    place = write_rows(tmp_path / "in.jsonl", [*rows, *copies])
    manifest = run(tmp_path / "out", place, "--gate=duplicate_threshold=0.3")
    totals, ids = manifest["totals"], published(tmp_path / "out").keys()
    assert totals["near_duplicates"] > 0 and totals["published"] == len(ids) >= 3
    lines = [json.loads(line) for line in open(tmp_path / "out" / "rejected" / "near_duplicates.rejected")]
    assert len(lines) == totals["near_duplicates"]
    for line in lines:
        assert (
            line["near_duplicate_of"].removesuffix("-safeweb") in ids and line["id"].removesuffix("-safeweb") not in ids
        )


def test_a_score_5_document_goes_to_safeweb_only_when_asked_for(sources, tmp_path):
    place = sources / "refuseweb" / "podcast.jsonl"
    with pytest.raises(ValueError, match=r"podcast.jsonl: row 1 has harm score [45], and safeweb is made from 1,2,3"):
        run(tmp_path / "out", place)
    manifest = run(tmp_path / "out", place, "--scores=5")
    assert manifest["totals"]["rows"] == sum(json.loads(line)["harm_score"] == 5 for line in open(place)) > 0
    assert manifest["totals"]["left_out"] == {"4": 12 - manifest["totals"]["rows"]}


def test_of_a_scored_folder_other_scores_are_left_out(tmp_path):
    for score in range(6):
        write_rows(tmp_path / "scored" / f"score={score}" / "train-0.jsonl", rows_of((score,), 3))
    write_rows(tmp_path / "scored" / "unscored" / "train-0.jsonl", [{"id": "u", "text": "x"}])
    manifest = run(tmp_path / "out", tmp_path / "scored")
    assert manifest["totals"]["rows"] == 9
    assert manifest["folders_left_out"] == {"score=0": 1, "score=4": 1, "score=5": 1, "unscored": 1}
    with pytest.raises(ValueError, match=r"score=5/train-0\.jsonl: has harm score 5"):
        run(tmp_path / "other", tmp_path / "scored" / "score=5")


# ---- bad input

GOOD = rows_of((1, 2, 3), 3)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"harm_score": None}, "row 3 has no harm score .looked for harm_score, .*.: score it first .safelm.score."),
        ({"harm_score": 7}, "row 3 field 'harm_score' is 7, not a harm score from 0 to 5"),
        ({"harm_score": -1}, "row 3 field 'harm_score' is -1"),
        ({"harm_score": "high"}, "row 3 field 'harm_score' is str"),
        ({"harm_score": True}, "row 3 field 'harm_score' is bool|is True"),
        ({"harm_score": float("nan")}, "row 3 field 'harm_score' is nan"),
        ({"harm_score": 5}, "row 3 has harm score 5, and safeweb is made from 1,2,3: --scores=1,2,3 leaves others out"),
        ({"harm_score": 0}, "row 3 has harm score 0"),
        ({"id": GOOD[0]["id"]}, "web.jsonl: row 1 and .*web.jsonl: row 3 have one id, 'doc-"),
        ({"prompt_version": "safeweb-v1-abc", "source_id": "x"}, "row 3 is text of safeweb already"),
    ],
)
def test_bad_input_ends_the_run_by_file_and_row_before_anything_is_written(tmp_path, row, message):
    rows = [*GOOD[:2], GOOD[2] | row]
    place = write_rows(tmp_path / "web.jsonl", rows)
    log = tmp_path / "log"
    with pytest.raises(ValueError, match=message) as error:
        run(tmp_path / "out", place, writer=f"{TROUBLED}?log={log}")
    assert GOOD[2]["text"][:30] not in str(error.value)
    assert not log.exists() and not (tmp_path / "out" / "manifest.json").exists()
    if "id" not in row:  # the same in Parquet, as far as it can be said there
        with pytest.raises((ValueError, pyarrow.ArrowInvalid)):
            run(tmp_path / "out2", write_rows(tmp_path / "web.parquet", [rows[2]]))


def test_malformed_rows_are_kept_aside_with_their_reasons(tmp_path):
    bad = ["{", json.dumps({"id": "a", "harm_score": 2}), json.dumps({"id": [1], "text": "x", "harm_score": 2})]
    bad += [json.dumps({"id": "b", "text": "  ", "harm_score": 2}), '{"id": "\\ud800", "text": "y", "harm_score": 3}']
    place = write_rows(tmp_path / "web.jsonl", [GOOD[0], *bad, GOOD[1]])
    manifest = run(tmp_path / "out", place)
    assert manifest["totals"]["malformed"] == len(bad) and manifest["totals"]["rows"] == 2
    (path,) = (tmp_path / "out" / "quarantine").iterdir()
    lines = [json.loads(line) for line in open(path)]
    assert [line["row"] for line in lines] == [2, 3, 4, 5, 6] and all(line["reason"] for line in lines)


def test_an_input_without_a_document_of_the_scores_is_refused(tmp_path):
    place = write_rows(tmp_path / "web.jsonl", rows_of((0,), 3))
    with pytest.raises(ValueError, match="no document with harm score 1, 2, 3 in the input"):
        run(tmp_path / "out", place, "--scores=1,2,3")


def test_scores_are_found_in_any_of_the_columns_or_in_the_one_that_is_named(tmp_path):
    nested = [{"id": row["id"], "text": row["text"], "metadata": {"harm_score": row["harm_score"]}} for row in GOOD]
    assert run(tmp_path / "a", write_rows(tmp_path / "a.jsonl", nested))["totals"]["rows"] == 3
    named = [{"key": row["id"], "body": row["text"], "mine": {"level": row["harm_score"]}} for row in GOOD]
    flags = ["--id_column=key", "--text_column=body", "--score_column=mine.level"]
    assert run(tmp_path / "b", write_rows(tmp_path / "b.jsonl", named), *flags)["totals"]["rows"] == 3
