"""What SafeLM reads and writes on `gs://`, against fake-gcs-server on this machine's loopback (extra `dev`).

Left out: TensorFlow's own `gs://` (it knows no endpoint but the real one, and SafeLM doesn't use it), logging in, and
what real Cloud Storage adds: buckets with hierarchical namespaces. Slow and failing servers: test_gcs_faults.py.
"""

import dataclasses
import gzip
import json
import pickle
import signal

import fsspec
import gcs_server
import gcsfs.core
import jax
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tiny_runs
from gcs_server import names, upload
from safetensors import numpy as safetensors
from token_stores import numbered_documents, write_store

from safelm import convert, train_tokenizer
from safelm.checkpoints import checkpoint
from safelm.data.store import TokenStore
from safelm.io import cache, records, remote
from safelm.models import decoder as model
from safelm.models import lora
from safelm.models.config import Lora, ModelConfig
from safelm.text.tokenizer import Tokenizer
from safelm.train.run import train

SECONDS_EACH = 180


@pytest.fixture(scope="module")
def bucket():
    """A bucket's URL; every client in this process talks to the server behind it, and never to the network."""
    with gcs_server.emulator() as endpoint, gcs_server.clients_at(endpoint):
        yield f"gs://{gcs_server.BUCKET}"


@pytest.fixture(autouse=True)
def bounded():
    """A client that waits or retries for long fails its test."""

    def stop(*_):
        raise TimeoutError(f"took more than {SECONDS_EACH} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS_EACH)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv(cache.CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def make_rows(count, first=0):
    return [
        {"id": f"d{i}", "text": f"Document {i} of the web.", "metadata": {"url": "u", "harm_score": i % 6}}
        for i in range(first, first + count)
    ]


def write_parquet(path, rows):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def json_lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def read(path, **kwargs):
    from data_tasks.readers import MalformedLimit, ReadReport, read_documents

    options = {"needs_score": True, "limit": MalformedLimit(), "report": ReadReport()} | kwargs
    return [(document.id, document.text, document.harm_score) for document in read_documents(path, **options)]


def as_documents(rows):
    return [(row["id"], row["text"], row["metadata"]["harm_score"]) for row in rows]


def assert_equal_trees(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True):
        assert x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_documents_of_every_format(bucket, tmp_path):
    rows = make_rows(700)
    (tmp_path / "a.jsonl").write_bytes(json_lines(rows))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(json_lines(rows)))
    write_parquet(tmp_path / "a.parquet", rows)
    upload(tmp_path, f"{bucket}/formats")
    for name in ("a.jsonl", "a.jsonl.gz", "a.parquet"):
        assert read(f"{bucket}/formats/{name}") == as_documents(rows)


def test_a_file_larger_than_one_request(bucket, tmp_path):
    block = gcsfs.core.GCSFileSystem.default_block_size
    rng = np.random.default_rng(0)
    rows = [row | {"text": rng.bytes(100_000).hex()} for row in make_rows(60)]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(json_lines(rows), 1))
    write_parquet(tmp_path / "a.parquet", rows)
    upload(tmp_path, f"{bucket}/large")
    for name in ("a.jsonl.gz", "a.parquet"):
        assert (tmp_path / name).stat().st_size > block
        assert read(f"{bucket}/large/{name}") == as_documents(rows)


def test_bad_remote_files_name_their_url(bucket, tmp_path):
    from data_tasks.readers import ReadReport

    rows = make_rows(2000)
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(json_lines(rows))[:-2000])
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 but no more")
    lines = json_lines(rows).replace(b'{"id": "d7",', b'{"id": "d7"')
    (tmp_path / "row.jsonl").write_bytes(lines)
    upload(tmp_path, f"{bucket}/bad")
    for name in ("cut.jsonl.gz", "cut.parquet"):
        with pytest.raises(ValueError, match=f"^{bucket}/bad/{name}: .*damaged or cut short"):
            read(f"{bucket}/bad/{name}")
    with pytest.raises(FileNotFoundError):
        read(f"{bucket}/bad/none.jsonl.gz")
    report, kept = ReadReport(), tmp_path / "kept"
    assert len(read(f"{bucket}/bad/row.jsonl", report=report, quarantine=str(kept))) == 1999
    assert report.malformed == 1 and json.loads(kept.read_text())["file"] == f"{bucket}/bad/row.jsonl"


