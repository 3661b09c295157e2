"""Tasks run in batches: the examples and the bytes that SeqIO's graph gives, the same errors, in order."""

import threading

import numpy as np
import pytest
import seqio
import tensorflow as tf

from data_tasks import tasks
from data_tasks.readers import Document
from safelm import cache_tasks
from safelm.caching import batches, shards
from safelm.documents.notes import Note
from safelm.documents.spans import Span
from safelm.synthetic_web.corpus import Recipe, write_corpus
from safelm.tags import HARM_TAG
from safelm.text.control_tokens import with_control_tokens
from safelm.text.tokenizer import Tokenizer

CONTROLS = ("<good>", "<bad>", "<risky>", "</risky>", "<red_flag>", "<refuse>", "<respond>", "<note>", "</note>")
TEXT = "The cat sat here, über 漢字. It was bad 😀, and then it ended."


@pytest.fixture(scope="module")
def tokenizer():
    return with_control_tokens(Tokenizer.train([TEXT] * 9, 340), CONTROLS)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("corpus"))
    write_corpus(folder, Recipe(documents=40, validation_documents=10, prompts=2, chats=60))
    return folder


@pytest.fixture(scope="module")
def registered(corpus, tokenizer):
    return tasks.register(corpus, tokenizer, prefix="batches", settings={"validation_fraction": 0.0})


def web_documents():
    """Of every score, some with literal tags, spans, notes and metadata."""
    for i in range(40):
        text = f"{TEXT} {i}" + (f" a{HARM_TAG} b" if i % 7 == 0 else "")
        spans = (Span(28, 44, "harm", "5"), Span(3, 10, "tone", "3"))[: i % 3]
        notes = [Note(28, "reflection", first_person="I see.", sections=("2.1",)), Note(0, "preflection")]
        beside = {"spans": spans, "notes": tuple(notes[: i % 3]), "metadata": f"https://w{i}.invalid/" if i % 2 else ""}
        yield Document(f"d{i}", text, i % 6, **beside)


def joined(found, name):
    return [each for batch in found for each in getattr(batch, name).tolist()]


ONE_OF_EACH_KIND = (
    *("raw_web", "harm_tagged_web", "refuseweb", "ultrachat", "harm_tagged_chat", "refusal_wildguardmix"),
    *("unlikelihood_web", "span_tagged_web", "token_tagged_web", "metadata_web", "reflected_web"),
)


def test_all_of_our_tasks_run_in_batches(registered):
    assert all(batches.batched(seqio.TaskRegistry.get(name)) for name in registered.tasks.values())


@pytest.mark.parametrize("source_name", ONE_OF_EACH_KIND)
def test_every_step_gives_the_same_called_with_examples_or_with_documents(registered, source_name):
    task = seqio.TaskRegistry.get(registered.tasks[source_name])
    in_batches = batches.batched(task)
    if tasks.CORPORA[source_name] == "raw_web":
        documents = list(web_documents())
    else:
        documents = [each for batch in task.source.document_batches("train", 0, 1) for each in batch]
    dataset = tf.data.Dataset.from_tensor_slices(task.source._columns(documents))
    for step in task.preprocessors:
        dataset = step(dataset)
    examples = list(dataset.as_numpy_iterator())
    found = [in_batches._encode(documents[:9]), in_batches._encode(documents[9:])]
    found = [batch for batch in found if batch is not None]
    assert [each["id"].decode() for each in examples] == [each for batch in found for each in batch.ids] != []
    assert {"targets", *in_batches.encoder.channel_names} <= set(examples[0])
    assert [len(each["targets"]) for each in examples] == joined(found, "lengths")
    np.testing.assert_array_equal(np.concatenate([each["targets"] for each in examples]), joined(found, "tokens"))
    for name in in_batches.encoder.channel_names:
        of_batches = np.concatenate([batch.channels[name] for batch in found])
        of_examples = np.concatenate([each[name] for each in examples])
        assert of_batches.dtype == of_examples.dtype
        np.testing.assert_array_equal(of_batches, of_examples)
    for name in ("lost_bytes", "removed_tags", "cut_tokens", "unmarked"):
        assert [int(each[name]) for each in examples] == joined(found, name)


