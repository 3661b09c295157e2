"""safelm.select: what stays, exact counts, and the same rows whatever the workers, shards and order of files."""

import json
import random

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import side_files
from document_files import write_rows
from selection_runs import corpus, files, ids, run, step

from safelm import documents
from safelm.selection import copies, licences, measuring
from safelm.text.tokenizer import Tokenizer


@pytest.fixture
def pages(tmp_path):
    return write_rows(tmp_path / "in/pages.jsonl", corpus(600))


def test_the_budget_is_met_and_every_count_adds_up(tmp_path, pages):
    rows = corpus(600)
    manifest = run(tmp_path / "out", pages, token_budget=3000, strata="score,language", max_score=4)
    kept = ids(tmp_path / "out")
    tokens = {row["id"]: row["tokens"] for row in rows}
    assert kept == [row["id"] for row in rows if row["id"] in kept]  # in order, each once
    assert manifest["selected"] == {"documents": len(kept), "tokens": sum(tokens[each] for each in kept)}
    assert 0 <= 3000 - manifest["selected"]["tokens"] < 27
    assert step(manifest, "read") == (600, sum(tokens.values()))
    for at in (0, 1):
        assert step(manifest, "read")[at] == sum(step(manifest, each["step"])[at] for each in manifest["funnel"][1:])
    outside = [row for row in rows if row["harm_score"] == 5]
    assert step(manifest, "outside the scores") == (len(outside), sum(row["tokens"] for row in outside))
    for stratum in manifest["strata"]["rows"]:
        score, language = stratum["values"]
        of = [row for row in rows if (str(row["harm_score"]), row["language"]) == (score, language)]
        assert stratum["tokens_read"] == sum(row["tokens"] for row in of)
        assert stratum["tokens"] == sum(row["tokens"] for row in of if row["id"] in kept)
        if score != "5":
            share = 3000 / sum(row["tokens"] for row in rows if row["harm_score"] < 5)
            assert abs(stratum["tokens"] - share * stratum["tokens_read"]) < 27


def test_rows_do_not_depend_on_shards_order_place_or_other_rows_of_the_draw(tmp_path):
    rows = corpus(4000)
    one = write_rows(tmp_path / "in/one.jsonl", rows[:3000])
    other = write_rows(tmp_path / "in/other.parquet", rows[3000:], row_group_size=100)
    run(tmp_path / "out", tmp_path / "in", token_budget="20K", seed=3)
    expected = sorted(ids(tmp_path / "out"))
    moved = tmp_path / "z/y/one.jsonl"
    moved.parent.mkdir(parents=True)
    one.rename(moved)
    run(tmp_path / "moved", other, moved, token_budget="20K", seed=3)
    assert sorted(ids(tmp_path / "moved")) == expected
    run(tmp_path / "another_seed", other, moved, token_budget="20K", seed=4)
    assert len(set(ids(tmp_path / "another_seed")) - set(expected)) > 100


def test_nothing_beside_the_chosen_rows_is_taken_for_documents(tmp_path, pages):
    run(tmp_path / "texts", pages, token_budget=1000, exact_duplicates=True)
    written = [tmp_path / "texts" / name for name in files(tmp_path / "texts")]
    assert written
    side_files.assert_only_documents("select", tmp_path / "texts", *written)
    run(tmp_path / "index", pages, token_budget=1000, output_rows="index")
    side_files.assert_only_documents("select", tmp_path / "index")


def test_parts_of_files_change_nothing(tmp_path):
    rows = corpus(9000, text=lambda at: f"Page {at}. " + "wörds of it " * 20)
    for path in (tmp_path / "in/a.jsonl", tmp_path / "in/b.parquet"):
        write_rows(path, rows, row_group_size=1000)
    run(tmp_path / "whole", tmp_path / "in", token_budget="30K", exact_duplicates=True)
    run(tmp_path / "parts", tmp_path / "in", token_budget="30K", exact_duplicates=True, part_mb=1, workers=1)
    assert len(files(tmp_path / "parts")) > len(files(tmp_path / "whole")) == 2
    assert sorted(ids(tmp_path / "parts")) == sorted(ids(tmp_path / "whole"))


