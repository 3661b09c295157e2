"""Folders that our commands wrote: their manifests say which files are documents; nothing beside those is taken."""

import json

import fsspec
import pytest
import side_files
from document_files import write_rows
from synthesis_runs import SCORER, no_charts, rows_of, run

from safelm import documents, report_card, score
from safelm.synthetic_web.corpus import Recipe, write_corpus


def names(root, found):
    return sorted(str(path).removeprefix(f"{root}/") for path in found)


def write_output(folder, files=("a.jsonl", "score=3/b.jsonl"), **manifest):
    for name in (*files, "report/pairs.jsonl", "c.jsonl"):
        write_rows(folder / name, [{"text": name}])
    listed = {name: {"bytes": (folder / name).stat().st_size} for name in files}
    (folder / "manifest.json").write_text(json.dumps({"written_by": "safelm.x", "files": listed} | manifest))
    return folder


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("", ["in/out/a.jsonl", "in/out/score=3/b.jsonl", "in/other.jsonl"]),
        ("in/out", ["in/out/a.jsonl", "in/out/score=3/b.jsonl"]),
        ("in/**/*.jsonl", ["in/out/a.jsonl", "in/out/score=3/b.jsonl", "in/other.jsonl"]),
        ("in/out/*.jsonl", ["in/out/a.jsonl"]),
        ("in/out/*/*.jsonl", ["in/out/score=3/b.jsonl"]),
        ("in/out/score=3", ["in/out/score=3/b.jsonl"]),
        ("in/out/report", ["in/out/report/pairs.jsonl"]),  # what is named is taken
        ("in/out/report/*.jsonl", ["in/out/report/pairs.jsonl"]),
        ("in/out/c.jsonl", ["in/out/c.jsonl"]),
    ],
)
def test_only_what_a_manifest_lists_is_taken(tmp_path, pattern, expected):
    write_output(tmp_path / "in" / "out")
    write_rows(tmp_path / "in" / "other.jsonl", [{"text": "x"}])
    assert names(tmp_path, documents.list_files(str(tmp_path / pattern))) == sorted(expected)


def test_the_nearest_manifest_decides_and_others_manifests_say_nothing(tmp_path):
    outer = write_output(tmp_path / "outer", files=())
    write_output(outer / "inner", files=("a.jsonl",))
    write_output(tmp_path / "foreign", written_by=None)
    write_rows(tmp_path / "foreign" / "manifest.json", [{"files": {}}])
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "manifest.json").write_text('{"files"')
    write_rows(tmp_path / "damaged" / "a.jsonl", [{"text": "x"}])
    assert names(tmp_path, documents.list_files(str(tmp_path))) == [
        "damaged/a.jsonl",
        "foreign/a.jsonl",
        "foreign/c.jsonl",
        "foreign/report/pairs.jsonl",
        "foreign/score=3/b.jsonl",
        "outer/inner/a.jsonl",
    ]


def test_an_unfinished_folder_and_one_that_lacks_files_are_refused(tmp_path):
    folder = write_output(tmp_path / "out")
    (folder / "_settings.json").write_text('{"written_by": "safelm.x"}')
    assert len(documents.list_files(str(folder))) == 2
    (folder / "a.jsonl").write_text("{}\n")
    for inputs in (str(folder), f"{folder}/*.jsonl"):
        with pytest.raises(ValueError, match=r"out/a.jsonl: has 3 bytes, and .*/out/manifest.json lists it with"):
            documents.list_files(inputs)
    (folder / "a.jsonl").unlink()
    with pytest.raises(ValueError, match=r"out/a.jsonl: is missing, and .*/out/manifest.json lists it"):
        documents.list_files(str(tmp_path))
    assert len(documents.list_files(f"{folder}/score=*/*.jsonl")) == 1
    (folder / "manifest.json").unlink()
    for inputs in (str(tmp_path), f"{folder}/*.jsonl"):
        with pytest.raises(ValueError, match=r"/out: not finished, it has no manifest.json: run the command"):
            documents.list_files(inputs)
    with pytest.raises(ValueError, match="not finished"):
        documents.find_named(str(tmp_path), ["train-*"])


