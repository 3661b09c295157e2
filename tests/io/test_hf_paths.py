"""Documents, token stores and tokenizers at `hf://`, read by huggingface_hub's own file system from a hub on loopback.

Not covered: logging in, and Xet, which huggingface_hub uses for whole-file downloads only.
"""

import gzip
import json

import fsspec
import huggingface_hub
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tiny_runs
from token_stores import numbered_documents, write_store

from safelm import documents as safety_documents
from safelm import train_tokenizer
from safelm.data.store import TokenStore
from safelm.text.tokenizer import Tokenizer

REPO = "hf://datasets/someone/web"


def make_rows(count, first=0):
    return [
        {"id": f"d{i}", "text": f"Document {i} of the web.", "metadata": {"harm_score": i % 6}}
        for i in range(first, first + count)
    ]


def json_lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write_corpus(folder, rows):
    (folder / "part").mkdir(parents=True)
    (folder / "train-00000.jsonl.gz").write_bytes(gzip.compress(json_lines(rows[:20])))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[20:]), folder / "part" / "train-00001.parquet")
    return folder


def read(path):
    from data_tasks.readers import MalformedLimit, ReadReport, read_documents

    return list(read_documents(path, needs_score=True, limit=MalformedLimit(), report=ReadReport()))


def test_fsspec_takes_the_hubs_own_file_system(hub):
    filesystem, inner = fsspec.core.url_to_fs(f"{REPO}/a/b.jsonl")
    assert type(filesystem) is huggingface_hub.HfFileSystem and filesystem.endpoint == hub.url
    assert inner == "datasets/someone/web/a/b.jsonl"


def test_files_of_a_branch_and_a_tag(hub, tmp_path):
    hub.add("someone/web", write_corpus(tmp_path / "new", make_rows(30)))
    hub.add("someone/web", write_corpus(tmp_path / "old", make_rows(30, first=500)), revision="v1")
    for at, first in (("", 0), ("@v1", 500)):
        documents = read(f"{REPO}{at}/train-00000.jsonl.gz") + read(f"{REPO}{at}/part/train-00001.parquet")
        assert [document.id for document in documents] == [f"d{first + i}" for i in range(30)]
        assert [document.harm_score for document in documents] == [(first + i) % 6 for i in range(30)]
    for missing in (f"{REPO}/train-00007.jsonl.gz", "hf://datasets/someone/nothing/train-00000.jsonl.gz"):
        with pytest.raises(FileNotFoundError, match=missing.removeprefix("hf://")):
            read(missing)


def test_a_refused_file_is_named_with_the_hubs_reason(hub, tmp_path):
    hub.add("someone/web", write_corpus(tmp_path, make_rows(30)))
    hub.refused = {"train-00000.jsonl.gz", "part/train-00001.parquet"}
    for name in hub.refused:
        with pytest.raises(OSError, match=rf"^{REPO}/{name}: (.|\n)*ask for access"):
            read(f"{REPO}/{name}")
        with pytest.raises(OSError, match=rf"^{REPO}/{name}: (.|\n)*ask for access"):
            train_tokenizer.train_tokenizer([f"{REPO}/{name}"], text_column="text", vocab_size=280)


def test_a_file_larger_than_one_request(hub, tmp_path):
    rng = np.random.default_rng(0)
    rows = [row | {"text": rng.bytes(150_000).hex()} for row in make_rows(50)]
    (tmp_path / "train-0.jsonl.gz").write_bytes(gzip.compress(json_lines(rows), 1))
    assert (tmp_path / "train-0.jsonl.gz").stat().st_size > fsspec.spec.AbstractBufferedFile.DEFAULT_BLOCK_SIZE
    hub.add("someone/web", tmp_path)
    assert [document.text for document in read(f"{REPO}/train-0.jsonl.gz")] == [row["text"] for row in rows]
    assert hub.asked.count("/datasets/someone/web/resolve/main/train-0.jsonl.gz") > 1