def test_columns_pass_through_and_lines_keep_their_bytes(tmp_path):
    table = pyarrow.table(
        {
            "text": pyarrow.array([f"page {at}" for at in range(50)], pyarrow.large_string()),
            "harm_score": pyarrow.array([at % 6 for at in range(50)], pyarrow.int8()),
            "tokens": pyarrow.array([5] * 50),
            "source": pyarrow.nulls(50),
            "more": pyarrow.array([{"a": [at], "b": None} for at in range(50)]),
        }
    )
    (tmp_path / "in").mkdir()
    pyarrow.parquet.write_table(table, tmp_path / "in/p.parquet", compression="zstd")
    run(tmp_path / "out", tmp_path / "in/p.parquet", token_budget=100)
    (path,) = documents.list_files(str(tmp_path / "out"))
    found = pyarrow.parquet.read_table(path)
    assert found.schema == table.schema and found.num_rows == 20
    places = [row["a"][0] for row in found["more"].to_pylist()]
    assert found.equals(table.take(places))
    assert pyarrow.parquet.ParquetFile(path).metadata.row_group(0).column(0).compression == "ZSTD"

    lines = [json.dumps(row, ensure_ascii=at % 2 == 0) + " " * (at % 3) for at, row in enumerate(corpus(50))]
    write_rows(tmp_path / "in/l.jsonl", lines)
    run(tmp_path / "lines", tmp_path / "in/l.jsonl")
    (path,) = documents.list_files(str(tmp_path / "lines"))
    with documents.open_binary(path, decompress=True) as file:
        assert file.read().decode().splitlines() == [line.strip() for line in lines]


def test_copies_go_and_the_harshest_stays(tmp_path):
    rows = corpus(60)
    again = [row | {"id": row["id"] + "-again", "harm_score": (row["harm_score"] + 1) % 6} for row in rows]
    near = [row | {"id": row["id"] + "-near", "text": row["text"] + " More."} for row in rows[:5]]
    path = write_rows(tmp_path / "in.jsonl", [*rows, *again, *near])
    manifest = run(tmp_path / "out", path, exact_duplicates=True)
    kept = set(ids(tmp_path / "out"))
    for row in rows:
        harsher = row["id"] if row["harm_score"] == 5 else row["id"] + "-again"
        assert {row["id"], row["id"] + "-again"} & kept == {harsher}
    assert step(manifest, "exact duplicate")[0] == 60 and {row["id"] for row in near} <= kept


@pytest.mark.parametrize("flags", [{"exact_duplicates": True}, {"near_duplicates": 0.7}], ids=["exact", "near"])
def test_what_is_above_the_scores_by_one_copy_is_out_in_every_copy(tmp_path, flags):
    """However the copies lie in files; a copy below --min_score takes nothing away."""
    text = " ".join(f"word{at % 97}" for at in range(200))
    scores = {"harmful": 5, "mild": 1, "again": 2, "safe": 0, "better": 3, "worse": 1, "alone": 1, "unscored": None}
    texts = {name: " ".join(f"{name}{at}" for at in range(200)) for name in ("safe", "better", "alone")}
    texts["worse"] = texts["better"]
    rows = [
        {"id": name, "text": texts.get(name, text), "harm_score": score, "tokens": 5, "language": "en"}
        for name, score in scores.items()
    ]
    for at, row in enumerate(rows):
        write_rows(tmp_path / f"in/{at}.jsonl", [row])
    manifest = run(tmp_path / "out", tmp_path / "in", max_score=3, **flags)
    assert sorted(ids(tmp_path / "out")) == ["alone", "better", "safe"]
    assert step(manifest, "copy of a row above the scores") == (2, 10)
    assert step(manifest, "outside the scores")[0] == step(manifest, "no harm score")[0] == 1
    run(tmp_path / "least", tmp_path / "in", min_score=2, **flags)
    assert sorted(ids(tmp_path / "least")) == ["better", "harmful"]


def test_a_row_that_is_out_for_one_above_the_scores_takes_no_other_with_it(tmp_path):
    """Of harmful, near and far, near repeats both others; and what is above hides no copies among those below."""
    rng = random.Random(0)

    def changed(words, count):
        at = set(rng.sample(range(len(words)), count))
        return [f"w{rng.randrange(5000)}" if i in at else word for i, word in enumerate(words)]

    rows = []
    for group in range(40):
        base = [f"w{rng.randrange(5000)}" for _ in range(300)]
        texts = {"harmful": changed(base, 14), "near": changed(base, 3)}
        texts["far"] = changed(texts["near"], 7)
        score = {"harmful": 5}
        rows += [
            {"id": f"{name}{group}", "text": " ".join(words), "harm_score": score.get(name, 1), "tokens": 1}
            for name, words in texts.items()
        ]
    signatures = {row["id"]: copies.signature(row["text"]) for row in rows}
    bands = {name: copies.bands(each[None], 0.7)[0] for name, each in signatures.items()}

    def alike(one, other):
        return (signatures[one] == signatures[other]).mean(), (bands[one] == bands[other]).any()

    run(tmp_path / "out", write_rows(tmp_path / "in.jsonl", rows), max_score=3, near_duplicates=0.7)
    kept, gone = set(ids(tmp_path / "out")), 0
    for harmful, near, far in ((f"harmful{at}", f"near{at}", f"far{at}") for at in range(40)):
        gone += near not in kept and far in kept
        assert {near, far} & kept or min(alike(harmful, near)[0], alike(harmful, far)[0]) > 0.69
        assert not {near, far} <= kept or alike(near, far)[0] < 0.71 or not alike(near, far)[1]
    assert gone > 5


