"""SeqIO tasks, sources, vocabulary and mixtures on a tiny corpus."""

import functools
import gzip
import json
import logging

import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import seqio
import tensorflow as tf
import tensorflow_datasets as tfds

from configs import quickstart
from data_tasks import rates, tasks
from data_tasks.preprocessors import in_validation_split, replace_speaker_names
from data_tasks.sources import WebDocumentSource
from data_tasks.vocabulary import SafeLMVocabulary
from safelm import score
from safelm.tags import HARM_TAG
from safelm.text.harm_tags import inject_harm_tag
from safelm.text.tokenizer import Tokenizer

SENTENCES = [f"Page {i} tells of rivers, towns, {i * 37} boats and how they came to be there." for i in range(60)]


def make_rows(corpus, count):
    rows = []
    for i in range(count):
        text = f"{corpus}: " + " ".join(SENTENCES[(i + j) % len(SENTENCES)] for j in range(1 + i % 4))
        if corpus == "refuseweb":
            text = f"User: {text}\nAssistant: I can't help with that, User: no."
        rows.append({"id": f"{corpus}-{i}", "text": text, "metadata": {"url": "u", "harm_score": i % 6}})
    return rows


def write_corpus(root):
    for corpus in ("raw_web", "safeweb", "refuseweb", "moral_education"):
        folder, rows = root / corpus, make_rows(corpus, 60)
        folder.mkdir(parents=True)
        for split, shard, part in (("train", 0, rows[:25]), ("train", 1, rows[25:50]), ("validation", 0, rows[50:])):
            with gzip.open(folder / f"{split}-{shard:05d}.jsonl.gz", "wt") as file:
                file.writelines(json.dumps(row) + "\n" for row in part)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpus")
    write_corpus(root)
    return str(root)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(SENTENCES, 400)


@pytest.fixture(scope="module")
def registered(corpus, tokenizer):
    return tasks.register(corpus, tokenizer)


def examples(name, split="train", **kwargs):
    dataset = seqio.get_mixture_or_task(name).get_dataset(split=split, shuffle=False, **kwargs)
    return list(dataset.as_numpy_iterator())


def targets(found):
    return [example["targets"].tolist() for example in found]


@functools.cache
def plain_targets(name):
    """Of a task that no test registers anew."""
    return targets(examples(name))


def expected(source, tokenizer, split="train"):
    corpus = tasks.CORPORA[source]
    rows = make_rows(corpus, 60)[slice(50) if split == "train" else slice(50, None)]
    ids = []
    for row in rows:
        score, text = row["metadata"]["harm_score"], row["text"]
        if (source == "filtered_web" and score != 0) or (source == "harm_tagged_web" and score < 4):
            continue
        if source == "harm_tagged_web":
            text = inject_harm_tag(text, harm_score=score, doc_id=row["id"], seed=0)
        if source == "refuseweb":
            text = replace_speaker_names(text, doc_id=row["id"], seed=0)
        ids.append([*tokenizer.encode_tagged(text), tokenizer.eos_id])
    return ids


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("source", rates.SOURCES)
def test_every_task_gives_its_documents_in_order(registered, tokenizer, source, split):
    assert registered.tasks[source] == f"safelm_{source}"
    wanted = expected(source, tokenizer, split)
    found = examples(f"safelm_{source}", split)
    assert targets(found) == targets(examples(f"safelm_{source}", split)) == wanted
    assert wanted and all(ids.count(tokenizer.eos_id) == 1 and ids[-1] == 0 == tokenizer.eos_id for ids in wanted)
    tags = sum(ids.count(tokenizer.harm_tag_id) for ids in wanted)
    assert (tags > 0) == (source == "harm_tagged_web")


def test_tagged_documents_without_tags_are_the_raw_ones(registered, tokenizer):
    raw = {example["id"]: example["targets"].tolist() for example in examples("safelm_raw_web")}
    for example in examples("safelm_harm_tagged_web"):
        assert example["harm_score"] >= 4
        assert [i for i in example["targets"].tolist() if i != tokenizer.harm_tag_id] == raw[example["id"]]


