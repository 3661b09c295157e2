"""Models by name (`hf:ORG/NAME@REVISION`), downloaded by huggingface_hub from a hub on loopback."""

import json

import pytest
from huggingface_hub import constants

from safelm.io import hub as hub_names
from safelm.io import remote

NAME = "hf:someone/model-1.7b"


def publish(hub, tmp_path, files, *, revision="main", repository="someone/model-1.7b"):
    """Publishes files, by path; returns the commit."""
    folder = tmp_path / f"{repository.replace('/', '+')}-{revision}"
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    return hub.add(repository, folder, kind="models", revision=revision)


WHOLE = {"config.json": "{ }", "tokenizer.json": "{}", "model.safetensors": "weights"}
SHARDED = {
    "config.json": "{ }",
    "tokenizer.json": "{}",
    "1_Pooling/config.json": "{  }",
    "model.safetensors.index.json": json.dumps({"weight_map": {"a": "part-1.safetensors", "b": "part-2.safetensors"}}),
    "part-1.safetensors": "first",
    "part-2.safetensors": "second",
}
NEVER = {
    "pytorch_model.bin": "pickle",
    "modeling_new.py": "code",
    "consolidated.safetensors": "the same again",
    "onnx/model.onnx": "other",
    "README.md": "about",
}


@pytest.mark.parametrize("files", [WHOLE, SHARDED])
def test_only_what_is_read_is_downloaded_and_once(hub, tmp_path, files):
    commit = publish(hub, tmp_path, files | NEVER)
    folder = hub_names.folder(NAME)
    assert folder.endswith(commit) and sorted(set(hub.downloads())) == sorted(files)
    found = tmp_path.joinpath(folder)
    assert {str(p.relative_to(found)): p.read_text() for p in found.rglob("*") if p.is_file()} == files
    hub.asked.clear()
    assert hub_names.folder(NAME) == folder and not hub.downloads()
    hub.asked.clear()
    assert hub_names.folder(f"{NAME}@{commit}") == folder and not hub.asked  # nothing to ask about a commit


def test_a_tokenizer_comes_without_weights_and_the_weights_later(hub, tmp_path):
    publish(hub, tmp_path, SHARDED)
    folder = hub_names.folder(NAME, with_weights=False)
    assert not any("safetensors" in name and "index" not in name for name in hub.downloads())
    assert hub_names.folder(NAME) == folder and hub.downloads().count("part-2.safetensors") == 1


def test_a_pinned_name_stays_when_the_branch_moves(hub, tmp_path):
    old = publish(hub, tmp_path, WHOLE)
    assert hub_names.pinned(NAME) == f"{NAME}@{old}" and not hub.downloads()
    new = publish(hub, tmp_path, WHOLE | {"model.safetensors": "other weights"})
    assert hub_names.pinned(NAME) == f"{NAME}@{new}" != f"{NAME}@{old}"
    first, second = (hub_names.folder(f"{NAME}@{commit}") for commit in (old, new))
    texts = [tmp_path.joinpath(folder, "model.safetensors").read_text() for folder in (first, second)]
    assert texts == ["weights", "other weights"]
    assert hub_names.pinned(f"{NAME}@{old}") == f"{NAME}@{old}"
    assert hub_names.pinned("/a/folder") == hub_names.folder("/a/folder") == "/a/folder"


