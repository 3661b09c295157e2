"""safelm.select: bad input in one line, and runs that were stopped."""

import json

import pytest
from document_files import write_rows
from selection_runs import corpus, files, ids, run

from safelm import cli, select
from safelm.jobs.output import OutputFolder
from safelm.selection import measuring, writing


@pytest.fixture
def pages(tmp_path):
    return write_rows(tmp_path / "in/pages.jsonl", corpus(100))


BAD = {
    "token_budget=9M": "--token_budget=9,000,000: only 1,785 tokens are there",
    "token_budget=many": "--token_budget=many: want a whole number of tokens",
    "token_budget=1000 mix=language:en=0.2,fr=0.8": "needs 800 tokens of language=fr: only",
    "strata=score,planet": "pages.jsonl: missing column 'planet'; it has",
    "max_score=6": "--max_score=6: a harm score lies from 0 to 5",
    "min_score=-1": "--min_score=-1: a harm score lies from 0 to 5",
    "class_threshold=7=0.5": "--class_threshold=7: a harm score lies from 0 to 5",
    "class_threshold=3=1.5": "--class_threshold=3=1.5: a probability lies from 0 to 1",
    "class_threshold=3=0.5": "pages.jsonl: missing column 'safety_probs'",
    "decontaminate=advbench:nowhere.csv": "--decontaminate=advbench:nowhere.csv: nowhere.csv: no such file",
    "decontaminate=planet:x.csv": "--decontaminate=planet:x.csv: want NAME:PATH with a name of advbench",
    "decontaminate=capability:.": "--decontaminate=capability:.: . holds no file of a capability task",
    "mix=language:en=0.5": "the shares add up to 0.5, not 1",
    "mix=planet:a=1": "--mix=planet:...: want a column of --strata=score,language",
    "score_column=nothing": "no harm score found in 100 rows of 1 files (looked for nothing)",
    "near_duplicates=7": "--near_duplicates=7.0: a similarity lies above 0 and up to 1",
    "tokenizer=x": "--tokenizer=x or --token_column: want one of them",
    "token_column=language": "field 'language' is no number of tokens",
    "detect_language strata=score": "--detect_language: its place is the stratum language",
    "source=x": "--source=x: want NAME=FILES",
    "matched_safe=nan": "--matched_safe=nan: want more than 0 tokens",
    "matched_safe=inf": "--matched_safe=inf: want more than 0 tokens",
    "near_duplicates=nan": "--near_duplicates=nan: a similarity lies",
    "class_threshold=3=nan": "--class_threshold=3=nan: a probability lies from 0 to 1",
    "only_matched": "--matched_safe=0: want more than 0 tokens",
}