def test_shards_make_up_the_whole_in_order(registered):
    task = seqio.get_mixture_or_task("safelm_raw_web")
    assert len(task.source.list_shards("train")) == 2
    shards = [examples("safelm_raw_web", shard_info=seqio.ShardInfo(i, 2)) for i in range(2)]
    assert targets(shards[0]) + targets(shards[1]) == targets(examples("safelm_raw_web"))
    with pytest.raises(ValueError, match="2 files can't make 3 shards"):
        task.source.get_dataset(shard_info=seqio.ShardInfo(0, 3))


def test_shuffling_keeps_every_document(registered):
    dataset = seqio.get_mixture_or_task("safelm_raw_web").get_dataset(split="train", shuffle=True, seed=1)
    shuffled, plain = targets(dataset.as_numpy_iterator()), targets(examples("safelm_raw_web"))
    assert shuffled != plain and sorted(shuffled) == sorted(plain)


def test_sets_side_by_side_differ_by_seed_and_rate(registered, corpus, tokenizer):
    tasks.register(corpus, tokenizer, prefix="other", settings={"seed": 1})
    tasks.register(corpus, tokenizer, prefix="many", settings=tasks.TaskSettings(tag_rate=0.5, min_harm_score=1))
    plain, other, many = (targets(examples(f"{name}_harm_tagged_web")) for name in ("safelm", "other", "many"))
    assert plain != other and len(plain) == len(other) and len(many) == 41
    tag = tokenizer.harm_tag_id
    assert sum(ids.count(tag) for ids in many) > 5 * sum(ids.count(tag) for ids in plain)
    assert targets(examples("other_raw_web")) == targets(examples("safelm_raw_web"))


FIRST = ("raw", "refuseweb", "harm_tagged")


@pytest.mark.parametrize(
    "rung", [rung if rung in FIRST else pytest.param(rung, marks=pytest.mark.slow) for rung in rates.LADDER]
)
def test_mixtures_hold_their_members_documents(registered, rung):
    mixture = seqio.get_mixture_or_task(f"safelm_ladder_{rung}")
    names = {task.name for task in mixture.tasks}
    assert names == {f"safelm_{source}" for source in rates.rates(rung)}
    documents = {tuple(ids) for name in names for ids in plain_targets(name)}
    found = mixture.get_dataset(split="train", shuffle=True, seed=3, num_epochs=1)
    found = {tuple(ids) for ids in targets(found.as_numpy_iterator())}
    assert found and found <= documents


def test_mixtures_have_their_rates_in_tokens(registered, tokenizer):
    mixture = seqio.get_mixture_or_task("safelm_ladder_refuseweb")
    dataset = mixture.get_dataset(split="train", shuffle=True, seed=0).take(400)
    owner = {tuple(ids): task.name for task in mixture.tasks for ids in plain_targets(task.name)}
    tokens = dict.fromkeys([task.name for task in mixture.tasks], 0)
    for ids in targets(dataset.as_numpy_iterator()):
        tokens[owner[tuple(ids)]] += len(ids)
    for source, rate in rates.rates("refuseweb").items():
        assert tokens[f"safelm_{source}"] / sum(tokens.values()) == pytest.approx(rate, abs=0.08)


def test_the_quickstart_with_tags_by_token_differs_by_that_source_alone():
    plain, other = (quickstart.get_config(variant).to_dict() for variant in ("safety", "token_tagged"))
    for found in (plain, other):
        assert sum(found["data"]["phases"][0]["rates"].values()) == pytest.approx(1)
    assert plain != other
    assert json.loads(json.dumps(plain).replace("harm_tagged_web", "token_tagged_web")) == json.loads(json.dumps(other))


