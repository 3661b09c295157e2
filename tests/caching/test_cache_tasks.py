"""The caching command: stores equal SeqIO's ids, runs continue, bad input is one clear line."""

import functools
import gzip
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import seqio
import side_files
import tensorflow as tf

from data_tasks import rates
from safelm import cache_tasks
from safelm.caching import shards as cache_shards
from safelm.data.shard import ShardWriter
from safelm.data.store import TokenStore
from safelm.text.tokenizer import Tokenizer

WORDS = [
    f"{a}{b}{c}" for a in ("ri", "to", "bo", "ma") for b in ("ver", "wn", "at", "n") for c in ("", "s", "ly", "ed")
]


def make_rows(corpus, count, words=20):
    generator = np.random.default_rng(len(corpus))
    for i in range(count):
        text = f"{corpus}: " + " ".join(generator.choice(WORDS, words))
        text = f"User: {text}\nAssistant: no" if corpus == "refuseweb" else text
        yield {"id": f"{corpus}-{i}", "text": text, "metadata": {"harm_score": i % 6}}


def write_corpus(root, corpus, *, shards=2, count=40, words=20):
    folder, rows = root / corpus, list(make_rows(corpus, count, words))
    folder.mkdir(parents=True)
    for split, files in (("train", shards), ("validation", 1)):
        for shard in range(files):
            with gzip.GzipFile(folder / f"{split}-{shard:05d}.jsonl.gz", "wb", mtime=0) as file:
                part = rows[shard::shards] if split == "train" else rows[:6]
                file.writelines(json.dumps(row).encode() + b"\n" for row in part)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("tokenizer"))
    Tokenizer.train([" ".join(WORDS)] * 3, 350).save(path)
    return path


@pytest.fixture
def corpus(tmp_path):
    for name in ("raw_web", "safeweb", "refuseweb", "moral_education"):
        write_corpus(tmp_path / "corpus", name)
    return tmp_path / "corpus"


@pytest.fixture
def cache(tmp_path, corpus, tokenizer):
    def run(tasks, **flags):
        flags = {"data_dir": corpus, "tokenizer": tokenizer, "output": tmp_path / "tokens"} | flags
        argv = [f"--tasks={tasks}", *(f"--{name}={value}" for name, value in flags.items() if value is not None)]
        cache_tasks.main(cache_tasks.arguments().parse_args(argv))
        return tmp_path / "tokens"

    return run


def documents(store):
    return [store.document(i).tolist() for i in range(store.num_documents)]