def test_stores_have_the_same_bytes_either_way(corpus, tokenizer, tmp_path, monkeypatch):
    tokenizer.save(str(tmp_path / "tokenizer"))
    names = "harm_tagged_web,raw_web,token_tagged_web,red_flag_web,ultrachat,refusal_wildguardmix"
    contents = []
    for name in ("batches", "examples"):
        argv = [f"--tasks={names}", f"--data_dir={corpus}", f"--tokenizer={tmp_path}/tokenizer", "--workers=1"]
        flags = ['--interventions={"flag_loss": "flag"}', "--validation_fraction=0", "--splits=train"]
        with monkeypatch.context() as patch:
            if name == "examples":
                patch.setattr(shards, "batched", lambda task: None)
            cache_tasks.main(cache_tasks.arguments().parse_args([*argv, *flags, f"--output={tmp_path}/{name}"]))
        paths = [path for path in (tmp_path / name).rglob("*") if path.is_file() and path.name != ".lock"]
        contents.append({str(path.relative_to(tmp_path / name)): path.read_bytes() for path in paths})
    assert contents[0] == contents[1]
    assert {path.split("/")[0] for path in contents[0]} == set(names.split(","))


def made_of(numbers):
    zeros = np.zeros(len(numbers), np.int32)
    return batches.EncodedBatch(
        list(map(str, numbers)), np.array(numbers, np.int32), zeros + 1, {}, zeros, zeros, zeros, zeros
    )


@pytest.mark.parametrize("failing", [0, 1, 5, 6])
def test_errors_of_reading_and_encoding_come_in_the_order_of_the_documents(failing):
    def read():
        for i in range(6):
            yield [i]
        raise ValueError("reading failed at 6")

    def encode(batch):
        if batch == [failing]:
            raise ValueError(f"encoding failed at {failing}")
        return None if batch == [3] else made_of(batch)

    got, before = [], threading.active_count()
    with pytest.raises(ValueError, match=f"failed at {failing}"):
        got.extend(int(batch.ids[0]) for batch in batches._in_order(encode, read()))
    assert threading.active_count() == before
    some = iter(batches._in_order(encode, read()))
    next(some, None) if failing else None
    some.close()
    assert threading.active_count() == before


def test_bad_batches_are_named_and_a_foreign_step_takes_the_graph(registered, tokenizer, tmp_path, monkeypatch):
    task = seqio.TaskRegistry.get(registered.tasks["ultrachat"])
    file, *others = task.source.list_shards("train")
    of = len(others) + 1
    ids = [each.id for batch in task.source.document_batches("train", 0, of) for each in batch]
    encode = batches.BatchedTask._encode

    def write(change):
        monkeypatch.setattr(batches.BatchedTask, "_encode", lambda self, documents: change(encode(self, documents)))
        dtype, where = "uint16", (str(tmp_path), "f")
        job = shards.CacheJob(
            "u", registered.tasks["ultrachat"], "train", 0, of, *where, dtype, tokenizer.eos_id, 3, file
        )
        return shards.write_shard(job)

    def with_a_bad_weight(batch):
        batch.channels["loss_weight"][batch.lengths[:2].sum()] = np.nan
        return batch

    def without_an_end(batch):
        batch.tokens[batch.lengths[:3].sum() - 1] += 1
        return batch

    with pytest.raises(ValueError, match=rf"{file}, id {ids[2]}: .*document 2 has .*loss_weight\[0\] is nan"):
        write(with_a_bad_weight)
    with pytest.raises(ValueError, match=r"batches_ultrachat: a document's targets don't end in eos_id 0"):
        write(without_an_end)
    assert not list(tmp_path.iterdir())
    assert write(lambda batch: batch).num_documents == len(ids)
    steps = [*task.preprocessors, lambda dataset: dataset]
    seqio.TaskRegistry.remove("foreign")
    seqio.TaskRegistry.add("foreign", source=task.source, preprocessors=steps, output_features=task.output_features)
    assert batches.batched(seqio.TaskRegistry.get("foreign")) is None