def test_a_seqio_task_and_its_tokenizer(bucket, tmp_path):
    import seqio

    from data_tasks import tasks

    rows, held_out = make_rows(30), make_rows(5, first=100)
    folder = tmp_path / "raw_web"
    (folder / "part").mkdir(parents=True)
    (folder / "train-00000.jsonl.gz").write_bytes(gzip.compress(json_lines(rows[:20])))
    write_parquet(folder / "part" / "train-00001.parquet", rows[20:])
    (folder / "validation-00000.jsonl").write_bytes(json_lines(held_out))
    upload(tmp_path, f"{bucket}/corpus")
    trained = Tokenizer.train([row["text"] for row in rows], 300)
    trained.save(f"{bucket}/task_tokenizer")
    tasks.register(f"{bucket}/corpus", f"{bucket}/task_tokenizer", prefix="gcs")
    task = seqio.get_mixture_or_task("gcs_raw_web")
    assert sorted(task.source.list_shards("train")) == [
        f"{bucket}/corpus/raw_web/part/train-00001.parquet",
        f"{bucket}/corpus/raw_web/train-00000.jsonl.gz",
    ]
    for split, wanted in (("train", rows[20:] + rows[:20]), ("validation", held_out)):
        found = task.get_dataset(split=split, shuffle=False).as_numpy_iterator()
        assert [example["targets"].tolist() for example in found] == [
            [*trained.encode(row["text"]), trained.eos_id] for row in wanted
        ]
    with pytest.raises(FileNotFoundError, match=f"empty corpus: no file matches {bucket}/corpus/safeweb"):
        seqio.get_mixture_or_task("gcs_safeweb").source.list_shards("train")


def test_tokenizer(bucket):
    trained, url = tiny_runs.tokenizer(), f"{bucket}/tokenizer"
    trained.save(url)
    assert names(url) == ["generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    for path in (url, f"{url}/", f"{url}/tokenizer.json"):
        assert Tokenizer.from_pretrained(path).hash == trained.hash
    other = Tokenizer.train(["quite another text, quite another vocabulary"] * 3, 280)
    other.save(url)
    assert Tokenizer.from_pretrained(url).hash == other.hash != trained.hash
    with pytest.raises(FileNotFoundError, match=f"{bucket}/nothing: no such tokenizer"):
        Tokenizer.from_pretrained(f"{bucket}/nothing")
    fsspec.open(f"{bucket}/other/file", "wb").open().close()
    with pytest.raises(FileNotFoundError, match=f"{bucket}/other: the folder has no tokenizer.json"):
        Tokenizer.from_pretrained(f"{bucket}/other")


def test_training_a_tokenizer_from_remote_files(bucket, tmp_path):
    rows = make_rows(50)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(json_lines(rows)))
    upload(tmp_path, f"{bucket}/words")
    hashes = []
    for folder in (f"{bucket}/words", str(tmp_path)):
        flags = ["--input", f"{folder}/*.jsonl.gz", "--vocab_size", "280", "--output", f"{folder}/tokenizer"]
        train_tokenizer.main(train_tokenizer.parser().parse_args(flags))
        hashes.append(Tokenizer.from_pretrained(f"{folder}/tokenizer").hash)
    assert hashes[0] == hashes[1]


def test_token_store_comes_to_the_cache_once(bucket, tmp_path, cache_folder, monkeypatch):
    documents, url = numbered_documents([5, 40, 7, 30, 9]), f"{bucket}/tokens/raw_web/train"
    local = write_store(tmp_path / "store", documents, num_shards=3)
    upload(tmp_path / "store", url)
    store = TokenStore.open(url, vocab_hash=local.manifest.vocab_hash, verify_checksums=True)
    assert store.directory.startswith(str(cache_folder)) and store.manifest == local.manifest
    for index, document in enumerate(documents):
        assert store.document(index).tolist() == document.tolist()
    assert pickle.loads(pickle.dumps(store)).tokens(0, 100).tolist() == local.tokens(0, 100).tolist()

    monkeypatch.setattr(remote, "download", lambda *_: pytest.fail("fetched again"))
    assert TokenStore.open(f"{url}/").directory == store.directory
    monkeypatch.undo()


def test_token_stores_that_are_not_whole(bucket, tmp_path, cache_folder):
    write_store(tmp_path / "store", numbered_documents([5, 40]), num_shards=2)
    (tokens,) = (tmp_path / "store").glob("tokens-00001-*")
    (manifest,) = (tmp_path / "store").glob("manifest.json")
    whole, text = tokens.read_bytes(), manifest.read_text()
    tokens.write_bytes(whole[:-2])
    upload(tmp_path / "store", f"{bucket}/cut")
    with pytest.raises(ValueError, match=f"^{bucket}/cut/{tokens.name}: truncated or replaced"):
        TokenStore.open(f"{bucket}/cut")
    tokens.unlink()
    upload(tmp_path / "store", f"{bucket}/gone")
    with pytest.raises(FileNotFoundError, match=f"^{bucket}/gone/{tokens.name}: shard is missing"):
        TokenStore.open(f"{bucket}/gone")
    manifest.unlink()
    upload(tmp_path / "store", f"{bucket}/unfinished")
    with pytest.raises(FileNotFoundError, match=f"^{bucket}/unfinished/manifest.json: no such file"):
        TokenStore.open(f"{bucket}/unfinished")

    tokens.write_bytes(whole)  # what came before the failure is kept, the rest is fetched by the next try
    manifest.write_text(text)
    upload(tmp_path / "store", f"{bucket}/cut")
    assert TokenStore.open(f"{bucket}/cut", verify_checksums=True).num_documents == 2
    assert not list(cache_folder.rglob("*.tmp-*"))


