"""Cloud Storage that fails, is slow, refuses or isn't there: an emulator behind a proxy that does so when told to."""

import gzip
import json
import logging
import types

import fsspec
import gcs_server
import gcsfs.retry
import jax
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tiny_runs
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from etils import epath
from gcs_server import names, upload
from token_stores import numbered_documents, write_store

from safelm import documents
from safelm.checkpoints import checkpoint
from safelm.data import remote_shards
from safelm.data.store import TokenStore
from safelm.io import cache, remote
from safelm.models import decoder as model
from safelm.models.config import ModelConfig
from safelm.safety.classifier.checkpoint import check_free
from safelm.safety.monitors import folder as monitors
from safelm.text.tokenizer import Tokenizer
from safelm.train import config as train_config
from safelm.train import dry_run
from safelm.train.run import train

BUCKET = f"gs://{gcs_server.BUCKET}"


@pytest.fixture(scope="module")
def server():
    with gcs_server.behind_proxy() as up:
        yield up


@pytest.fixture
def proxy(server, tmp_path, monkeypatch):
    monkeypatch.setenv(cache.CACHE_VARIABLE, str(tmp_path / "cache"))
    server[0].reset()
    yield server[0]
    server[0].reset()


def is_data(method: str, path: str) -> bool:
    return method == "GET" and "tokens-" in path


def test_a_store_is_read_through_failures(proxy, tmp_path, monkeypatch):
    monkeypatch.setattr(remote_shards, "_WHOLE_AT_ONCE_BYTES", 0)
    monkeypatch.setenv(cache.SIZE_VARIABLE, "0")
    local = write_store(tmp_path / "store", numbered_documents([300] * 3), num_shards=2)
    upload(tmp_path / "store", f"{BUCKET}/faults")
    proxy.fail_first(2, 429, "reset")
    store = TokenStore.open(f"{BUCKET}/faults")
    assert proxy.refused == 2
    np.testing.assert_array_equal(store.document(2), local.document(2))
    proxy.fail_first(2, 503, where=is_data)
    np.testing.assert_array_equal(store.tokens(0, 10**6), local.tokens(0, 10**6))
    assert proxy.refused == 2


def test_a_cut_answer_is_no_data(proxy, tmp_path, monkeypatch):
    monkeypatch.setenv(cache.SIZE_VARIABLE, "0")
    write_store(tmp_path / "store", numbered_documents([300]))
    upload(tmp_path / "store", f"{BUCKET}/cut")
    proxy.change = lambda path, body: body[:-2] if "tokens-" in path and "alt=media" in path else body
    with pytest.raises(OSError, match=rf"^{BUCKET}/cut/tokens-00000-of-00001\.npy: truncated: bytes .* gave"):
        TokenStore.open(f"{BUCKET}/cut").tokens(0, 5)


def test_slow_answers_are_waited_for(proxy, tmp_path):
    local = write_store(tmp_path / "store", numbered_documents([300]))
    upload(tmp_path / "store", f"{BUCKET}/slow")
    proxy.delay = 0.5
    np.testing.assert_array_equal(TokenStore.open(f"{BUCKET}/slow").tokens(0, 300), local.tokens(0, 300))


def test_documents_are_streamed_through_failures(proxy, tmp_path):
    from data_tasks.readers import MalformedLimit, ReadReport, read_documents

    rows = [{"id": str(i), "text": f"Document {i}.", "metadata": {"harm_score": 1}} for i in range(300)]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    upload(tmp_path, f"{BUCKET}/documents")
    options = {"needs_score": True, "limit": MalformedLimit(), "report": ReadReport()}
    for name, answer in (("a.jsonl.gz", 503), ("a.parquet", "reset")):
        proxy.fail_first(1, answer, where=lambda method, path: "alt=media" in path)
        found = [document.text for document in read_documents(f"{BUCKET}/documents/{name}", **options)]
        assert found == [row["text"] for row in rows] and proxy.refused == 1
        proxy.rule = lambda method, path: 403 if "alt=media" in path else None
        with pytest.raises(OSError) as raised:
            list(read_documents(f"{BUCKET}/documents/{name}", **options))
        one_line(raised, f"{BUCKET}/documents/{name}: ", "reading is refused (403: ")