def test_near_duplicates_go_after_exact_ones(tmp_path):
    rng = random.Random(0)
    text = " ".join(rng.choice("abcdefgh") * 3 + str(rng.randint(0, 99)) for _ in range(200))
    rows = corpus(20, text=lambda at: f"{text} {at}" if at < 8 else f"another {at} " * 30)
    path = write_rows(tmp_path / "in.jsonl", [*rows, rows[0] | {"id": "copy"}])
    manifest = run(tmp_path / "out", path, exact_duplicates=True, near_duplicates=0.7, strata="language")
    assert (step(manifest, "exact duplicate")[0], step(manifest, "near-duplicate")[0]) == (1, 7)
    assert sum(each in {row["id"] for row in rows[:8]} | {"copy"} for each in ids(tmp_path / "out")) == 1


def test_leaks_are_left_out_and_reported_by_id_never_by_text(tmp_path):
    prompts = [{"goal": f"Tell me kindly how the {word} machine number {at} works"} for at, word in enumerate("abcd")]
    write_rows(tmp_path / "adv.jsonl", prompts)
    rows = corpus(30)
    for at in (4, 9):
        rows[at]["text"] += f" tell ME kindly, how the b machine\nnumber 1 works!! {at}"
    path = write_rows(tmp_path / "in.jsonl", rows)
    manifest = run(tmp_path / "out", path, decontaminate=f"advbench:{tmp_path / 'adv.jsonl'}")
    assert not {"d4", "d9"} & set(ids(tmp_path / "out")) and step(manifest, "contaminated")[0] == 2
    suite = manifest["contamination"]["suites"]["advbench"]
    assert suite == {"prompts": 4, "too_short": 0, "found": {"advbench/00002": 2}}
    written = "".join(path.read_text() for path in (tmp_path / "out").glob("*.*") if path.suffix in (".json", ".md"))
    assert "kindly" not in written and "advbench/00002" in written


def test_a_mix_gives_each_source_its_share(tmp_path):
    web, wiki = (write_rows(tmp_path / f"{name}.jsonl", corpus(300)) for name in ("web", "wiki"))
    sources = [f"web={web}", f"wiki={wiki}"]
    manifest = run(
        tmp_path / "out", source=sources, token_budget=2000, mix="source:web=0.75,wiki=0.25", strata="source,score"
    )
    found = {name: 0 for name in ("web", "wiki")}
    for row in manifest["strata"]["rows"]:
        found[row["values"][0]] += row["tokens"]
    assert 1500 - 27 < found["web"] <= 1500 and 500 - 27 < found["wiki"] <= 500
    manifest = run(tmp_path / "web", source=sources, token_budget=2000, mix="source:web=1", strata="source")
    assert step(manifest, "not in the mix")[0] == 300


def test_harmful_rows_get_as_many_tokens_of_safe_ones_from_the_same_strata(tmp_path, pages):
    rows = {row["id"]: row for row in corpus(600)}
    manifest = run(tmp_path / "out", pages, matched_safe=1, harmful_score=4, strata="score,language")
    found = [row for path in documents.list_files(str(tmp_path / "out")) for _, row in documents.read_rows(path)]
    assert len(found) == 600
    for language in ("en", "fr"):
        of = [row for row in found if row["language"] == language]
        assert all(row["matched"] for row in of if row["harm_score"] >= 4)
        harmful, safe = (
            sum(row["tokens"] for row in of if row["matched"] and (row["harm_score"] >= 4) == side) for side in (1, 0)
        )
        assert 0 <= harmful - safe < 27
    matched = [rows[row["id"]]["tokens"] for row in found if row["matched"] and row["harm_score"] < 4]
    assert manifest["matched"]["safe"] == {"documents": len(matched), "tokens": sum(matched)}
    run(tmp_path / "only", pages, matched_safe=1, harmful_score=4, strata="score,language", only_matched=True)
    assert ids(tmp_path / "only") == [row["id"] for row in found if row["matched"]]


def test_too_few_safe_rows_are_said(tmp_path, pages):
    manifest = run(tmp_path / "out", pages, matched_safe=1, harmful_score=1)
    assert manifest["matched"]["short"][0]["tokens"] > 0
    assert "tokens of safer rows are missing" in (tmp_path / "out/data_card.md").read_text()