def test_checkpoint_for_inference(bucket):
    config, url = ModelConfig(**tiny_runs.model_fields()), f"{bucket}/model"
    params = model.init(config, jax.random.key(0))
    checkpoint.save_params(url, config, params, tiny_runs.tokenizer())
    found_config, found, tokenizer = checkpoint.load_for_inference(url)
    assert found_config == config and tokenizer.hash == tiny_runs.tokenizer().hash
    assert_equal_trees(found, params)
    with pytest.raises(FileExistsError, match=f"{url} already holds a checkpoint"):
        checkpoint.save_params(url, config, params, tiny_runs.tokenizer())
    with pytest.raises(FileNotFoundError, match=f"no checkpoint at {bucket}/nothing"):
        checkpoint.load_for_inference(f"{bucket}/nothing")
    with pytest.raises(FileNotFoundError, match="step=3: no such checkpoint"):
        checkpoint.load_for_inference(url, step=3)


def test_a_checkpoint_that_another_host_writes_is_seen(bucket):
    url, config = f"{bucket}/shared", ModelConfig(**tiny_runs.model_fields())
    checkpoint.save_params(url, config, model.init(config, jax.random.key(0)), tiny_runs.tokenizer())
    with checkpoint.Checkpoints(url, read_only=True) as checkpoints:
        assert checkpoints.steps() == [0]
        other_host = gcsfs.core.GCSFileSystem(skip_instance_cache=True)
        folder = url.removeprefix("gs://") + "/checkpoints"
        for path in other_host.find(f"{folder}/0"):
            other_host.pipe_file(path.replace(f"{folder}/0/", f"{folder}/7/"), other_host.cat_file(path))
        checkpoints.reload()
        assert checkpoints.steps() == [0, 7]


def test_a_run_on_gs_resumes_and_is_the_local_run_bit_for_bit(bucket, tmp_path):
    inputs, url = tiny_runs.write_inputs(tmp_path / "inputs"), f"{bucket}/run"
    upload(inputs, f"{bucket}/inputs")
    config = tiny_runs.tiny_config(inputs, **{"model.num_layers": 1})
    train(config, str(tmp_path / "local"))
    config.tokenizer, config.data.root = f"{bucket}/inputs/tokenizer", f"{bucket}/inputs/tokens"
    train(config, url)
    entries = {name.split("/")[0] for name in names(url)}
    files = {"config.json", "events.jsonl", "manifest.json", "metrics.jsonl", "progress.json"}
    assert entries == files | {"checkpoints", "tensorboard", "tokenizer"}

    filesystem, inner = fsspec.core.url_to_fs(url)
    filesystem.rm(f"{inner}/checkpoints/6", recursive=True)
    train(config, url)
    lines = [json.loads(line) for line in filesystem.cat_file(f"{inner}/metrics.jsonl").splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    with checkpoint.Checkpoints(url, read_only=True) as checkpoints:
        assert checkpoints.steps() == [3, 6]
    (remote_params, local_params) = (checkpoint.load_for_inference(run)[1] for run in (url, str(tmp_path / "local")))
    assert_equal_trees(remote_params, local_params)


def test_adapters_of_a_run_in_a_bucket_are_converted_and_merged(bucket, tmp_path):
    tokenizer = tiny_runs.tokenizer()
    base = ModelConfig(**tiny_runs.model_fields())
    adapted = dataclasses.replace(base, lora=Lora(2, 4.0, ["query", "value"]))
    params = model.init(adapted, jax.random.key(0))
    for folder in (str(tmp_path / "run"), f"{bucket}/adapted"):
        checkpoint.save_params(folder, adapted, params, tokenizer)
        records.write(f"{folder}/config.json", {"init_checkpoint": ""})
    checkpoint.save_params(str(tmp_path / "base"), base, lora.split(adapted, params)[1], tokenizer)
    for place, source in (("here", str(tmp_path / "run")), ("there", f"{bucket}/adapted")):
        convert.convert(source, str(tmp_path / place / "peft"), to="peft")
        convert.convert(str(tmp_path / "base"), str(tmp_path / place / "merged"), adapter=source)
    for name in ("peft/adapter_model.safetensors", "merged/model.safetensors"):
        here, there = (safetensors.load_file(tmp_path / place / name) for place in ("here", "there"))
        assert_equal_trees(here, there)
    records.write(f"{bucket}/adapted/config.json", {"init_checkpoint": "hf:org/name"})
    assert records.read(f"{bucket}/adapted/config.json", "") == {"init_checkpoint": "hf:org/name"}
    with pytest.raises(FileNotFoundError, match=f"^--adapter=no checkpoint at {bucket}/none: "):
        convert.convert(str(tmp_path / "base"), str(tmp_path / "no"), adapter=f"{bucket}/none")