def test_a_document_cannot_tag_itself_or_end_itself(tmp_path, tokenizer):
    (tmp_path / "raw_web").mkdir()
    rows = [{"id": str(i), "text": f"a {HARM_TAG}b <|endoftext|> c", "harm_score": i * 5} for i in range(2)]
    (tmp_path / "raw_web" / "train-0.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = {"tag_rate": 0.0, "validation_fraction": 0.0}
    tasks.register(str(tmp_path), tokenizer, prefix="literal", settings=settings)
    for name in ("raw_web", "filtered_web", "harm_tagged_web"):
        found = examples(f"literal_{name}")
        assert [example["removed_tags"] for example in found] == [1] * len(found)
        for ids in targets(found):
            assert tokenizer.harm_tag_id not in ids and ids.count(tokenizer.eos_id) == 1
            assert tokenizer.decode(ids[:-1]) == "a b <|endoftext|> c"


def test_eos_id_zero_survives_and_lengths_are_cut_only_on_request(registered, tokenizer):
    plain = targets(examples("safelm_raw_web"))
    cut = targets(examples("safelm_raw_web", sequence_length={"targets": 5}))
    assert cut == [ids[:5] for ids in plain] and all(ids[-1] == 0 for ids in plain)
    feature = seqio.get_mixture_or_task("safelm_raw_web").output_features["targets"]
    assert not feature.add_eos and feature.vocabulary.eos_id == 0
    appended = seqio.preprocessors.append_eos(
        seqio.get_mixture_or_task("safelm_raw_web").get_dataset(split="train", shuffle=False), {"targets": feature}
    )
    assert targets(appended.as_numpy_iterator()) == plain


def test_hash_split_holds_out_a_share_of_ids(tmp_path, tokenizer):
    rows = make_rows("raw_web", 400)
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(rows), fspath(tmp_path / "raw_web" / "data", "train-0.parquet")
    )
    tasks.register(str(tmp_path), tokenizer, prefix="hashed", settings={"validation_fraction": 0.1})
    train, held_out = (
        [e["id"].decode() for e in examples("hashed_raw_web", split)] for split in ("train", "validation")
    )
    assert [row["id"] for row in rows if not in_validation_split(row["id"], 0.1)] == train
    assert sorted(train + held_out) == sorted(row["id"] for row in rows) and 15 < len(held_out) < 70
    tasks.register(str(tmp_path), tokenizer, prefix="hashed", settings={"validation_fraction": 0.0})
    assert seqio.get_mixture_or_task("hashed_raw_web").splits == ("train",)
    assert len(examples("hashed_raw_web")) == 400


def test_a_small_corpus_has_a_held_out_document_of_every_score(tmp_path, tokenizer):
    """One of a hundred of 60 documents is none by the hash alone; of a score with one document none is taken."""
    rows = [row | {"metadata": {"harm_score": i % 3}} for i, row in enumerate(make_rows("raw_web", 60))]
    rows.append(rows[0] | {"id": "only", "metadata": {"harm_score": 5}})
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), fspath(tmp_path / "raw_web", "train-0.parquet"))
    tasks.register(str(tmp_path), tokenizer, prefix="few", settings={"validation_fraction": 0.0001})
    train, held_out = ([e["id"].decode() for e in examples("few_raw_web", split)] for split in ("train", "validation"))
    scores = {row["id"]: row["metadata"]["harm_score"] for row in rows}
    assert sorted(scores[doc_id] for doc_id in held_out) == [0, 1, 2]
    assert sorted(train + held_out) == sorted(scores)


def fspath(folder, name):
    folder.mkdir(parents=True)
    return str(folder / name)


def test_any_fsspec_url(registered, corpus, tokenizer):
    local, memory = fsspec.filesystem("file"), fsspec.filesystem("memory")
    for path in local.find(f"{corpus}/raw_web"):
        memory.pipe_file(path.replace(corpus, "/bucket"), local.cat_file(path))
    tasks.register("memory://bucket", tokenizer, prefix="remote")
    assert targets(examples("remote_raw_web")) == targets(examples("safelm_raw_web"))
    assert seqio.get_mixture_or_task("remote_raw_web").source.list_shards("train")[0].startswith("memory://")
    tasks.register("nowhere", tokenizer, prefix="moved", corpora={"raw_web": f"{corpus}/safeweb"})
    assert targets(examples("moved_raw_web")) == targets(examples("safelm_safeweb"))