def seqio_ids(name, split="train"):
    dataset = seqio.get_mixture_or_task(name).get_dataset(split=split, shuffle=False)
    return [example["targets"].tolist() for example in dataset.as_numpy_iterator()]


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def write_times(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.npy")}


def test_stores_hold_what_seqio_gives_for_tasks_and_a_mixtures_members(cache, tokenizer):
    output = cache("raw_web,safelm_ladder_harm_tagged")
    vocabulary = Tokenizer.from_pretrained(tokenizer)
    assert sorted(path.name for path in output.iterdir()) == sorted(rates.SOURCES)
    for source in rates.SOURCES:
        for split in ("train", "validation"):
            store = TokenStore.open(output / source / split, vocab_hash=vocabulary.hash, verify_checksums=True)
            assert documents(store) == seqio_ids(f"safelm_{source}", split) != []
            manifest = store.manifest
            assert (manifest.task, manifest.split, len(manifest.shards)) == (
                source,
                split,
                2 if split == "train" else 1,
            )
            assert manifest.extra["seqio_task"] == f"safelm_{source}" and manifest.extra["settings"]["tag_rate"] == 0.05
            assert store.num_tokens == sum(map(len, documents(store)))
            tags = sum(ids.count(vocabulary.harm_tag_id) for ids in documents(store))
            assert manifest.num_tag_tokens == tags and (tags > 0 or source != "harm_tagged_web" or split != "train")
            assert all(ids.count(vocabulary.eos_id) == 1 and ids[-1] == vocabulary.eos_id for ids in documents(store))


def test_a_second_run_changes_nothing_and_mends_a_lost_shard(cache):
    store = cache("harm_tagged_web") / "harm_tagged_web" / "train"
    before, times = contents(store), write_times(store)
    cache("harm_tagged_web")
    assert contents(store) == before and write_times(store) == times
    (store / "tokens-00001-of-00002.npy").write_bytes(b"cut")
    cache("harm_tagged_web")
    assert contents(store) == before
    changed = {name for name, when in write_times(store).items() if when != times[name]}
    assert changed == {f"{kind}-00001-of-00002.npy" for kind in ("tokens", "bounds", "sums")}
    flipped = bytearray(before["tokens-00000-of-00002.npy"])
    flipped[-3] ^= 1  # of the same size
    (store / "tokens-00000-of-00002.npy").write_bytes(flipped)
    cache("harm_tagged_web")
    assert contents(store) == before


@pytest.mark.slow
def test_a_store_of_the_former_format_is_made_anew(cache):
    store = cache("harm_tagged_web") / "harm_tagged_web" / "train"
    before = contents(store)
    for path in (*store.glob("shard-*.json"), store / "manifest.json", store / "settings.json"):
        record = json.loads(path.read_text())
        for values in (record, *record.get("shards", ())):
            sizes = {f"{kind}_bytes": file["bytes"] for kind, file in values.pop("files", {}).items()}
            values.update(sizes if values.pop("channels", None) is not None else {})
        path.write_text(json.dumps(record | ({"format_version": 1} if "shards" in record else {})))
    (store / "spans-00001-of-00002.npy").write_bytes(b"of the former format")
    with pytest.raises(ValueError, match="format_version 1, this program reads 2; the command that cached"):
        TokenStore.open(store)
    cache("harm_tagged_web")
    assert contents(store) == before


def test_other_settings_for_the_same_output_are_named(cache, corpus, tmp_path):
    store = cache("harm_tagged_web") / "harm_tagged_web" / "train"
    before = contents(store)
    for flag, value, shown in (("tag_rate", 0.1, "tag_rate 0.05, now it is 0.1"), ("seed", 3, "seed 0, now it is 3")):
        with pytest.raises(ValueError, match=f"harm_tagged_web/train was begun with {shown}: choose another --output"):
            cache("harm_tagged_web", **{flag: value})
    Tokenizer.train(["other words"], 300).save(str(tmp_path / "other"))
    with pytest.raises(ValueError, match="begun with vocab_hash"):
        cache("harm_tagged_web", tokenizer=tmp_path / "other")
    (store / "manifest.json").unlink()  # the same holds for a store that was never finished
    with pytest.raises(ValueError, match="begun with seed 0, now it is 3"):
        cache("harm_tagged_web", seed=3)
    shutil.copy(corpus / "safeweb" / "train-00001.jsonl.gz", corpus / "raw_web" / "train-00001.jsonl.gz")
    with pytest.raises(ValueError, match=r"begun with inputs \{.*'name': 'train-00001.jsonl.gz'.*, now it is \{"):
        cache("harm_tagged_web")
    shutil.copy(corpus / "safeweb" / "train-00001.jsonl.gz", corpus / "raw_web" / "train-00002.jsonl.gz")
    with pytest.raises(ValueError, match="begun with inputs of 2 files, now it is 3 files"):
        cache("harm_tagged_web")
    assert {**contents(store), "manifest.json": before["manifest.json"]} == before


@pytest.mark.slow
def test_a_corrected_run_goes_on_where_the_first_one_failed(cache, corpus, tmp_path):
    files = [corpus / "raw_web" / f"train-0000{index}.jsonl.gz" for index in (0, 1)]
    whole = [file.read_bytes() for file in files]
    bad = gzip.compress(b'{"id": "x", "text": null}\n' * 120)
    for file, rows in zip(files, whole, strict=True):
        file.write_bytes(rows + bad)
    with pytest.raises(ValueError, match=r"train-0000[01].jsonl.gz: 120 of .* rows are malformed, more than 100 rows"):
        cache("harm_tagged_web")
    for file, rows in zip(files, whole, strict=True):
        file.write_bytes(rows)
    files[1].write_bytes(whole[1] + bad)
    with pytest.raises(ValueError, match=r"train-00001.jsonl.gz: 120 of"):
        cache("harm_tagged_web", seed=3)  # nothing was done: other settings and files are as good
    files[1].write_bytes(whole[1])
    with pytest.raises(ValueError, match="begun with seed 3, now it is 0"):
        cache("harm_tagged_web")
    store = cache("harm_tagged_web", seed=3) / "harm_tagged_web" / "train"
    expected = cache("harm_tagged_web", seed=3, output=tmp_path / "fresh") / "harm_tagged_web" / "train"
    assert contents(store) == contents(expected)


@pytest.mark.slow
def test_killed_in_the_middle_nothing_looks_whole_and_the_next_run_continues(cache, tokenizer, tmp_path):
    data = tmp_path / "large"
    write_corpus(data, "raw_web", shards=12, count=12 * 300, words=200)
    flags = {"data_dir": data, "splits": "train"}
    cache("raw_web", **flags, output=tmp_path / "whole")
    whole = contents(tmp_path / "whole" / "raw_web" / "train")

    command = [sys.executable, "-m", "safelm.cache_tasks", "--tasks=raw_web", f"--tokenizer={tokenizer}", "--workers=2"]
    command += [f"--output={tmp_path / 'tokens'}", f"--data_dir={data}", "--splits=train"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    store = tmp_path / "tokens" / "raw_web" / "train"
    deadline = time.monotonic() + 500
    while not list(store.glob("shard-*.json")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    wait_for_the_session_to_end(process.pid)  # the workers notice
    done = write_times_of_finished(store)
    assert 0 < len(list(store.glob("shard-*.json"))) < 12 and done and not (store / "manifest.json").exists()
    with pytest.raises(FileNotFoundError, match="caching it did not finish"):
        TokenStore.open(store)

    cache("raw_web", **flags)
    assert contents(store) == whole
    assert {name: when for name, when in write_times(store).items() if name in done} == done


def wait_for_the_session_to_end(session):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            os.killpg(session, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    raise AssertionError("workers outlive a killed parent")


def write_times_of_finished(store):
    finished = {path.stem.removeprefix("shard") for path in store.glob("shard-*.json")}
    return {name: when for name, when in write_times(store).items() if name[6:-4] in finished}


def test_a_full_disk_is_one_clear_error_and_the_next_run_finishes(cache, tmp_path, monkeypatch):
    store = tmp_path / "tokens" / "raw_web" / "train"

    def fill_the_disk(writer):
        (store / "tokens-00001-of-00002.npy.tmp").unlink(missing_ok=True)
        (store / "tokens-00001-of-00002.npy.tmp").symlink_to("/dev/full")  # every write there fails as on a full disk

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "_remove_former", fill_the_disk)
        with pytest.raises(OSError, match="cannot write token shard: No space left on device; free some space and run"):
            cache("raw_web")
    names = {path.name for path in store.iterdir()}
    assert "tokens-00000-of-00002.npy" in names and "manifest.json" not in names
    assert not {name for name in names if "00001" in name or name.endswith(".tmp")}
    cache("raw_web")
    assert documents(TokenStore.open(store)) == seqio_ids("safelm_raw_web")


def test_malformed_rows_are_kept_and_counted_and_too_many_stop(cache, corpus, tmp_path, caplog):
    good = gzip.decompress((corpus / "raw_web" / "train-00000.jsonl.gz").read_bytes())
    file = corpus / "raw_web" / "train-00000.jsonl.gz"
    file.write_bytes(gzip.compress(b'{"id": "x", "text": "SECRET"\n' * 3 + good))
    manifest = TokenStore.open(cache("raw_web") / "raw_web" / "train").manifest
    assert manifest.num_quarantined == 3 and manifest.num_documents == 40 and manifest.extra["num_rows"] == 43
    kept = tmp_path / "tokens" / "quarantine" / "raw_web" / "train" / "train-00000.jsonl.gz.malformed"
    assert [json.loads(line)["row"] for line in kept.read_text().splitlines()] == [1, 2, 3]
    assert "3 of 23 rows are malformed" in caplog.text and "SECRET" not in caplog.text
    with pytest.raises(ValueError, match=r"train-00000\.jsonl\.gz: 3 of 23 rows are malformed, more than 2"):
        cache("raw_web", output=tmp_path / "strict", max_malformed_rows=2)
    assert not (tmp_path / "strict" / "raw_web" / "train" / "manifest.json").exists()
    side_files.assert_only_documents("cache_tasks", tmp_path, corpus)


def test_on_beam_the_same_bytes_and_the_same_errors(cache, corpus, tmp_path, caplog):
    file = corpus / "raw_web" / "train-00001.jsonl.gz"
    file.write_bytes(gzip.compress(b'{"id": "x", "text": "SECRET"\n' * 3) + file.read_bytes())
    cache("raw_web,refuseweb")
    beam = {"output": tmp_path / "beam", "runner": "local", "workers": 1}
    with pytest.raises(ValueError, match=r"train-00001\.jsonl\.gz: 3 of .* more than 2 .*finished shards are kept"):
        cache("raw_web", **beam, max_malformed_rows=2)
    shards = sorted((tmp_path / "beam" / "raw_web").rglob("shard-*.json"))
    assert [path.name for path in shards] == ["shard-00000-of-00002.json", "shard-00000-of-00001.json"]
    times = write_times(tmp_path / "beam" / "raw_web" / "train")
    cache("raw_web,refuseweb", **beam)
    assert contents(tmp_path / "beam") == contents(tmp_path / "tokens")
    assert times.items() <= write_times(tmp_path / "beam" / "raw_web" / "train").items()
    assert "SECRET" not in caplog.text
    with pytest.raises(ValueError, match="--flink_master"):
        cache("raw_web", output=tmp_path / "flink", runner="flink")
    with pytest.raises(ValueError, match="loses records"):
        cache("raw_web", **beam | {"runner": "dask"})


def test_lost_bytes_and_removed_tags_are_in_the_manifest(cache, tmp_path, monkeypatch):
    folder = tmp_path / "odd" / "raw_web"
    folder.mkdir(parents=True)
    rows = [{"id": "1", "text": "a<potentially_unsafe_content> b", "harm_score": 0}, {"id": "2", "text": "four"}]
    (folder / "train-0.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setattr(Tokenizer, "count_lost_bytes", lambda self, text: text.count("f"))
    manifest = TokenStore.open(cache("raw_web", data_dir=tmp_path / "odd") / "raw_web" / "train").manifest
    assert (manifest.num_lost_bytes, manifest.extra["num_removed_tags"], manifest.num_tag_tokens) == (1, 1, 0)
    assert not (tmp_path / "tokens" / "raw_web" / "validation" / "manifest.json").exists()  # no id is held out


def test_an_input_that_is_edited_in_place_is_noticed_and_a_copy_is_not(cache, corpus, tmp_path):
    path = tmp_path / "odd" / "raw_web" / "train-0.jsonl"
    path.parent.mkdir(parents=True)
    lines = [json.dumps({"id": str(i), "text": f"page {i:06d} " + "word " * 20}) + "\n" for i in range(2000)]
    path.write_text("".join(lines))
    run = functools.partial(cache, "raw_web", data_dir=tmp_path / "odd", splits="train")
    store = run() / "raw_web" / "train"
    os.utime(path, (1, 1))
    before = write_times(store)
    run()
    assert write_times(store) == before
    lines[1000] = lines[1000].replace("word", "text")  # of the same length, far from both ends
    path.write_text("".join(lines))
    with pytest.raises(ValueError, match=r"train-0\.jsonl: it was changed after it was cached in .*raw_web/train"):
        run()


def test_harm_is_only_read_from_a_column_that_says_so_and_a_run_that_made_nothing_binds_nobody(
    cache, corpus, tmp_path, caplog
):
    caplog.set_level(logging.INFO)
    path = tmp_path / "edu" / "raw_web" / "train-0.jsonl"
    path.parent.mkdir(parents=True)
    rows = [{"text": f"page {i}", "score": i + 0.1, "int_score": i} for i in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = functools.partial(cache, "harm_tagged_web", data_dir=tmp_path / "edu", splits="train", validation_fraction=0)
    with pytest.raises(ValueError, match=r"missing column 'harm score'.*'int_score' is not taken for harm"):
        run()
    manifest = TokenStore.open(run(score_column="int_score") / "harm_tagged_web" / "train").manifest
    assert manifest.num_documents == 2 and manifest.extra["score_columns"] == {"int_score": 6}
    assert manifest.extra["settings"]["score_column"] == "int_score"
    assert "harm scores were read from int_score (6 rows)" in caplog.text
    with pytest.raises(ValueError, match="begun with score_column int_score"):
        run(score_column="score")


def test_a_corpus_in_a_place_of_its_own_needs_no_data_dir(cache, corpus, tmp_path):
    stores = [TokenStore.open(cache("raw_web") / "raw_web" / "train")]
    alone = {"data_dir": None, "corpus": f"raw_web={corpus}/raw_web", "output": tmp_path / "alone"}
    cache("raw_web", **alone)
    stores.append(TokenStore.open(tmp_path / "alone" / "raw_web" / "train"))
    assert documents(stores[0]) == documents(stores[1])


def test_inputs_without_documents(cache, corpus, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"empty corpus: no file matches .*/nowhere/raw_web/\*\*/train-\*"):
        cache("raw_web", data_dir=tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no file matches \(no --data_dir given\)/safeweb/"):
        cache("safeweb", data_dir=None, corpus=f"raw_web={corpus}/raw_web")
    folder = tmp_path / "safe" / "raw_web"
    folder.mkdir(parents=True)
    (folder / "train-0.jsonl").write_text('{"id": "1", "text": "safe", "harm_score": 0}\n')
    with pytest.raises(
        ValueError, match="empty corpus: task safelm_harm_tagged_web keeps none of 1 rows of split 'train'"
    ):
        cache("harm_tagged_web", data_dir=tmp_path / "safe")
    (folder / "train-0.jsonl").write_text('{"id": "1", "body": "safe", "harm_score": 0}\n')
    with pytest.raises(ValueError, match=r"train-0\.jsonl: missing column 'text'; it has body, harm_score, id"):
        cache("raw_web", data_dir=tmp_path / "safe", output=tmp_path / "b")
    (folder / "train-0.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"empty corpus: .* has no usable row in 1 files"):
        cache("raw_web", data_dir=tmp_path / "safe", output=tmp_path / "c")


@pytest.mark.parametrize(
    ("tasks", "flags", "message"),
    [
        ("raw_wbe", {}, "--tasks: no task or mixture 'raw_wbe'; there are raw_web, filtered_web"),
        (",", {}, "--tasks names nothing: ','"),
        ("raw_web", {"module": "no.such.module"}, "--module: no module named 'no.such.module'"),
        ("raw_web", {"module": "json"}, "--tasks: no task or mixture 'raw_web'; there are"),
        ("raw_web", {"corpus": "raw_web"}, "--corpus must be NAME=PLACE, got 'raw_web'"),
        ("raw_web", {"corpus": "web=x"}, "unknown corpus 'web'"),
        ("raw_web", {"output": "hf://tokens"}, "--output hf://tokens: must be a local folder or gs://"),
        ("raw_web", {"workers": -1}, "--workers must be 0 .* got -1"),
        ("raw_web", {"tag_rate": 7}, "tag_rate must be from 0 to 1, got 7.0"),
        ("raw_web", {"tokenizer": "no/tokenizer"}, "no/tokenizer: no such tokenizer"),
        ("raw_web", {"splits": "test"}, "no task has one of these splits"),
    ],
)
def test_bad_flags(cache, tasks, flags, message):
    for name in list(seqio.TaskRegistry.names()):
        seqio.TaskRegistry.remove(name)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        cache(tasks, **flags)


def test_only_one_process_writes_a_store(cache, tmp_path):
    with cache_tasks._only_writer(str(tmp_path / "tokens" / "raw_web" / "train")):
        with pytest.raises(ValueError, match="raw_web/train: another process is writing this token store"):
            cache("raw_web")


def test_documents_of_any_module_must_end_in_the_end_token(cache, tokenizer, tmp_path):
    cache("raw_web")
    task = seqio.TaskRegistry.get("safelm_raw_web")
    steps = [*task.preprocessors, lambda dataset: dataset.map(lambda e: {**e, "targets": e["targets"][:-1]})]
    seqio.TaskRegistry.remove("other")
    seqio.TaskRegistry.add("other", source=task.source, preprocessors=steps, output_features=task.output_features)
    with pytest.raises(ValueError, match="task other: a document's targets don't end in eos_id 0"):
        cache("other")


def test_a_features_numbers_go_into_the_channel_of_its_name_and_bad_ones_are_named(cache, corpus):
    cache("raw_web")
    task = seqio.TaskRegistry.get("safelm_raw_web")

    def add_with(last):
        def weigh(example):
            ones = tf.ones_like(example["targets"], tf.float32)
            is_chosen = example["id"] == b"raw_web-3"
            return {**example, "loss_weight": ones * 0.25 + tf.where(is_chosen, last, 0.0)}

        seqio.TaskRegistry.remove("weighted")
        steps = [*task.preprocessors, lambda dataset: dataset.map(weigh)]
        options = {"source": task.source, "preprocessors": steps, "output_features": task.output_features}
        seqio.TaskRegistry.add("weighted", **options)

    add_with(np.nan)
    named = r"train-00001.*, id raw_web-3: .*document 1 has .*loss_weight\[0\] is nan, must be a finite"
    with pytest.raises(ValueError, match=named):
        cache("weighted")
    add_with(-0.25)
    store = TokenStore.open(cache("weighted") / "weighted" / "train", verify_checksums=True)
    weights = store.channel("loss_weight")
    assert set(weights.tolist()) == {0.0, 0.25} and store.manifest.extra["num_loss_tokens"] == (weights > 0).sum()
    assert [shard.channels[0].values for shard in store.manifest.shards] == [(0.25,), (0.25, 0.0)]


def test_errors_inside_tensorflow_become_clear_ones():
    def clear(message):
        return repr(cache_shards._clear_error(RuntimeError(message)))

    assert clear("{{function_node x}} ValueError: a: b\nTraceback\nValueError: c") == "ValueError('a: b')"
    assert clear("FileNotFoundError: gone\n") == "FileNotFoundError('gone')"
    assert clear("OSError: [Errno 28] No space left\n") == "OSError('[Errno 28] No space left')"
    assert clear("KeyError: 'x'\n").startswith("RuntimeError") and clear("what").startswith("RuntimeError")
