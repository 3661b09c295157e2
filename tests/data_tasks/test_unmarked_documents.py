"""Documents in which an intervention has nothing to mark: what becomes of them, and what the manifest says."""

import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from document_files import write_rows

from data_tasks.interventions import INTERVENTIONS, InterventionSettings, mark_documents
from data_tasks.readers import Document
from safelm import annotate, cache_tasks, documents
from safelm.data.store import TokenStore
from safelm.documents import annotations
from safelm.documents import notes as note_files
from safelm.documents.notes import Note
from safelm.text.control_tokens import with_control_tokens
from safelm.text.tokenizer import Tokenizer

TEXT = "The cat sat here. It was bad, and then it ended."

CONTROLS = ("<note>", "</note>", "<risky>", "</risky>", "<red_flag>")


@pytest.fixture(scope="module")
def tokenizer():
    return with_control_tokens(Tokenizer.train([TEXT] * 9, 300), CONTROLS)


def made(name, tokenizer, document, **settings):
    (found,) = mark_documents(INTERVENTIONS[name], InterventionSettings(**settings), tokenizer, [document])
    return found


@pytest.mark.parametrize("loss", ["both", "note", "text"])
def test_a_document_without_notes_is_learned_and_cut_as_one_with_notes(tokenizer, loss):
    note = Note(0, "reflection", 0, tokenizer.hash, "I see.")
    with_note, without = (
        made("reflected_web", tokenizer, Document("d", TEXT, 0, notes=notes), note_loss=loss, document_tokens=9)
        for notes in ((note,), ())
    )
    start = len(with_note.tokens) - len(without.tokens)
    assert with_note.tokens[start:].tolist() == without.tokens.tolist() and len(without.tokens) == 10
    assert with_note.loss_weight[start:].tolist() == without.loss_weight.tolist()
    assert with_note.kind[start:].tolist() == without.kind.tolist()
    assert without.loss_weight.tolist() == [float(loss != "note")] * 9 + [0]
    assert (with_note.cut_tokens, with_note.is_marked) == (without.cut_tokens, True) and not without.is_marked
    whole = made("reflected_web", tokenizer, Document("d", TEXT, 0), note_loss=loss)
    assert np.unique(whole.loss_weight).tolist() == [float(loss != "note")] and not whole.cut_tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A corpus of two files, and notes beside three documents of the first."""
    folder = tmp_path_factory.mktemp("unmarked")
    for at in (0, 1):
        rows = [{"id": f"d{at}{i}", "text": f"{TEXT} {at}{i}", "harm_score": 0} for i in range(10)]
        write_rows(folder / f"corpus/raw_web/train-{at}.jsonl", rows)
    tokenizer.save(str(folder / "tokenizer"))
    note = {"kind": "reflection", "position": 0, "token_index": 0, "first_person": "I see."}
    annotated(folder, "notes", {0: [[note]] * 3 + [[]] * 7, 1: [[]] * 10})
    return folder


def annotated(folder, name, values):
    """Writes a folder of annotations: the notes of the rows of each file by its number."""
    (folder / name).mkdir()
    for at, of_rows in values.items():
        facts = annotations.input_facts(documents.file_at(f"{folder}/corpus/raw_web/train-{at}.jsonl"))
        fields = [(annotations.ROW, pyarrow.int64()), (note_files.COLUMN, note_files.arrow_type())]
        schema = pyarrow.schema(fields, metadata={annotations.METADATA: json.dumps({"input": facts})})
        rows = [{annotations.ROW: i, note_files.COLUMN: value} for i, value in enumerate(of_rows, start=1)]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), folder / name / f"train-{at}.parquet")
    (folder / name / "manifest.json").write_text("{}")


def annotate_terms(folder, name, *terms):
    (folder / f"{name}.txt").write_text("\n".join(terms))
    argv = [f"--input={folder}/corpus/raw_web", f"--lexicon={folder}/{name}.txt", f"--output={folder}/{name}"]
    annotate.main(annotate.arguments().parse_args([*argv, "--workers=1"]))


def cache(folder, output, name, **flags):
    argv = [f"--tasks={name}", f"--data_dir={folder}/corpus", f"--tokenizer={folder}/tokenizer", "--workers=1"]
    argv += [f"--output={folder}/{output}", "--validation_fraction=0"]
    argv += [f"--{flag}" if value is True else f"--{flag}={value}" for flag, value in flags.items()]
    cache_tasks.main(cache_tasks.arguments().parse_args(argv))
    return TokenStore.open(str(folder / output / name / "train")).manifest


def test_the_manifest_counts_documents_without_notes(folder):
    loss = '{"note_loss": "note"}'
    manifest = cache(folder, "noted", "reflected_web", annotations=folder / "notes", interventions=loss)
    kinds = manifest.extra["token_kinds"]
    assert manifest.num_documents == 20 and manifest.extra["num_unmarked_documents"] == 17
    assert manifest.extra["num_loss_tokens"] == kinds["note"] == manifest.num_tokens - kinds["masked"] > 3


def test_a_store_in_which_nothing_of_what_is_there_is_marked_is_refused(folder, caplog):
    annotate_terms(folder, "terms", "bad", "cat")
    given = {"annotations": folder / "terms"}
    found = "none of 20 documents has a span of .labels. 4, 5; there are 40 spans of kind 'lexicon' and label ''"
    for name in ("masked_web", "unlikelihood_web", "span_tagged_web", "red_flag_span_web"):
        with pytest.raises(ValueError, match=f"terms/{name}/train: {name} would mark nothing: {found}"):
            cache(folder, "terms", name, **given)
    for name, settings, message in (
        ("weighted_web", {}, "has a span of a label of .weights., 3, 4, 5; there"),
        ("masked_web", {"labels": [], "kinds": ["sentence", "mine"]}, "has a span of .kinds. sentence, mine; there"),
        ("masked_unsafe_web", {"labels": []}, "has a span and harm score 4 or more; there"),
    ):
        with pytest.raises(ValueError, match=message):
            cache(folder, "terms", name, **given, interventions=json.dumps(settings))
    # The folder is free for the parameters that were meant.
    manifest = cache(folder, "terms", "masked_web", **given, interventions='{"labels": []}')
    assert manifest.extra["token_kinds"]["masked"] >= 40 and "num_unmarked_documents" not in manifest.extra
    assert manifest.extra["beside_text"] == {"spans of kind 'lexicon' and label ''": 40}
    # A corpus with no span at all is told, and its store made.
    annotate_terms(folder, "absent", "dog")
    assert cache(folder, "absent", "masked_web", annotations=folder / "absent").extra["num_unmarked_documents"] == 20
    assert "nothing is marked: no document has a span of `labels` 4, 5" in caplog.text


def test_a_corpus_that_is_clean_is_made_of_the_refused_stores_shards(folder, monkeypatch, caplog):
    annotate_terms(folder, "clean", "bad\t1")
    written, write_shard = [], cache_tasks.write_shard
    monkeypatch.setattr(cache_tasks, "write_shard", lambda job, *more: written.append(job) or write_shard(job, *more))
    given = {"annotations": folder / "clean"}
    for name, settings in (("masked_web", {}), ("weighted_web", {"weights": {"1": 1.0}})):
        given |= {"interventions": json.dumps(settings)}
        for _ in range(2):
            with pytest.raises(ValueError, match=r"; there are 20 spans of kind .*, --allow_unmarked makes the store"):
                cache(folder, "clean", name, **given)
        manifest = cache(folder, "clean", name, **given, allow_unmarked=True)
        assert manifest.extra["num_unmarked_documents"] == manifest.num_documents == 20
        assert f"clean/{name}/train: nothing is marked" in caplog.text
        assert cache(folder, "clean", name, **given) == manifest  # is there, and whole
        with pytest.raises(ValueError, match="was begun with interventions"):
            cache(folder, "clean", name, **given | {"interventions": '{"labels": ["7"], "weights": {}}'})
    assert [job.source_name for job in written] == ["masked_web"] * 2 + ["weighted_web"] * 2


def test_a_file_without_a_wanted_label_is_no_error(folder, caplog):
    caplog.set_level("INFO")
    annotate_terms(folder, "some", "05\t5", "bad\t1")
    assert cache(folder, "some", "masked_web", annotations=folder / "some").extra["num_unmarked_documents"] == 19
    assert "20 documents (19 without a span of `labels` 4, 5), " in caplog.text


def test_notes_of_another_kind_and_metadata_without_a_host_are_refused(folder):
    with pytest.raises(ValueError, match="has a note of kind 'preflection'; there are 3 notes of kind 'reflection'"):
        cache(folder, "kinds", "preflected_web", annotations=folder / "notes")
    rows = [{"text": f"{TEXT} {i}", "dump": "CC-MAIN-2020-05", "host": "en.example.org" if i else ""} for i in range(4)]
    write_rows(folder / "dumps/train-0.jsonl", rows)
    flags = {"corpus": f"raw_web={folder}/dumps"}
    with pytest.raises(ValueError, match=r"has a host in dump \(.metadata_column.\); there are 4 values of metadata"):
        cache(folder, "dumps", "metadata_web", **flags, interventions='{"metadata_column": "dump"}')
    whole = '{"metadata_column": "dump", "metadata_form": "{value}: "}'
    assert "num_unmarked_documents" not in cache(folder, "dumps", "metadata_web", **flags, interventions=whole).extra
    manifest = cache(folder, "hosts", "metadata_web", **flags, interventions='{"metadata_column": "host"}')
    assert manifest.extra["num_unmarked_documents"] == 1 and manifest.extra["token_kinds"]["prefix"] > 3


def test_annotations_that_lack_a_file_are_refused_before_a_shard_is_made_with_them(folder):
    note = {"kind": "reflection", "position": 0, "token_index": 0, "first_person": "I see."}
    annotated(folder, "part", {0: [[note]] * 10})
    (folder / "part" / "manifest.json").write_text('{"files": 1}')
    with pytest.raises(FileNotFoundError, match=r"part: no annotations of .*train-1\.jsonl"):
        cache(folder, "refused", "reflected_web", annotations=folder / "part")
    assert not list((folder / "refused").rglob("shard-*"))
    assert cache(folder, "refused", "reflected_web", annotations=folder / "notes").num_documents == 20