def test_writing_through_failures(proxy):
    proxy.fail_first(1, 503)
    (epath.Path(BUCKET) / "written" / "config.json").write_text("{}")
    proxy.fail_first(1, 429)
    tiny_runs.tokenizer().save(f"{BUCKET}/written/tokenizer")
    proxy.fail_first(1, "reset")
    remote.write_text(f"{BUCKET}/written/more", "text")
    assert proxy.refused == 1 and remote.read_text(f"{BUCKET}/written/more") == "text"
    assert names(f"{BUCKET}/written") == [
        "config.json",
        "more",
        "tokenizer/generation_config.json",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
    ]


def first_of_each(*kinds):
    """A rule that answers the first request of each kind (status, method, what holds for its path)."""
    left = list(kinds)

    def rule(method, path):
        kind = next((kind for kind in left if kind[1] == method and kind[2](path)), None)
        return None if kind is None else left.pop(left.index(kind))[0]

    return rule


def test_checkpoints_through_failures(proxy):
    config, url = ModelConfig(**tiny_runs.model_fields()), f"{BUCKET}/model"
    params = model.init(config, jax.random.key(0))
    array, metadata = (lambda path: "ocdbt" in path), (lambda path: "_CHECKPOINT_METADATA" in path)
    proxy.rule = first_of_each((503, "POST", array), (429, "POST", metadata))  # tensorstore's, and Orbax's own
    checkpoint.save_params(url, config, params, tiny_runs.tokenizer())
    assert proxy.refused == 2
    proxy.rule = first_of_each((429, "GET", array), (503, "GET", metadata))
    _, found, _ = checkpoint.load_for_inference(url)
    assert proxy.refused == 4
    assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (params, found)), strict=True))


