"""Documents in which an intervention has nothing to mark: what becomes of them, and what the manifest says."""

import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from document_files import write_rows

from data_tasks.interventions import INTERVENTIONS, InterventionSettings, mark_documents
from data_tasks.readers import Document
from safelm import cache_tasks, documents
from safelm.data.store import TokenStore
from safelm.documents import annotations
from safelm.documents import notes as note_files
from safelm.documents.notes import Note
from safelm.text.control_tokens import with_control_tokens
from safelm.text.tokenizer import Tokenizer

TEXT = "The cat sat here. It was bad, and then it ended."


@pytest.fixture(scope="module")
def tokenizer():
    return with_control_tokens(Tokenizer.train([TEXT] * 9, 300), ["<note>", "</note>"])


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


def cache(folder, output, name, **flags):
    argv = [f"--tasks={name}", f"--data_dir={folder}/corpus", f"--tokenizer={folder}/tokenizer", "--workers=1"]
    argv += [f"--output={folder}/{output}", "--validation_fraction=0"]
    argv += [f"--{flag}={value}" for flag, value in flags.items()]
    cache_tasks.main(cache_tasks.arguments().parse_args(argv))
    return TokenStore.open(str(folder / output / name / "train")).manifest


def test_the_manifest_counts_documents_without_notes(folder):
    loss = '{"note_loss": "note"}'
    manifest = cache(folder, "noted", "reflected_web", annotations=folder / "notes", interventions=loss)
    kinds = manifest.extra["token_kinds"]
    assert manifest.num_documents == 20 and manifest.extra["num_unmarked_documents"] == 17
    assert manifest.extra["num_loss_tokens"] == kinds["note"] == manifest.num_tokens - kinds["masked"] > 3