class WebDocs(tfds.core.GeneratorBasedBuilder):
    """A TFDS data set in the published columns."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        metadata = {"url": tfds.features.Text(), "harm_score": np.int64}
        features = {"id": tfds.features.Text(), "text": tfds.features.Text(), "metadata": metadata}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        yield from ((row["id"], row) for row in make_rows("raw_web", 50))


def test_tfds_data_set_gives_the_same_documents(registered, tmp_path, tokenizer):
    WebDocs(data_dir=str(tmp_path), file_format="tfrecord").download_and_prepare()
    tasks.register(
        "nowhere", tokenizer, prefix="tfds", corpora={"raw_web": "tfds:web_docs:1.0.0"}, tfds_data_dir=str(tmp_path)
    )
    for source in ("raw_web", "filtered_web", "harm_tagged_web"):
        found = {example["id"]: example["targets"].tolist() for example in examples(f"tfds_{source}")}
        assert found == {example["id"]: example["targets"].tolist() for example in examples(f"safelm_{source}")}


def test_vocabulary_agrees_with_the_tokenizer_in_python_and_tensorflow(tokenizer, tmp_path):
    vocabulary = SafeLMVocabulary(tokenizer)
    text = f"Rivers ünd {HARM_TAG} boats\n"
    ids = tokenizer.encode(text)
    assert vocabulary.encode(text) == vocabulary.encode_tf(tf.constant(text)).numpy().tolist() == ids
    assert vocabulary.decode(ids) == vocabulary.decode_tf(tf.constant(ids)).numpy().decode() == text
    batch = vocabulary.decode_tf(tf.constant([ids, ids])).numpy().tolist()
    assert batch == [text.encode()] * 2 and vocabulary.vocab_size == tokenizer.vocab_size
    tokenizer.save(str(tmp_path / "same"))
    assert vocabulary == SafeLMVocabulary(str(tmp_path / "same")) and hash(vocabulary) is not None
    assert vocabulary != SafeLMVocabulary(Tokenizer.train(["other"], 300)) and vocabulary != "vocabulary"


def test_vocabulary_is_loaded_when_used(corpus):
    tasks.register(corpus, "no/such/tokenizer", prefix="lazy")
    with pytest.raises(FileNotFoundError, match="no/such/tokenizer"):
        _ = seqio.get_mixture_or_task("lazy_raw_web").output_features["targets"].vocabulary.tokenizer


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"settings": {"tag_rate": 2.0}}, "tag_rate must be from 0 to 1, got 2.0"),
        ({"settings": {"min_harm_score": 0}}, "min_harm_score must be 1 to 5, got 0"),
        ({"settings": {"validation_fraction": 1.0}}, "validation_fraction must be from 0 to below 1, got 1.0"),
        ({"corpora": {"unsafe_web": "x"}}, "unknown corpus 'unsafe_web': one of alignment_text, canaries"),
    ],
)
def test_bad_settings(corpus, tokenizer, kwargs, message):
    with pytest.raises(ValueError, match=message):
        tasks.register(corpus, tokenizer, prefix="bad", **kwargs)


def test_empty_corpora_and_malformed_rows(tmp_path, caplog):
    with pytest.raises(FileNotFoundError, match=r"empty corpus: no file matches .*none/\*\*/train-\*"):
        WebDocumentSource(str(tmp_path / "none")).list_shards("train")
    (tmp_path / "train-0.jsonl").write_text("\n{\n")
    source = WebDocumentSource(str(tmp_path), quarantine_dir=str(tmp_path / "quarantine"), validation_fraction=0.0)
    with pytest.raises(
        tf.errors.InvalidArgumentError, match=r"empty corpus: .* no usable row in 1 files \(1 malformed\)"
    ):
        list(source.get_dataset())
    assert (tmp_path / "quarantine" / "train" / "train-0.jsonl.malformed").exists()
    (tmp_path / "train-1.jsonl").write_text('{"id": "a", "text": "x"}\n{"id": "b", "text": "SECRET", "id": 1.5}\n')
    with caplog.at_level(logging.DEBUG):
        assert [e["id"] for e in source.__class__(str(tmp_path)).get_dataset(shuffle=False).as_numpy_iterator()] == [
            b"a"
        ]
    assert "1 of 2 rows are malformed" in caplog.text and "SECRET" not in caplog.text
    with pytest.raises(ValueError, match="no split 'test', it has train"):
        source.list_shards("test")


def test_shards_that_are_read_at_once_are_counted_apart(tmp_path):
    (tmp_path / "train-0.jsonl").write_text('{"id": "a", "text": "x"}\n{\n{"id": "b", "text": "x"}\n')
    (tmp_path / "train-1.jsonl").write_text('{"id": "c", "text": "x"}\n')
    source = WebDocumentSource(str(tmp_path), validation_fraction=0.0)
    batches = [source.document_batches("train", index, 2) for index in (0, 1)]
    assert [[document.id for document in next(each)] for each in batches] == [["a", "b"], ["c"]]
    reports = [source.shard_report("train", index, 2) for index in (0, 1)]
    assert [(report.rows, report.malformed) for report in reports] == [(3, 1), (1, 0)]


def test_registration_from_the_environment(monkeypatch, corpus, tokenizer, tmp_path):
    tokenizer.save(str(tmp_path))
    before = targets(examples("safelm_harm_tagged_web"))
    monkeypatch.setenv("SAFELM_DATA_DIR", corpus)
    with pytest.raises(ValueError, match="SAFELM_TOKENIZER is not set"):
        tasks.register_from_environment()
    monkeypatch.setenv("SAFELM_TOKENIZER", str(tmp_path))
    monkeypatch.setenv("SAFELM_TAG_RATE", "often")
    with pytest.raises(ValueError, match="SAFELM_TAG_RATE must be a number, got 'often'"):
        tasks.register_from_environment()
    monkeypatch.delenv("SAFELM_TAG_RATE")
    monkeypatch.setenv("SAFELM_TASK_SEED", "0")
    tasks.register_from_environment()
    assert targets(examples("safelm_harm_tagged_web")) == before


def test_what_scoring_wrote_is_a_corpus_of_the_tasks(tmp_path):
    rows = [{"id": f"d{i}", "text": f"Document {i} has level{i % 6}."} for i in range(20)]
    rows[3]["text"] = "unusable"
    for name, part in (("web", rows[:15]), ("validation-00000", rows[15:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    flags = [f"--input={tmp_path}/*.jsonl", f"--output={tmp_path}/scored", "--workers=1"]
    score.main(score.arguments().parse_args([*flags, "--scorers=python:scorers_for_tests:LevelScorer"]))
    corpus = WebDocumentSource(str(tmp_path / "scored"), needs_score=True)
    for split, numbers in (("train", set(range(15)) - {3}), ("validation", range(15, 20))):
        examples = corpus.get_dataset(split, shuffle=False).as_numpy_iterator()
        found = {example["id"].decode(): int(example["harm_score"]) for example in examples}
        assert found == {f"d{i}": i % 6 for i in numbers}


def test_the_source_reads_what_safelm_synthesize_writes(tmp_path, monkeypatch):
    from document_files import write_rows
    from synthesis_runs import no_charts, published, rows_of, run

    no_charts(monkeypatch)
    rows = rows_of((4, 5), 16)
    for name, some in (("train-0", rows[:12]), ("validation-0", rows[12:])):
        write_rows(tmp_path / "scored" / f"{name}.jsonl", some)
    run(tmp_path / "refuseweb", tmp_path / "scored", kind="refuseweb")
    source = WebDocumentSource(str(tmp_path / "refuseweb"), needs_score=True)
    found = {
        example["id"].decode(): (example["text"].decode(), int(example["harm_score"]))
        for split in ("train", "validation")
        for example in source.get_dataset(split, shuffle=False).as_numpy_iterator()
    }
    wanted = {
        row["id"]: (row["text"], row["metadata"]["int_score"]) for row in published(tmp_path / "refuseweb").values()
    }
    assert found == wanted and len(wanted) > 10
