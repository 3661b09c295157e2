"""Models of a Hugging Face hub by name: `hf:ORG/NAME` or `hf:ORG/NAME@REVISION` becomes a local folder of one commit.

A revision is a branch, a tag or a commit; without one it is the branch main. Only what is read is downloaded: config,
tokenizer, and safetensors with their index; never pickles or code. Files lie in huggingface_hub's own cache, so that
what another program downloaded is there already. Its environment variables hold: `HF_ENDPOINT` (another hub),
`HF_HOME` (the cache), `HF_TOKEN` (for gated and private models) and `HF_HUB_OFFLINE=1` (only what the cache has).

A branch moves. What is to be the same model later is named by `pinned`, whose commit is asked for once; whoever keeps a
name (a manifest, a protocol, the settings that a folder guards) keeps the pinned one.
"""

import contextlib
import dataclasses
import json
import os
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from safelm.io import remote
from safelm.io.files import write_whole

PREFIX = "hf:"
_NAME = re.compile(r"hf:(?P<repository>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./+-]+))?")
_NAME_IN_SPEC = re.compile(r"(?<![^:=,])hf:(?![./~])[^?&,]+")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "modules.json",  # of embedding models
    "sentence_bert_config.json",
    _INDEX,
)
_MODULE_CONFIG = re.compile(r"\d+_\w+/config\.json")
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_ACCESS = "give a token by HF_TOKEN or `hf auth login`"
_Result = TypeVar("_Result")
_asked_as: dict[str, set[str]] = {}  # by pinned name the branches and tags that stood for it, in this process


@dataclasses.dataclass(frozen=True)
class Name:
    """A model's repository and the revision that is asked for, a branch, a tag or a commit."""

    repository: str
    revision: str = "main"

    def __str__(self) -> str:
        return f"{PREFIX}{self.repository}" + ("" if self.revision == "main" else f"@{self.revision}")

    @property
    def is_pinned(self) -> bool:
        """Whether the revision is a commit, which never changes."""
        return bool(_COMMIT.fullmatch(self.revision))


def is_name(source: str) -> bool:
    """Whether a source is named as on a hub; `hf://` URLs are files, which fsspec opens."""
    return source.startswith(PREFIX) and not source.startswith(f"{PREFIX}//")


def is_path(source: str) -> bool:
    """Whether a scorer's `hf:PLACE` is a folder on this machine: it begins with `/`, `./`, `../` or `~/`."""
    return source.startswith(tuple(f"{PREFIX}{start}" for start in ("/", "./", "../", "~/")))


def has_name(spec: str) -> bool:
    """Whether a scorer's, judge's or writer's string has a name of a hub in it."""
    return bool(_NAME_IN_SPEC.search(spec))


def parse(source: str) -> Name:
    """The parts of a name; ValueError for one that isn't `hf:ORG/NAME` or `hf:ORG/NAME@REVISION`."""
    found = _NAME.fullmatch(source)
    if not found or ".." in source or "--" in source:
        raise ValueError(f"{source}: want hf:ORG/NAME or hf:ORG/NAME@REVISION (a branch, a tag or a commit)")
    return Name(found["repository"], found["revision"] or "main")


def pinned(source: str) -> str:
    """The name with the commit that its revision stands for now; any other source as it is.

    Raises:
      ValueError: not a name.
      OSError: the hub doesn't have it, refuses it or can't be reached; offline, the cache doesn't have it.
    """
    if not is_name(source) or (name := parse(source)).is_pinned:
        return source
    if _is_offline():
        return str(dataclasses.replace(name, revision=_cached_folder(name).name))
    found = str(dataclasses.replace(name, revision=_described(name).sha))
    _asked_as.setdefault(found, set()).add(name.revision)
    return found


def pinned_as(source: str, former: str) -> str:
    """The name with the commit that `former` has of the same repository; any other source as it is."""
    if not (is_name(source) and is_name(former)):
        return source
    name, recorded = parse(source), parse(former)
    is_its_commit = recorded.is_pinned and recorded.repository == name.repository
    return former if is_its_commit and not name.is_pinned else source


def pinned_in(spec: str) -> str:
    """A scorer's, judge's or writer's string (`judge:hf:ORG/NAME?option=1`) with the names in it pinned."""
    return _NAME_IN_SPEC.sub(lambda found: pinned(found[0]), spec)


def folder(source: str, *, with_weights: bool = True) -> str:
    """The local folder with the files of a name, downloaded where they aren't there; any other source as it is.

    Args:
      source: a name, pinned or not.
      with_weights: else only config and tokenizer are sure to be there.

    Raises:
      ValueError: not a name.
      OSError: the hub doesn't have it, refuses it or can't be reached; it has no safetensors; offline, the cache
        doesn't have it.
    """
    if not is_name(source):
        return source
    name = parse(source)
    if name.is_pinned or _is_offline():
        cached = _cached_folder(name, must_exist=_is_offline())
        missing = _missing(cached, with_weights) if cached else "all of it"
        if cached and not missing:
            _keep_revisions(name, cached)
            return str(cached)
        if _is_offline():
            raise FileNotFoundError(f"{name}: {missing} is not in the cache, and HF_HUB_OFFLINE is set: unset it once")
    local = _download(name, with_weights)
    _keep_revisions(name, local)
    return str(local)


def _keep_revisions(name: Name, local: Path) -> None:
    """Notes in the cache which branches the files of a commit were asked by, so that those names work offline too."""
    for revision in () if _is_offline() else _asked_as.pop(str(name), ()):
        with contextlib.suppress(OSError):  # a cache that can't be written to
            write_whole(local.parents[1] / "refs" / revision, local.name)