@pytest.mark.parametrize("at", ["", "@v1"])
def test_a_source_lists_and_reads_a_repository(hub, tmp_path, at):
    from data_tasks.sources import WebDocumentSource

    rows = make_rows(30)
    revision = at.removeprefix("@") or "main"
    hub.add("someone/web", write_corpus(tmp_path / "corpus", rows), at="data/", revision=revision)
    source = WebDocumentSource(f"{REPO}{at}/data", needs_score=True, validation_fraction=0.0)
    folder = f"{REPO}{at}/data"
    assert sorted(source.list_shards("train")) == [
        f"{folder}/part/train-00001.parquet",
        f"{folder}/train-00000.jsonl.gz",
    ]
    examples = source.get_dataset("train", shuffle=False).as_numpy_iterator()
    found = {example["id"].decode(): (example["text"].decode(), example["harm_score"]) for example in examples}
    assert found == {row["id"]: (row["text"], row["metadata"]["harm_score"]) for row in rows}
    with pytest.raises(FileNotFoundError, match="empty corpus: no file matches hf://datasets/someone/web"):
        WebDocumentSource(f"{REPO}{at}/other").list_shards("train")
    with pytest.raises(FileNotFoundError, match="someone/nothing"):
        WebDocumentSource("hf://datasets/someone/nothing").list_shards("train")


def test_tokenizer_of_a_model_repository(hub, tmp_path):
    tiny_runs.tokenizer().save(str(tmp_path))
    hub.add("someone/model", tmp_path, kind="models")
    for path in ("hf://someone/model", "hf://someone/model/tokenizer.json"):
        assert Tokenizer.from_pretrained(path).hash == tiny_runs.tokenizer().hash
    with pytest.raises(FileNotFoundError, match="hf://someone/nothing: no such tokenizer"):
        Tokenizer.from_pretrained("hf://someone/nothing")


def test_training_a_tokenizer_from_a_repository(hub, tmp_path):
    hub.add("someone/web", write_corpus(tmp_path, make_rows(30)), at="data/")
    patterns = [f"{REPO}/data/*.jsonl.gz", f"{REPO}/data/**/*.parquet"]
    tokenizer, counts = train_tokenizer.train_tokenizer(patterns, text_column="text", vocab_size=280)
    assert counts.documents == 30 and counts.malformed == 0
    assert tokenizer.hash == Tokenizer.train([row["text"] for row in make_rows(30)], 280).hash


def test_token_store_of_a_repository(hub, tmp_path):
    local = write_store(tmp_path / "store", numbered_documents([5, 40, 7]), num_shards=2)
    hub.add("someone/tokens", tmp_path / "store", at="train/")
    store = TokenStore.open("hf://datasets/someone/tokens/train", verify_checksums=True)
    assert store.directory.startswith(str(tmp_path / "cache"))
    assert store.tokens(0, 100).tolist() == local.tokens(0, 100).tolist()


def test_documents_of_a_hub_folder_are_found_described_and_read(hub, tmp_path):
    for name in ("train-0.jsonl", "sub/train-1.parquet", "README.md"):
        (tmp_path / "web" / name).parent.mkdir(parents=True, exist_ok=True)
    rows = [{"id": str(i), "text": f"Document {i}."} for i in range(20)]
    (tmp_path / "web/train-0.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "web/sub/train-1.parquet")
    (tmp_path / "web/README.md").write_text("about it")
    hub.add("someone/web", tmp_path / "web")
    files = [f"{REPO}/sub/train-1.parquet", f"{REPO}/train-0.jsonl"]
    assert safety_documents.list_files(REPO) == files
    assert safety_documents.list_files(f"{REPO}/*.jsonl") == files[1:]
    for file in safety_documents.find(REPO):
        assert file.bytes == (tmp_path / "web" / file.path.removeprefix(f"{REPO}/")).stat().st_size
        assert safety_documents.describe(file).keys() == {
            "path",
            "bytes",
            "version" if file.version else "sample_sha256",
        }
        assert [row for _, row in safety_documents.read_rows(file.path)] == rows
