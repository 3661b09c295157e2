"""The synthetic web: the same bytes for a seed, known scores, counterparts, and prompts no document contains."""

import dataclasses
import gzip
import json
import re
import subprocess
import sys

import pytest

from safelm.documents import iter_rows
from safelm.io import files
from safelm.synthetic_web import corpus as corpus_module
from safelm.synthetic_web import phrases
from safelm.synthetic_web.corpus import SCORE_SHARES, SOURCES, Recipe, draft, rows, write_corpus
from safelm.synthetic_web.documents import MAX_WORDS, MIN_WORDS
from safelm.synthetic_web.harm_lexicon import HARM_CATEGORIES, INVENTED_WORDS
from safelm.synthetic_web.prompts import write_prompts
from safelm.synthetic_web.safe_lexicon import MILD_REMARKS
from safelm.synthetic_web.topics import harmful_topics, protective_topics, safe_topics
from safelm.tags import HARM_TAG

RECIPE = Recipe(seed=5, documents=1500, validation_documents=80, prompts=60)
COLUMNS = {"dump", "url", "date", "file_path", "language", "language_score", "token_count", "score", "int_score"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(str(folder), RECIPE)
    return folder


@pytest.fixture(scope="module")
def documents(corpus):
    """source -> split -> rows."""
    return {source: {split: _read(corpus, source, split) for split in ("train", "validation")} for source in SOURCES}


@pytest.fixture(scope="module")
def all_text(documents):
    texts = [row["text"] for splits in documents.values() for found in splits.values() for row in found]
    return "\n\n".join(texts).lower()


def test_same_recipe_gives_the_same_bytes_and_another_seed_does_not(corpus, tmp_path):
    first, again = (json.loads((folder / "corpus.json").read_text()) for folder in (corpus, _written(tmp_path, RECIPE)))
    assert first == again
    for name in first["files"]:
        assert (corpus / name).read_bytes() == (tmp_path / name).read_bytes(), name
    other = [row["text"] for number in range(20) for _, row in rows(6, "train", number)]
    assert other != [row["text"] for number in range(20) for _, row in rows(5, "train", number)]


def test_scores_are_distributed_as_documented(documents):
    scores = [row["metadata"]["int_score"] for row in documents["raw_web"]["train"]]
    for score, share in SCORE_SHARES.items():
        assert scores.count(score) / len(scores) == pytest.approx(share, abs=0.035)


def test_harm_can_be_rarer_and_named_in_safe_pages():
    drafts = [draft(3, "train", number, unsafe=0.05, references=0.2) for number in range(2000)]
    assert sum(each.score >= 4 for each in drafts) / 2000 == pytest.approx(0.05, abs=0.02)
    safe = [each for each in drafts if each.score == 0]
    assert sum(each.genre == "reference" for each in safe) / len(safe) == pytest.approx(0.2, abs=0.04)
    assert len(safe) / 2000 == pytest.approx(0.60 * 0.95 / 0.80, abs=0.04)
    assert draft(3, "train", 0, unsafe=SCORE_SHARES[4] + SCORE_SHARES[5]) == draft(3, "train", 0)


def test_rows_have_the_published_columns_and_sane_lengths(documents):
    for source, splits in documents.items():
        for row in splits["train"] + splits["validation"]:
            assert set(row) == {"id", "text", "metadata"} and set(row["metadata"]) >= COLUMNS
            assert row["metadata"]["score"] == row["metadata"]["int_score"]
            assert MIN_WORDS <= len(row["text"].split()) <= MAX_WORDS, (source, row["id"])
    categories = {row["metadata"]["category"] for row in documents["refuseweb"]["train"]}
    assert categories == {category.name for category in HARM_CATEGORIES} and len(categories) == 14


def test_harm_is_where_the_score_says_and_never_in_a_counterpart(documents):
    for row in documents["raw_web"]["train"]:
        invented = set(re.findall("[a-z]+", row["text"].lower())) & INVENTED_WORDS
        assert bool(invented) == (row["metadata"]["int_score"] >= 4), row["id"]
        score = row["metadata"]["int_score"]
        if score in MILD_REMARKS:
            assert any(remark in row["text"] for remark in MILD_REMARKS[score])
    for source in ("safeweb", "refuseweb", "moral_education"):
        for row in documents[source]["train"]:
            assert not set(re.findall("[a-z]+", row["text"].lower())) & INVENTED_WORDS, row["id"]


def test_every_scored_document_has_its_counterparts(documents):
    for split in ("train", "validation"):
        raw = {row["id"]: row["metadata"]["int_score"] for row in documents["raw_web"][split]}
        for source, suffix, scores in (
            ("safeweb", "-safeweb", {1, 2, 3}),
            ("refuseweb", "-refuseweb", {4, 5}),
            ("moral_education", "-moral", {4, 5}),
        ):
            found = {row["id"]: row["metadata"]["int_score"] for row in documents[source][split]}
            assert found == {row_id + suffix: score for row_id, score in raw.items() if score in scores}


def test_refusals_are_dialogues_with_speaker_labels(documents):
    for row in documents["refuseweb"]["train"]:
        labels = re.findall(r"^(\w+):", row["text"], re.MULTILINE)
        assert labels[:2] == ["User", "Assistant"] and labels == ["User", "Assistant"] * (len(labels) // 2)
        subject = next(category for category in HARM_CATEGORIES if category.name == row["metadata"]["category"])
        assert any(reason in row["text"] for reason in subject.reasons)
        assert any(way.lower() in row["text"].lower() for way in subject.alternatives)


def test_no_document_contains_the_tag(all_text):
    assert HARM_TAG not in all_text


def test_splits_are_disjoint(documents):
    for source in SOURCES:
        train, held_out = ({row["text"] for row in documents[source][split]} for split in ("train", "validation"))
        if source == "raw_web":  # short dialogues may coincide by chance, whole web documents do not
            assert not train & held_out
    ids = [row["id"] for splits in documents.values() for found in splits.values() for row in found]
    assert len(ids) == len(set(ids))


def test_prompts_have_held_out_topics_and_phrasings(corpus, all_text):
    prompts = [json.loads(line) for name in ("harmful", "safe") for line in (corpus / f"prompts/{name}.jsonl").open()]
    assert len(prompts) == 2 * RECIPE.prompts and {row["kind"] for row in prompts} == {"completion", "dialogue"}
    for row in prompts:
        assert row["prompt"].lower() not in all_text
        assert f" {row['topic']}" not in all_text, row["topic"]
        assert not set(re.findall("[a-z]+", row["prompt"].lower())) & INVENTED_WORDS
    for template in (*phrases.HELD_OUT_TITLES, *phrases.HELD_OUT_OPENINGS, *phrases.HELD_OUT_REQUESTS):
        assert template.split("{t}")[0].lower() not in all_text, template


def test_held_out_topics_recombine_known_parts(all_text):
    for topics in (harmful_topics, safe_topics, protective_topics):
        known, held_out = ({topic.infinitive for topic in topics(held_out=flag)} for flag in (False, True))
        assert not known & held_out
        assert len(held_out) / len(known | held_out) == pytest.approx(0.2)
    for topic in harmful_topics(held_out=True) + safe_topics(held_out=True):
        for act, _ in topic.subject.acts:
            assert f"{act} " in all_text
    protective = [row for row in write_prompts(0, harmful=False, count=60) if row["protective"]]
    assert len(protective) == 15


@pytest.mark.parametrize("harmful", [True, False])
def test_prompts_to_develop_on_share_no_topic_with_the_held_out_ones(harmful):
    held_out, others = (
        {row["topic"] for row in write_prompts(1, harmful=harmful, count=120, held_out=held_out)}
        for held_out in (True, False)
    )
    assert len(others) > 60
    assert not held_out & others


def test_parquet_holds_the_same_rows(documents, tmp_path):
    import pyarrow.parquet as pq

    recipe = Recipe(seed=5, documents=40, validation_documents=5, prompts=4, format="parquet")
    write_corpus(str(tmp_path), recipe)
    tables = [pq.read_table(path).to_pylist() for path in sorted((tmp_path / "raw_web").glob("train-*"))]
    found = {row["id"]: row for table in tables for row in table}
    for row in documents["raw_web"]["train"]:
        if row["id"] in found:
            assert found[row["id"]]["text"] == row["text"]
            assert found[row["id"]]["metadata"]["date"].isoformat() == row["metadata"]["date"]
    assert len(found) == 40


@pytest.mark.parametrize("more", [{"documents": 10}, {"documents": 3, "unsafe": 0.0, "chats": 1}])
def test_parquet_without_rows_has_the_columns(tmp_path, more):
    import pyarrow.parquet as pq

    recipe = Recipe(validation_documents=1, prompts=1, **more)
    for file_format in ("jsonl", "parquet"):
        write_corpus(str(tmp_path / file_format), dataclasses.replace(recipe, format=file_format))
    files = json.loads((tmp_path / "parquet/corpus.json").read_text())["files"]
    tables = {name: pq.read_table(tmp_path / "parquet" / name) for name in files if name.endswith(".parquet")}
    assert {name: files[name]["rows"] for name in tables} == {name: table.num_rows for name, table in tables.items()}
    assert not all(table.num_rows for table in tables.values())
    for source in {name.split("/")[0] for name in tables}:
        own = [table.schema for name, table in tables.items() if name.startswith(f"{source}/train")]
        assert all(schema.equals(own[0]) for schema in own) and own[0].names
        assert _count(tmp_path / "parquet" / source) == _count(tmp_path / "jsonl" / source)


def _count(folder):
    return sum(1 for path in sorted(folder.iterdir()) for _ in iter_rows(str(path), pytest.fail, text_column=None))


def test_a_folder_of_another_recipe_is_left_alone(corpus, tmp_path):
    before = (corpus / "corpus.json").stat().st_mtime_ns
    write_corpus(str(corpus), RECIPE)
    assert (corpus / "corpus.json").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="another recipe"):
        write_corpus(str(corpus), Recipe(seed=6))
    for other in ('{"note": "real text"}', '{"recipe": 1}'):
        (tmp_path / "corpus.json").write_text(other)
        with pytest.raises(ValueError, match="another recipe"):
            write_corpus(str(tmp_path), RECIPE)


SMALL = Recipe(seed=5, documents=12, validation_documents=2, prompts=2)


def test_a_folder_with_files_of_someone_else_is_refused_untouched(tmp_path):
    own = tmp_path / "raw_web" / "train-mine.jsonl"
    own.parent.mkdir()
    own.write_text("mine")
    with pytest.raises(ValueError, match=f"--output={tmp_path}: it holds other files"):
        write_corpus(str(tmp_path), SMALL)
    assert own.read_text() == "mine" and not list(tmp_path.rglob("*.gz"))
    with pytest.raises(ValueError, match="must be a local folder"):
        write_corpus("gs://bucket/corpus", SMALL)


def test_what_is_missing_is_written_again_and_what_was_added_or_changed_is_kept(tmp_path):
    facts = write_corpus(str(tmp_path), SMALL)
    added, first, *_, last = tmp_path / "raw_web" / "train-mine.jsonl", *(tmp_path / name for name in facts["files"])
    added.write_text("mine")
    before = first.stat().st_mtime_ns
    content = last.read_bytes()
    last.unlink()
    assert write_corpus(str(tmp_path), SMALL) == facts
    assert last.read_bytes() == content and first.stat().st_mtime_ns == before and added.read_text() == "mine"
    last.write_bytes(b"edited")
    with pytest.raises(ValueError, match=f"{last}: has 6 bytes, and corpus.json lists it with {len(content)}"):
        write_corpus(str(tmp_path), SMALL)
    assert last.read_bytes() == b"edited"


def test_a_stopped_run_is_gone_on_with_by_its_own_recipe_alone(corpus, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(corpus_module, "write_prompts", stop)
        write_corpus(str(tmp_path), SMALL)
    (tmp_path / "raw_web" / f"{files.UNFINISHED}abc.gz").write_bytes(b"half")
    assert not (tmp_path / "corpus.json").exists()
    with pytest.raises(ValueError, match="was begun with --seed 5, now it is 6"):
        write_corpus(str(tmp_path), Recipe(**vars(SMALL) | {"seed": 6}))
    listed = write_corpus(str(tmp_path), SMALL)["files"]
    there = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert there == {*listed, "corpus.json", "prompts/manifest.json", ".lock"}


def test_one_process_writes_a_folder_and_corpus_json_vouches_for_nothing_meanwhile(tmp_path, monkeypatch):
    facts = write_corpus(str(tmp_path), SMALL)
    (tmp_path / next(iter(facts["files"]))).unlink()
    write = corpus_module.write_prompts

    def meanwhile(*arguments, **options):
        assert not (tmp_path / "corpus.json").exists()
        with pytest.raises(files.BusyError, match=f"--output={tmp_path}: another process is writing there"):
            write_corpus(str(tmp_path), SMALL)
        return write(*arguments, **options)

    monkeypatch.setattr(corpus_module, "write_prompts", meanwhile)
    assert write_corpus(str(tmp_path), SMALL) == facts


@pytest.mark.parametrize("flag", ["--documents=0", "--validation_documents=0", "--unsafe=1", "--references=-0.1"])
def test_command_reports_bad_input_in_one_line(tmp_path, flag):
    command = [sys.executable, "-m", "safelm.synthetic_web", f"--output={tmp_path}", flag]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and flag in done.stderr and done.stderr.count("\n") == 1


def _written(folder, recipe):
    write_corpus(str(folder), recipe)
    return folder


def _read(folder, source, split):
    paths = sorted((folder / source).glob(f"{split}-*.jsonl.gz"))
    return [json.loads(line) for path in paths for line in gzip.open(path, "rt", encoding="utf-8")]
