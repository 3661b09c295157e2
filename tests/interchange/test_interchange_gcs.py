"""Token stores in a bucket, from and to other programs' files: a target is there as a whole or not at all."""

import json

import fsspec
import gcs_server
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tiny_runs
import token_files as plain

from safelm import convert_tokens
from safelm.data.store import TokenStore
from safelm.io import remote


def convert(*flags):
    convert_tokens.main(convert_tokens.arguments().parse_args([str(flag) for flag in flags]))


def test_a_store_goes_into_a_bucket_and_out_of_it_as_it_was(tmp_path, monkeypatch):
    """Windows with a sidecar; an upload that breaks off leaves no store, and the next try makes it."""
    monkeypatch.setenv("SAFELM_CACHE", str(tmp_path / "cache"))
    tokenizer = tiny_runs.tokenizer()
    tokenizer.save(str(tmp_path / "tokenizer"))
    windows = np.random.default_rng(0).integers(10, tokenizer.vocab_size - 10, (23, 9))
    windows[:, -1] = tokenizer.eos_id
    (tmp_path / "in").mkdir()
    plain.write_megatron(tmp_path / "in/web", [row.tolist() for row in windows])
    table = pyarrow.table({"source": [f"page {at}" for at in range(len(windows))]})
    pyarrow.parquet.write_table(table, tmp_path / "in/sidecar.parquet")
    source = [f"--source={tmp_path}/in/web.idx", "--unit=window", f"--tokenizer={tmp_path}/tokenizer"]
    source += ["--shard_tokens=90"]
    with gcs_server.emulator() as endpoint, gcs_server.clients_at(endpoint):
        url = f"gs://{gcs_server.BUCKET}/tokens/web/train"
        real, sent = remote.upload, []

        def breaks_off(local, target):
            sent.append(target)
            if len(sent) == 4:
                raise OSError(f"{target}: can't write")
            real(local, target)

        monkeypatch.setattr(remote, "upload", breaks_off)
        with pytest.raises(OSError, match="can't write"):
            convert(*source, f"--target={url}")
        there = gcs_server.names(url)
        assert there and "manifest.json" not in there
        monkeypatch.setattr(remote, "upload", lambda local, target: (sent.append(target), real(local, target))[1])
        convert(*source, f"--target={url}")
        assert sent[-1] == f"{url}/manifest.json" and set(there) <= set(gcs_server.names(url))
        with pytest.raises(FileExistsError, match=r"--target=gs://.*: exists already"):
            convert(*source, f"--target={url}")
        store = TokenStore.open(url)
        assert (store.manifest.task, store.manifest.split, store.num_documents) == ("web", "train", len(windows))
        for kind in ("megatron", "datatrove", "datasets"):
            convert(f"--source={url}", f"--to={kind}", f"--target={tmp_path}/{kind}")
        convert(f"--source={url}", "--to=megatron", f"--target=gs://{gcs_server.BUCKET}/exported")
        files = fsspec.filesystem("gs")
        uploaded = {
            name: files.cat_file(f"{gcs_server.BUCKET}/exported/{name}")
            for name in gcs_server.names(f"gs://{gcs_server.BUCKET}/exported")
        }
        with pytest.raises(ValueError, match="behind a URL only token stores are read"):
            convert(f"--source={url}/x.idx", f"--target={tmp_path}/none", *source[1:])
    assert not list((tmp_path / "cache/staging").glob("*"))
    for name in ("tokens.bin", "tokens.idx", "sidecar.parquet"):
        assert uploaded[name] == (tmp_path / "megatron" / name).read_bytes()
    assert uploaded["sidecar.parquet"] == (tmp_path / "in/sidecar.parquet").read_bytes()
    assert json.loads(uploaded["manifest.json"])["num_sequences"] == len(windows)
    tokens = np.frombuffer(uploaded["tokens.bin"], np.uint16).reshape(windows.shape)
    np.testing.assert_array_equal(tokens, windows)