@pytest.mark.parametrize("end", [".jsonl", "-0123abcd.jsonl"])
def test_a_corpus_that_lacks_a_file_of_a_numbered_set_is_named(tmp_path, end, caplog):
    paths = [tmp_path / "web" / f"train-{number:05d}-of-00003{end}" for number in range(3)]
    paths += [tmp_path / "web" / "train-000007-00001-of-00009.jsonl", tmp_path / "web" / "train-mine.jsonl"]
    for path in paths:
        write_rows(path, [{"text": "x"}])
    assert len(documents.find_named(str(tmp_path), ["train-*"])) == 5
    assert not caplog.records
    paths[1].unlink()
    assert len(documents.find_named(str(tmp_path), ["train-*"])) == 4
    assert "web/train-00001-of-00003.jsonl: is missing; there are 2 of 3, which are read alone" in caplog.text
    assert documents.find_named(str(tmp_path), ["validation-*"]) == []


@pytest.mark.parametrize("files", ['{"a.jsonl": 7}', '{"a.jsonl": {}}', '{"b.jsonl": null}'])
def test_a_manifest_of_ours_that_is_damaged_names_the_file(tmp_path, files):
    write_rows(tmp_path / "a.jsonl", [{"text": "x"}])
    (tmp_path / "manifest.json").write_text(f'{{"written_by": "safelm.x", "files": {files}}}')
    with pytest.raises(ValueError, match=r"[ab].jsonl: (has 14 bytes|is missing), and .*/manifest.json lists it"):
        documents.list_files(str(tmp_path))
    (tmp_path / "manifest.json").write_text("[" * 100_000)
    assert names(tmp_path, documents.list_files(str(tmp_path))) == ["a.jsonl"]


def test_a_folder_is_declared_to_hold_no_documents_once(tmp_path):
    for folder in (f"{tmp_path}/run", "memory://declared/run"):
        files, inner = fsspec.core.url_to_fs(folder)
        for command in ("safelm.one", "safelm.other"):
            documents.declare_no_documents(folder, command)
        files.pipe(f"{inner}/metrics.jsonl", b"{}\n")
        assert json.loads(files.cat(f"{inner}/manifest.json"))["written_by"] == "safelm.one"
        with pytest.raises(FileNotFoundError, match="no file there holds documents"):
            documents.list_files(folder)


def test_no_side_file_of_scores_synthetic_documents_and_report_cards_is_taken(tmp_path, monkeypatch):
    no_charts(monkeypatch)
    web = [{"id": row["id"], "text": row["text"]} for row in rows_of((2, 4, 5), 24)]
    write_rows(tmp_path / "web.jsonl", [*web, {"id": 1}])
    flags = [f"--input={tmp_path}/web.jsonl", f"--output={tmp_path}/scored", f"--scorers={SCORER}", "--workers=1"]
    score.main(score.arguments().parse_args(flags))
    moral, card = tmp_path / "moral_education", tmp_path / "card"
    run(tmp_path / "refuseweb", tmp_path / "scored", "--scores=4,5", "--review=5", kind="refuseweb")
    manifest = run(moral, tmp_path / "refuseweb", "--review=3", kind="moral_education")
    flags = [f"--input={tmp_path}/scored", f"--slice=M={moral}", f"--output={card}", "--workers=1"]
    report_card.main(report_card._parser().parse_args(flags))

    assert (tmp_path / "refuseweb/report/review_pairs.jsonl").exists()
    assert manifest["totals"]["rows"] == sum(1 for _ in open_rows(tmp_path / "refuseweb")) > 0
    slices = {one["name"]: one["documents"] for one in json.loads((card / "card.json").read_text())["slices"]}
    assert slices["M"] == manifest["totals"]["published"]
    taken = names(tmp_path, documents.list_files(str(tmp_path)))
    listed = [
        f"{folder}/{name}"
        for folder in ("scored", "refuseweb", "moral_education")
        for name in json.loads((tmp_path / folder / "manifest.json").read_text())["files"]
    ]
    assert taken == sorted([*listed, "web.jsonl"])
    assert names(tmp_path, documents.find_named(str(tmp_path), ["train-*", "web*"])) == taken
    corpora = [tmp_path / name for name in ("web.jsonl", "scored", "refuseweb", "moral_education")]
    side_files.assert_only_documents("score synthesize report_card", tmp_path, *corpora)


def open_rows(folder):
    for path in documents.list_files(str(folder)):
        yield from documents.read_rows(path)


def test_prompts_of_the_synthetic_web_are_no_documents(tmp_path):
    facts = write_corpus(str(tmp_path), Recipe(documents=20, validation_documents=4, prompts=3, chats=6))["files"]
    taken = names(tmp_path, documents.list_files(str(tmp_path)))
    assert taken == sorted(name for name in facts if not name.split("/")[0].endswith("prompts"))
    corpora = {tmp_path / name.split("/")[0] for name in taken}
    side_files.assert_only_documents("synthetic_web", tmp_path, *corpora)