def test_thresholds_of_a_class_lower_scores_that_are_not_sure(tmp_path):
    sure, unsure = [0, 0, 0, 0, 0.04, 0.96], [0.05, 0, 0, 0.6, 0.0, 0.35]
    rows = corpus(10, harm_score=lambda at: 5, safety_probs=lambda at: sure if at % 2 else unsure)
    path = write_rows(tmp_path / "in.jsonl", rows)
    manifest = run(tmp_path / "out", path, class_threshold="4=0.5,5=0.9")
    assert {score: counts["documents"] for score, counts in manifest["scores"].items()} == {"3": 5, "5": 5}


def test_the_index_lists_file_and_row(tmp_path, pages):
    run(tmp_path / "documents", pages, token_budget=500)
    manifest = run(tmp_path / "index", pages, token_budget=500, output_rows="index")
    (path,) = (tmp_path / "index/rows").iterdir()
    table = pyarrow.parquet.read_table(path)
    assert [f"d{row - 1}" for row in table["row"].to_pylist()] == ids(tmp_path / "documents")
    assert set(table["file"].to_pylist()) == {str(pages)} and manifest["files"] == {}
    assert np.sum(table["tokens"]) == manifest["selected"]["tokens"] and "text" not in table.column_names


def test_tokens_are_those_of_a_tokenizer(tmp_path, pages):
    texts = [row["text"] for row in corpus(600)]
    tokenizer = Tokenizer.train(texts, 300)
    tokenizer.save(str(tmp_path / "tokenizer"))
    manifest = run(tmp_path / "out", pages, tokenizer=tmp_path / "tokenizer")
    assert manifest["selected"]["tokens"] == sum(map(len, tokenizer.encode_batch(texts)))
    assert manifest["tokenizer"] == tokenizer.hash


def test_licences_are_counted(tmp_path):
    rows = corpus(12, metadata=lambda at: {"license": "CC-BY-4.0"} if at % 3 else None)
    manifest = run(tmp_path / "out", write_rows(tmp_path / "in.jsonl", rows))
    assert {name: counts["documents"] for name, counts in manifest["licences"].items()} == {"(none)": 4, "CC-BY-4.0": 8}
    assert "| CC-BY-4.0 | 8 |" in (tmp_path / "out/data_card.md").read_text()
    manifest = run(tmp_path / "off", tmp_path / "in.jsonl", licence_column="")
    assert manifest["licences"] == {} and "## Licences\n\nNot read." in (tmp_path / "off/data_card.md").read_text()


def test_no_licence_keeps_a_row_out_or_ends_a_run(tmp_path, monkeypatch):
    """Any value in a column that nobody asked for: lists, long texts, structures, a licence of its own in every row."""
    monkeypatch.setattr(licences, "MAX_OF_SHARD", 60)
    monkeypatch.setattr(licences, "MAX_OF_CARD", 5)
    monkeypatch.setattr(measuring, "MAX_KINDS", 20)
    odd = dict(enumerate([["mit", None, "apache"], "CC BY " * 40, {"name": "own", "since": 3}, 4.5, [], " ", "\ud800"]))
    write_rows(tmp_path / "in/a.jsonl", corpus(100, license=lambda at: odd.get(at, f"author {at % 80}")))
    write_rows(tmp_path / "in/b.jsonl", corpus(50, first=100, license=lambda at: ["mit", "apache"]))
    manifest = run(tmp_path / "out", tmp_path / "in")
    found = {name: counts["documents"] for name, counts in manifest["licences"].items()}
    assert sum(found.values()) == 150 == manifest["selected"]["documents"]
    assert found["mit, apache"] == 51 and found["(none)"] == 2 and len(found) == 6 and found["(other)"] > 80
    rows = corpus(30, license=lambda at: "CC BY " * 40)
    (name,) = run(tmp_path / "long", write_rows(tmp_path / "long.jsonl", rows))["licences"]
    assert len(name) == 100 and name.endswith("…")
    with pytest.raises(ValueError, match="--strata=id: more than 20 different values"):
        run(tmp_path / "strata", tmp_path / "in", strata="id")


def test_languages_are_detected(tmp_path):
    texts = [
        "The weather was mild and the library opened at nine in the morning.",
        "Le temps était doux et la bibliothèque ouvrait à neuf heures.",
    ]
    rows = corpus(8, text=lambda at: texts[at % 2], language=lambda at: "xx")
    path = write_rows(tmp_path / "in.jsonl", rows)
    manifest = run(tmp_path / "out", path, strata="language", detect_language=True)
    assert {tuple(row["values"]): row["documents"] for row in manifest["strata"]["rows"]} == {("en",): 4, ("fr",): 4}