def test_offline_the_cache_is_enough_and_what_it_lacks_is_told(hub, tmp_path, monkeypatch):
    commit = publish(hub, tmp_path, WHOLE, revision="v1")
    publish(hub, tmp_path, WHOLE, repository="someone/other")
    folder = hub_names.folder(f"{NAME}@v1")
    hub_names.folder("hf:someone/other", with_weights=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.asked.clear()
    assert hub_names.pinned(f"{NAME}@v1") == f"{NAME}@{commit}"
    assert hub_names.folder(f"{NAME}@v1") == hub_names.folder(f"{NAME}@{commit}") == folder
    with pytest.raises(FileNotFoundError, match=f"^{NAME}: not in the cache, and HF_HUB_OFFLINE is set"):
        hub_names.folder(NAME)
    with pytest.raises(FileNotFoundError, match=r"^hf:someone/other: model.safetensors is not in the cache"):
        hub_names.folder("hf:someone/other")
    assert not hub.asked


def test_what_was_pinned_and_downloaded_is_found_offline_by_its_branch(hub, tmp_path, monkeypatch):
    old = publish(hub, tmp_path, WHOLE)
    assert hub_names.folder(hub_names.pinned(NAME)).endswith(old)
    new = publish(hub, tmp_path, WHOLE | {"model.safetensors": "other weights"})
    moved = hub_names.pinned(NAME)  # asked for, and not downloaded
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub_names.pinned(NAME) == f"{NAME}@{old}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub_names.folder(moved)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub_names.pinned(NAME) == moved == f"{NAME}@{new}" and hub_names.folder(NAME) == hub_names.folder(moved)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (NEVER, r"has no safetensors, only pickles \(pytorch_model.bin\), which may run code"),
        ({"config.json": "{ }", "model-Q4.gguf": "x"}, "has no safetensors; download model-Q4.gguf"),
        ({"README.md": "x"}, "has neither model.safetensors nor model.safetensors.index.json"),
        (
            {key: text for key, text in SHARDED.items() if key != "part-2.safetensors"},
            "part-2.safetensors is not there, though its index names it",
        ),
    ],
)
def test_a_repository_that_cannot_be_loaded_is_told_in_one_line(hub, tmp_path, files, message):
    publish(hub, tmp_path, files)
    with pytest.raises(FileNotFoundError, match=f"^{NAME}: {message}") as caught:
        hub_names.folder(NAME)
    assert "\n" not in str(caught.value) and "pytorch_model.bin" not in hub.downloads()


def test_a_gated_a_missing_a_refused_model_and_a_revision_that_is_gone(hub, tmp_path):
    publish(hub, tmp_path, WHOLE)
    publish(hub, tmp_path, WHOLE, repository="someone/gated")
    hub.gated = {"someone/gated"}
    for name, kind, message in (
        (f"{NAME}@0123", FileNotFoundError, f"no revision '0123' .any more.: see {hub.url}/someone/model-1.7b/commits"),
        ("hf:someone/nothing", FileNotFoundError, f"no such model at {hub.url}, or a private one .*HF_TOKEN"),
        ("hf:someone/gated", PermissionError, f"gated: accept its terms at {hub.url}/someone/gated, then .*HF_TOKEN"),
    ):
        for ask in (hub_names.pinned, hub_names.folder):
            with pytest.raises(kind, match=f"^{name}: {message}") as caught:
                ask(name)
            assert "\n" not in str(caught.value)
    hub.refused = {"model.safetensors"}
    with pytest.raises(PermissionError, match=rf"^{NAME}: the hub refuses it \(403: ask for access\)"):
        hub_names.folder(NAME)


def test_a_hub_that_fails_is_asked_again_and_one_that_is_none_is_not(hub, tmp_path, monkeypatch):
    commit = publish(hub, tmp_path, WHOLE)
    for status in (429, 500):
        hub.failing = [(status, b"<html>busy</html>")]
        with pytest.raises(OSError, match=f"^{NAME}: asking for it failed for 0 s, the last time with .*{status}"):
            hub_names.pinned(NAME)
    monkeypatch.setenv(remote.RETRY_VARIABLE, "60")
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: None)
    hub.failing = [(503, b""), (429, b"<html>busy</html>")]
    assert hub_names.pinned(NAME) == f"{NAME}@{commit}" and not hub.failing
    hub.failing = [(200, b"<html>please log in</html>")]
    with pytest.raises(OSError, match=f"^{NAME}: {hub.url} answers with what no hub answers .*HF_ENDPOINT"):
        hub_names.folder(NAME)


@pytest.mark.parametrize("name", ["hf:model", "hf:a/b/c", "hf:a/b@", "hf:a/..", "hf:", "hf:a b/c", "hf:a/b@x@y"])
def test_what_is_no_name_is_refused(name):
    for ask in (hub_names.pinned, hub_names.folder):
        with pytest.raises(ValueError, match=f"^{name}: want hf:ORG/NAME or hf:ORG/NAME@REVISION"):
            ask(name)
    assert not hub_names.is_name("hf://datasets/a/b") and not hub_names.is_name("/hf:a/b")