def test_a_run_goes_through_failures_of_every_kind_of_file(proxy, tmp_path):
    inputs, url = tiny_runs.write_inputs(tmp_path / "inputs"), f"{BUCKET}/run"
    config = tiny_runs.tiny_config(inputs, **{"model.num_layers": 1})
    files = ("/config.json", "metrics.jsonl", "tokenizer.json", "tensorboard", "_CHECKPOINT_METADATA")
    proxy.rule = first_of_each(*((503, "POST", lambda path, file=file: file in path) for file in files))
    train(config, url)
    assert proxy.refused == len(files)
    lines = (epath.Path(url) / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    with checkpoint.Checkpoints(url, read_only=True) as checkpoints:
        assert checkpoints.steps() == [3, 6]


def one_line(raised, *parts: str) -> None:
    text = str(raised.value)
    assert "\n" not in text and "http" not in text and all(part in text for part in parts), text


def test_a_refusing_or_missing_bucket_ends_a_run_before_its_first_step(proxy, tmp_path):
    inputs, url = tiny_runs.write_inputs(tmp_path / "inputs"), f"{BUCKET}/refused"
    config = tiny_runs.tiny_config(inputs)
    with pytest.raises(FileNotFoundError) as raised:
        train(config, "gs://no-such-bucket/run")
    one_line(raised, "gs://no-such-bucket/run: there is no bucket 'no-such-bucket'")
    for method, action in (("POST", "writing"), ("DELETE", "removing")):
        proxy.rule = lambda sent, path, method=method: 403 if sent == method else None
        with pytest.raises(PermissionError) as raised:
            train(config, url)
        one_line(
            raised, f"{url}: {action} is refused (403: someone does not have storage access)", "GOOGLE_APPLICATION"
        )
    proxy.rule = lambda method, path: 403 if method == "GET" and "prefix" in path else None
    with pytest.raises(PermissionError) as raised:
        train(config, url)
    one_line(raised, f"{url}/checkpoints: listing is refused (403")
    proxy.reset()
    assert all(name.startswith(".probe-") for name in names(url))


def test_a_refusing_or_missing_bucket_of_data_is_named(proxy, tmp_path):
    inputs = tiny_runs.write_inputs(tmp_path / "inputs")
    config = tiny_runs.tiny_config(inputs)
    config.data.root = "gs://no-such-bucket/tokens"
    with pytest.raises(FileNotFoundError) as raised:
        train(config, str(tmp_path / "run"))
    one_line(raised, "gs://no-such-bucket/tokens/", "there is no bucket 'no-such-bucket'")
    upload(inputs, f"{BUCKET}/inputs")
    config.data.root = f"{BUCKET}/inputs/tokens"
    proxy.rule = lambda method, path: 403
    with pytest.raises(PermissionError) as raised:
        train(config, str(tmp_path / "run"))
    one_line(raised, f"{BUCKET}/inputs/tokens/", "manifest.json: reading is refused (403: someone does not have")
    assert not (tmp_path / "run").exists()
    proxy.rule = lambda method, path: 401
    with pytest.raises(PermissionError) as raised:
        remote.read_text(f"{BUCKET}/inputs/tokens/x")
    one_line(raised, "(401: ")


READERS = {
    "tokenizer": Tokenizer.from_pretrained,
    "checkpoint": checkpoint.load,
    "pattern": lambda url: documents.find(f"{url}/*.jsonl"),
    "folder": documents.find,
    "monitor": monitors.is_head,
    "classifier": check_free,
    "stored config": train_config._stored,
    "newest checkpoint": train_config._newest_record,
    "dry run": dry_run._is_absent,
}


@pytest.mark.parametrize("reader", READERS)
def test_what_reads_a_bucket_names_it_when_it_refuses_or_fails(proxy, monkeypatch, reader):
    url = f"{BUCKET}/asked"
    proxy.rule = lambda method, path: 403
    with pytest.raises(PermissionError) as raised:
        READERS[reader](url)
    one_line(raised, url, " is refused (403: someone does not have storage access)", "GOOGLE_APPLICATION_CREDENTIALS")
    monkeypatch.setattr(gcsfs.retry, "asyncio", types.SimpleNamespace(sleep=at_once))
    monkeypatch.setenv(remote.RETRY_VARIABLE, "1")
    proxy.rule = lambda method, path: 503
    with pytest.raises(OSError) as raised:
        READERS[reader](url)
    one_line(raised, url, " failed for 1 s, the last time with ", "503")


async def at_once(seconds: float) -> None:
    """In the place of gcsfs's own waits, half a minute in all."""


def test_a_missing_bucket_or_folder_is_told_from_one_that_refuses(proxy):
    for reader in (Tokenizer.from_pretrained, checkpoint.load):
        with pytest.raises(FileNotFoundError, match="there is no bucket 'no-such-bucket'"):
            reader("gs://no-such-bucket/run")
    with pytest.raises(FileNotFoundError, match=f"^no checkpoint at {BUCKET}/none: it has no folder 'checkpoints'"):
        checkpoint.load(f"{BUCKET}/none")
    with pytest.raises(FileNotFoundError, match=f"^{BUCKET}/none: no such tokenizer file or folder"):
        Tokenizer.from_pretrained(f"{BUCKET}/none")
    assert not remote.exists(f"{BUCKET}/none") and not monitors.is_head(f"{BUCKET}/none")


def test_credentials_come_from_the_environment_and_are_never_shown(server, proxy, tmp_path, monkeypatch, caplog, capfd):
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()
    account = {"type": "service_account", "client_email": "me@p.iam", "token_uri": f"{server[1]}/token"}
    (tmp_path / "key.json").write_text(json.dumps(account | {"private_key": pem}))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "key.json"))
    gcs_server.forget_clients()
    token = "ya29.not-to-be-seen"

    def refuse(method, path):
        if path == "/token":
            return {"access_token": token, "expires_in": 3600, "token_type": "Bearer"}
        return 403 if "forbidden" in path else None

    proxy.rule = refuse
    with caplog.at_level(logging.DEBUG):
        remote.write_text(f"{BUCKET}/mine/file", "text")
        with pytest.raises(PermissionError) as raised:
            remote.read_text(f"{BUCKET}/forbidden/file")
        proxy.rule = lambda method, path: {"access_token": token} if path == "/token" else None
        write_store(tmp_path / "store", numbered_documents([30]))
        upload(tmp_path / "store", f"{BUCKET}/mine/store")
        TokenStore.open(f"{BUCKET}/mine/store", verify_checksums=True)
    assert [sent for method, path, sent in proxy.requests if "mine" in path][-1] == f"Bearer {token}"
    shown = [caplog.text, *capfd.readouterr(), str(raised.value), repr(raised.value)]
    shown += [path.read_bytes().decode("latin1") for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert not [text for text in shown if token in text or "PRIVATE KEY" in text]
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS")
    gcs_server.forget_clients()
    proxy.reset()
    assert remote.read_text(f"{BUCKET}/mine/file") == "text"  # a public bucket needs none
    assert proxy.requests[-1][2] == ""


class Server:
    """Fails a number of times; the clock is the sum of the sleeps."""

    def __init__(self, monkeypatch, *errors: Exception):
        self.errors, self.now, self.pauses = list(errors), 0.0, []
        monkeypatch.setattr(remote.time, "sleep", self.sleep)
        monkeypatch.setattr(remote.time, "monotonic", lambda: self.now)

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds

    def __call__(self) -> str:
        if self.errors:
            raise self.errors.pop(0)
        return "text"


def http_error(code: int) -> Exception:
    return gcsfs.retry.HttpError({"code": code, "message": "see https://a.b/c?token=x"})


def test_waits_double_with_jitter_until_the_time_is_up(monkeypatch, caplog):
    failing = Server(monkeypatch, *[http_error(503)] * 3, TimeoutError(), ConnectionResetError(), http_error(429))
    assert remote.retrying("gs://b/f", "reading", failing) == "text"
    for attempt, pause in enumerate(failing.pauses):
        assert 0.5 * 2**attempt <= pause <= 2**attempt
    assert len(set(failing.pauses)) == 6 and len(caplog.messages) == 6
    assert caplog.messages[0].startswith("gs://b/f: reading failed (see <address> 503); trying again in")

    monkeypatch.setenv(remote.RETRY_VARIABLE, "100")
    failing = Server(monkeypatch, *[http_error(503)] * 1000)
    with pytest.raises(OSError, match=r"^gs://b/f: reading failed for 100 s, the last time with see <address> 503$"):
        remote.retrying("gs://b/f", "reading", failing)
    assert 60 <= failing.now <= 100 and max(failing.pauses) <= 32


@pytest.mark.parametrize("error", [http_error(400), http_error(401), ValueError("x"), OSError("Forbidden: b/o\nno")])
def test_what_will_not_pass_is_not_tried_again(monkeypatch, error):
    failing = Server(monkeypatch, error)
    with pytest.raises(OSError, match=r"^gs://b/f: writing "):
        remote.retrying("gs://b/f", "writing", failing)
    assert failing.pauses == []


def test_bad_retry_time_names_the_variable(monkeypatch):
    monkeypatch.setenv(remote.RETRY_VARIABLE, "soon")
    with pytest.raises(ValueError, match="SAFELM_RETRY_SECONDS must be a number of seconds, got 'soon'"):
        remote.retrying("gs://b/f", "reading", lambda: None)


def test_a_silent_connection_has_a_limit(proxy):
    files, _ = remote.filesystem(f"{BUCKET}/x")
    assert files.requests_timeout.sock_read == 60 and files.requests_timeout.total is None
    assert fsspec.filesystem("gs") is not files