@pytest.mark.parametrize("flags", BAD)
def test_bad_input_ends_in_one_line_and_code_2(tmp_path, pages, capsys, flags, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = dict(pair.partition("=")[::2] for pair in flags.split())
    argv = [f"--{name}={value}" if value else f"--{name}" for name, value in given.items()]
    argv += [] if "token_column" in given else ["--token_column=tokens"]
    argv += [] if "strata" in given else ["--strata=score,language"]
    with pytest.raises(SystemExit) as ended:
        cli.run(select.main, select.arguments(), [f"--input={pages}", f"--output={tmp_path / 'out'}", *argv])
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert ended.value.code == 2 and BAD[flags] in line
    assert not (tmp_path / "out/manifest.json").exists()


def test_an_unscored_corpus_is_refused_or_selected_without_scores(tmp_path):
    rows = [{name: value for name, value in row.items() if name != "harm_score"} for row in corpus(50)]
    path = write_rows(tmp_path / "in.jsonl", rows)
    with pytest.raises(ValueError, match="no harm score found in 50 rows of 1 files"):
        run(tmp_path / "out", path, token_budget=100)
    manifest = run(tmp_path / "unscored", path, token_budget=100, strata="language")
    assert 70 < manifest["selected"]["tokens"] <= 100


def test_an_input_without_a_usable_row_is_an_error(tmp_path):
    bad = [row | {"tokens": "many"} for row in corpus(3)]
    path = write_rows(tmp_path / "in.jsonl", bad)
    with pytest.raises(ValueError, match=r"in.jsonl: 3 of 3 rows are malformed, none is left"):
        run(tmp_path / "out", path)
    assert run(tmp_path / "both", path, write_rows(tmp_path / "fine.jsonl", corpus(3)))["selected"]["documents"] == 3


def test_a_budget_that_is_too_large_can_be_lowered_without_measuring_again(tmp_path, pages, monkeypatch):
    with pytest.raises(ValueError, match="only 1,785 tokens"):
        run(tmp_path / "out", pages, token_budget="2000")
    monkeypatch.setattr(measuring, "measure_shard", None)
    assert run(tmp_path / "out", pages, token_budget="1000")["token_budget"] == 1000
    with pytest.raises(ValueError, match="was begun with --token_budget 1000, now it is 900"):
        run(tmp_path / "out", pages, token_budget="900")
    with pytest.raises(ValueError, match="was begun with --strata"):
        run(tmp_path / "out", pages, token_budget="1000", strata="language")


def test_a_finished_selection_is_left_as_it_is(tmp_path, pages, monkeypatch):
    first = run(tmp_path / "out", pages, token_budget=500)
    monkeypatch.setattr(measuring, "measure_shard", None)
    assert run(tmp_path / "out", pages, token_budget=500) == first


@pytest.mark.parametrize("stops", [("measure", 1), ("measure", 3), ("write", 0), ("write", 2)])
def test_a_stopped_run_goes_on_and_ends_with_the_same_files(tmp_path, monkeypatch, stops):
    for at in range(4):
        write_rows(tmp_path / f"in/{at}.jsonl", corpus(80, first=80 * at))
    flags = {"token_budget": 2000, "exact_duplicates": True}
    whole = run(tmp_path / "whole", tmp_path / "in", **flags)
    what, after = stops
    module, name = (measuring, "measure_shard") if what == "measure" else (writing, "write_shard")
    original, calls = getattr(module, name), []

    def stopping(*arguments):
        if len(calls) == after:
            raise KeyboardInterrupt
        calls.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(module, name, stopping)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", tmp_path / "in", **flags)
    assert not (tmp_path / "out/manifest.json").exists()
    for path in (tmp_path / "out").glob("_*/"):
        (path / ".writing-abc.json").write_text('{"files"')
    done = []
    monkeypatch.setattr(module, name, lambda *arguments: done.append(1) or original(*arguments))
    again = run(tmp_path / "out", tmp_path / "in", **flags)
    assert len(done) == 4 - after
    assert files(tmp_path / "out") == files(tmp_path / "whole") and again["funnel"] == whole["funnel"]


def test_a_file_that_changed_between_the_passes_is_named(tmp_path, pages, monkeypatch):
    original = writing.write_shard

    def changed(*arguments):
        pages.write_text("".join(pages.read_text().splitlines(keepends=True)[:10]))
        return original(*arguments)

    monkeypatch.setattr(writing, "write_shard", changed)
    with pytest.raises(ValueError, match=r"pages\.jsonl: \d+ of 100 chosen rows are there: it has changed"):
        run(tmp_path / "out", pages)


def test_malformed_rows_are_counted_and_keep_their_numbers(tmp_path):
    rows = corpus(40)
    lines = [*rows[:5], "{broken", "", *rows[5:20], json.dumps(rows[20] | {"tokens": -1}), *rows[21:]]
    manifest = run(tmp_path / "out", write_rows(tmp_path / "in.jsonl", lines))
    assert manifest["funnel"][1] == {"step": "malformed", "documents": 2, "tokens": 0}
    assert ids(tmp_path / "out") == [row["id"] for row in rows if row["id"] != "d20"]


def test_the_output_holds_only_what_is_meant_to_stay(tmp_path, pages):
    run(tmp_path / "out", pages)
    visible = {path.name for path in (tmp_path / "out").iterdir() if not path.name.startswith(("_", "."))}
    assert visible == {"train-000000-pages.jsonl.gz", "data_card.json", "data_card.md", "manifest.json"}
    assert not OutputFolder(str(tmp_path / "out")).sizes(measuring.FOLDER)


def test_an_existing_column_is_not_overwritten_by_marks(tmp_path):
    path = write_rows(tmp_path / "in.parquet", corpus(20, matched=lambda at: "mine"))
    with pytest.raises(ValueError, match="already has a column 'matched': choose another --mark_column"):
        run(tmp_path / "out", path, matched_safe=1)
    run(tmp_path / "other", path, matched_safe=1, mark_column="annotated")
