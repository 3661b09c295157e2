"""`cache_tasks --output=gs://...`: the store of a local run, whatever stops it and wherever it goes on."""

import json
import os
import shutil

import fsspec
import gcs_server
import pytest
from gcs_server import names

from safelm import cache_tasks
from safelm.data.store import TokenStore
from safelm.io import cache
from safelm.text.tokenizer import Tokenizer

BUCKET = f"gs://{gcs_server.BUCKET}"


@pytest.fixture(scope="module")
def proxy():
    with gcs_server.behind_proxy() as (proxy, _):
        yield proxy


@pytest.fixture
def make(tmp_path, monkeypatch, proxy):
    """Runs the command on a corpus of three files, one with a malformed row; a machine is a cache folder."""
    proxy.reset()
    corpus = tmp_path / "corpus" / "raw_web"
    corpus.mkdir(parents=True)
    Tokenizer.train(["a document of the web"] * 3, 280).save(str(tmp_path / "tokenizer"))
    for shard in range(3):
        rows = [
            {"id": f"d{shard}-{i}", "text": f"Document {i} of the web.", "metadata": {"harm_score": i % 6}}
            for i in range(40)
        ]
        lines = [json.dumps(row) for row in rows] + (["{"] if shard == 1 else [])
        (corpus / f"train-{shard}.jsonl").write_text("\n".join(lines) + "\n")

    def run(output: str, *flags: str, machine: str = "here") -> None:
        monkeypatch.setenv(cache.CACHE_VARIABLE, str(tmp_path / machine))
        where = [f"--output={output}", f"--data_dir={tmp_path / 'corpus'}", f"--tokenizer={tmp_path / 'tokenizer'}"]
        cache_tasks.main(cache_tasks.arguments().parse_args([*where, "--tasks=raw_web", "--splits=train", *flags]))

    return run


def contents(url: str) -> dict[str, bytes]:
    filesystem, inner = fsspec.core.url_to_fs(url)
    return {name.lstrip("/"): filesystem.cat_file(f"{inner}/{name.lstrip('/')}") for name in names(url)}


def local_contents(folder) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def count_shards(monkeypatch, *, fail_at: int | None = None) -> list[int]:
    written, original = [], cache_tasks.write_shard

    def write(job, *arguments):
        if len(written) == fail_at:
            raise OSError("stopped")
        written.append(job.index)
        return original(job, *arguments)

    monkeypatch.setattr(cache_tasks, "write_shard", write)
    return written


def test_the_store_in_a_bucket_is_the_local_one(make, tmp_path, monkeypatch, proxy):
    make(str(tmp_path / "tokens"))
    wanted = local_contents(tmp_path / "tokens")
    assert any(name.startswith("quarantine/") for name in wanted)

    url = f"{BUCKET}/whole"
    make(f"{url}/")
    assert contents(url) == wanted
    uploads = [path for method, path, _ in proxy.requests if method == "POST" and "whole" in path]
    kept = [path for path in uploads if "quarantine" not in path and ".probe-" not in path]
    assert "manifest.json" in kept[-1]
    assert not list((tmp_path / "here").rglob("*.npy"))
    TokenStore.open(f"{url}/raw_web/train", verify_checksums=True)

    written = count_shards(monkeypatch)
    make(url)
    make(url, machine="there")
    assert written == [] and contents(url) == wanted
    with pytest.raises(ValueError, match=f"^{url}/raw_web/train was begun with seed 0, now it is 5"):
        make(url, "--seed=5", machine="elsewhere")

    filesystem, inner = fsspec.core.url_to_fs(f"{url}/raw_web/train/tokens-00001-of-00003.npy")
    filesystem.rm(inner)
    make(url)
    assert written == [1] and contents(url) == wanted


def test_a_whole_store_is_checked_by_who_may_only_read(make, proxy):
    """Without a lease too; a store that lacks something is refused as before."""
    url = f"{BUCKET}/read_only"
    make(url, "--splits=train,validation")
    wanted = contents(url)

    def read_only(method, path):
        return None if method in ("GET", "HEAD") else 403

    proxy.reset()
    proxy.rule = read_only
    for machine in ("here", "there"):
        make(url, "--splits=train,validation", machine=machine)
    assert not proxy.refused and contents(url) == wanted
    proxy.reset()
    filesystem, inner = fsspec.core.url_to_fs(f"{url}/raw_web/validation/manifest.json")
    filesystem.rm(inner)
    proxy.rule = read_only
    with pytest.raises(PermissionError, match=f"^{url}: writing is refused"):
        make(url, "--splits=train,validation")
    proxy.reset()
    make(url, "--splits=train,validation")
    leases = {path for method, path, _ in proxy.requests if method == "POST" and ".writer" in path}
    assert contents(url) == wanted and leases and all("validation" in path for path in leases)


def test_workers_on_beam_put_the_same_store_in_a_bucket(make, tmp_path):
    make(str(tmp_path / "tokens"))
    url = f"{BUCKET}/beam"
    make(url, "--runner=local", "--workers=1")
    assert contents(url) == local_contents(tmp_path / "tokens")
    assert not list((tmp_path / "here").rglob("*.npy"))


@pytest.mark.parametrize("machine", ["here", "there"])
def test_a_stopped_run_goes_on_from_what_is_in_the_bucket(make, tmp_path, monkeypatch, machine):
    make(str(tmp_path / "tokens"))
    url = f"{BUCKET}/stopped_{machine}"
    with monkeypatch.context() as stopped:
        count_shards(stopped, fail_at=2)
        with pytest.raises(OSError, match="stopped"):
            make(url)
    assert "raw_web/train/manifest.json" not in contents(url)
    with pytest.raises(FileNotFoundError, match="caching it did not finish"):
        TokenStore.open(f"{url}/raw_web/train")
    written = count_shards(monkeypatch)
    make(url, machine=machine)
    assert written == [2]
    stores = [
        {name: data for name, data in found.items() if "quarantine" not in name}
        for found in (contents(url), local_contents(tmp_path / "tokens"))
    ]
    assert stores[0] == stores[1]


def test_a_shard_that_was_written_but_not_uploaded_is_uploaded(make, tmp_path, monkeypatch, proxy):
    make(str(tmp_path / "tokens"))
    url = f"{BUCKET}/cut"
    proxy.rule = lambda method, path: 400 if method == "POST" and "bounds-00001" in path else None
    with pytest.raises(OSError, match=f"^{url}/raw_web/train/bounds-00001-of-00003.npy: writing failed"):
        make(url)
    proxy.reset()
    assert "raw_web/train/shard-00001-of-00003.json" not in contents(url)
    written = count_shards(monkeypatch)
    make(url)
    assert written == [2]
    assert contents(url) == local_contents(tmp_path / "tokens")


def test_a_bucket_that_refuses_or_is_missing_is_named_at_once(make, tmp_path, proxy, monkeypatch):
    written = count_shards(monkeypatch)
    with pytest.raises(FileNotFoundError, match=r"^gs://no-such-bucket/tokens: there is no bucket 'no-such-bucket'$"):
        make("gs://no-such-bucket/tokens")
    proxy.rule = lambda method, path: 403 if method == "POST" else None
    with pytest.raises(PermissionError, match=rf"^{BUCKET}/tokens: writing is refused \(403: someone"):
        make(f"{BUCKET}/tokens")
    assert written == [] and not os.path.exists(tmp_path / "here")
    shutil.rmtree(tmp_path / "corpus")