def _download(name: Name, with_weights: bool) -> Path:
    described = _described(name)
    files = [sibling.rfilename for sibling in described.siblings or ()]
    _check_loadable(name, files, with_weights)
    small = [file for file in files if file in _FILES or _MODULE_CONFIG.fullmatch(file)]
    local = _fetch(name, small)
    if local.name != described.sha:
        raise OSError(f"{name}: its files changed while they were downloaded: try again")
    if with_weights:
        _fetch(name, [_WEIGHTS] if _WEIGHTS in files else sorted(_shards(local / _INDEX)))
        if missing := _missing(local, with_weights):
            raise FileNotFoundError(f"{name}: {missing} is not there, though its index names it")
    return local


def _check_loadable(name: Name, files: Iterable[str], with_weights: bool) -> None:
    files = set(files)
    if not with_weights or files & {_WEIGHTS, _INDEX}:
        return
    if pickles := sorted(file for file in files if file.endswith(PICKLES)):
        raise FileNotFoundError(
            f"{name}: has no safetensors, only pickles ({pickles[0]}), which may run code and are never loaded; take a "
            "revision with model.safetensors (many models have one at refs/pr/1) or convert it yourself"
        )
    if gguf := sorted(file for file in files if file.endswith(".gguf")):
        raise FileNotFoundError(f"{name}: has no safetensors; download {gguf[0]} and give its path")
    raise FileNotFoundError(f"{name}: has neither {_WEIGHTS} nor {_INDEX}: not a model's repository")


def _missing(local: Path, with_weights: bool) -> str:
    """The first file that a folder lacks; empty where it has all."""
    if not any((local / file).exists() for file in ("config.json", "tokenizer.json")):
        return "config.json"
    if not with_weights or (local / _WEIGHTS).exists():
        return ""
    if not (local / _INDEX).exists():
        return _WEIGHTS
    return next((shard for shard in sorted(_shards(local / _INDEX)) if not (local / shard).exists()), "")


def _shards(index: Path) -> set[str]:
    """The files that an index names; what is wrong with it is told where it is read."""
    try:
        return {file for file in json.loads(index.read_bytes())["weight_map"].values() if isinstance(file, str)}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return set()


def _is_offline() -> bool:
    from huggingface_hub import constants

    return constants.is_offline_mode()


def _cached_folder(name: Name, *, must_exist: bool = True) -> Path | None:
    """The cache's folder of a revision, whatever of it is there."""
    import huggingface_hub

    for file in ("config.json", "tokenizer.json"):
        found = huggingface_hub.try_to_load_from_cache(name.repository, file, revision=name.revision)
        if isinstance(found, str):
            return Path(found).parent
    if must_exist:
        raise FileNotFoundError(f"{name}: not in the cache, and HF_HUB_OFFLINE is set: unset it once to download it")
    return None


def _described(name: Name) -> Any:
    """What the hub says about a revision: its commit (`sha`) and files (`siblings`)."""
    import huggingface_hub

    api = huggingface_hub.HfApi()
    described = _asked(name, "asking for it", lambda: api.model_info(name.repository, revision=name.revision))
    if not _COMMIT.fullmatch(described.sha or ""):
        raise _not_a_hub(name)
    return described


def _fetch(name: Name, files: list[str]) -> Path:
    import huggingface_hub

    if not sys.stderr.isatty():
        huggingface_hub.utils.disable_progress_bars()
    files = [re.sub(r"([*?\[])", r"[\1]", file) for file in files]  # patterns of `fnmatch`
    where = {"revision": name.revision, "allow_patterns": files}
    return Path(_asked(name, "downloading", lambda: huggingface_hub.snapshot_download(name.repository, **where)))


def _asked(name: Name, action: str, call: Callable[[], _Result]) -> _Result:
    from huggingface_hub import errors

    def unwrapped() -> _Result:
        try:
            return call()
        except errors.LocalEntryNotFoundError as error:  # what the hub's answer was, behind "not in the cache either"
            if isinstance(error.__cause__, Exception):
                raise error.__cause__ from None
            raise

    return remote.retrying(str(name), action, unwrapped, explain=lambda error: _explained(name, error))


def _explained(name: Name, error: Exception) -> OSError | None:
    from huggingface_hub import errors

    page = f"{_endpoint()}/{name.repository}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return PermissionError(f"{name}: gated: accept its terms at {page}, then {_ACCESS}")
    if isinstance(error, errors.RepositoryNotFoundError):
        return FileNotFoundError(f"{name}: no such model at {_endpoint()}, or a private one (then {_ACCESS})")
    if isinstance(error, errors.RevisionNotFoundError):
        return FileNotFoundError(f"{name}: no revision {name.revision!r} (any more): see {page}/commits for those")
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return FileNotFoundError(f"{name}: a file of it is gone from the hub while it was downloaded: try again")
    if status in (401, 403):
        reason = error.response.headers.get("X-Error-Message") or error.response.reason_phrase
        return PermissionError(f"{name}: the hub refuses it ({status}: {reason}); {_ACCESS}")
    if isinstance(error, errors.FileMetadataError | ValueError | TypeError | KeyError | AssertionError):
        return _not_a_hub(name)
    return None


def _not_a_hub(name: Name) -> OSError:
    what = "with what no hub answers (a proxy's or login page?)"
    return OSError(f"{name}: {_endpoint()} answers {what}: check HF_ENDPOINT and the network")


def _endpoint() -> str:
    from huggingface_hub import constants

    return os.fspath(constants.ENDPOINT)
