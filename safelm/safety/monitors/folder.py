"""A linear head on disk: a folder, local or behind a URL, that is whole or not loadable at all.

    config.json        what it reads (model, layer, header), its thresholds, what it was trained on and how good it is
    head.safetensors   kernel [D, 6] and bias [6]

`config.json` names the sha256 of the tensors and comes last.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors import numpy as safetensors

from safelm.inference.monitors import LinearHead
from safelm.io import records, remote
from safelm.io.files import write_whole
from safelm.models.arrays import Params
from safelm.safety.classifier.checkpoint import check_free
from safelm.safety.model_fingerprint import model_fingerprint
from safelm.tags import MAX_SCORE

CONFIG_FILE, HEAD_FILE = "config.json", "head.safetensors"
_FORMAT = "safelm-monitor"
KINDS = ("token", "probe")


@dataclasses.dataclass(frozen=True, eq=False)
class SavedHead:
    """A linear head on the stream of a named model.

    Attributes:
      kind: "token" (of labelled spans) or "probe" (of prompts and answers).
      source: the model's folder, file or name.
      fingerprint: of the model's embedding, blocks and vocabulary (`stream_fingerprint`); older heads only of blocks
        and vocabulary.
      is_encoder: whether the model is an encoder, whose states no decoder has.
      layer: number of blocks after which the stream is read.
      kernel_DC, bias_C: of the softmax over the scores 0 to 5.
      min_score: from which on a token is harmful.
      threshold: the level from which on a token is in a span, or sets off an alarm.
      header_ids: behind a token, to read at the last of them.
      training: what it was trained on and how good it is, JSON-able.
    """

    kind: str
    source: str
    fingerprint: str
    is_encoder: bool
    layer: int
    kernel_DC: Float[np.ndarray, "D C"]
    bias_C: Float[np.ndarray, " C"]
    min_score: int
    threshold: float
    header_ids: tuple[int, ...] = ()
    training: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def monitor(self, name: str = "", every: int = 1) -> LinearHead:
        """The head as a monitor."""
        return LinearHead(
            self.layer, self.kernel_DC, self.bias_C, self.min_score, self.header_ids, every, name or self.kind
        )

    @property
    def identity(self) -> str:
        """A hash of what its levels depend on, the model included."""
        return records.fingerprint([self.fingerprint, self.monitor("").fingerprint])

    def reads(self, params: Params, vocab_hash: str, tag_id: int | None) -> bool:
        """Whether the head is of this model's stream; arguments as of `stream_fingerprint`."""
        known = stream_fingerprint(params, vocab_hash, tag_id), _blocks_fingerprint(params, vocab_hash)
        return self.fingerprint in known


def stream_fingerprint(params: Params, vocab_hash: str, tag_id: int | None) -> str:
    """A hash of what a decoder's or encoder's stream depends on: its embedding, its blocks and its vocabulary.

    Args:
      tag_id: the harm tag's id, from which on rows of a decoder's embedding don't count: where its vocabulary is made
        to fit, a row is added for the tag. None where nothing is added.
    """
    if "embedder" not in params:  # an encoder, of whose last layer the final norm is a part
        return model_fingerprint(None, jax.tree.map(np.asarray, dict(params)), vocab_hash, settings={})
    table_VD = np.asarray(params["embedder"]["embedding"])[:tag_id]
    stream = {"embedder": table_VD, "layers": params["layers"]}
    return model_fingerprint(None, jax.tree.map(np.asarray, stream), vocab_hash, settings={})


def _blocks_fingerprint(params: Params, vocab_hash: str) -> str:
    """What the fingerprint was before it counted the embedding."""
    blocks = {name: part for name, part in params.items() if name.startswith("layer")}
    return model_fingerprint(None, jax.tree.map(np.asarray, blocks), vocab_hash, settings={})


def save_head(folder: str, head: SavedHead) -> None:
    """Writes a head into a new folder, config.json last. Raises ValueError if something stands there."""
    check_free(folder)
    tensors = {"kernel": np.asarray(head.kernel_DC, np.float32), "bias": np.asarray(head.bias_C, np.float32)}
    data = safetensors.save({name: np.ascontiguousarray(value) for name, value in tensors.items()})
    values = {field.name: getattr(head, field.name) for field in dataclasses.fields(head)}
    config = {
        "format": _FORMAT,
        "version": 1,
        **{name: value for name, value in values.items() if name not in ("kernel_DC", "bias_C", "training")},
        "header_ids": list(head.header_ids),
        "files": {HEAD_FILE: hashlib.sha256(data).hexdigest()},
        "training": dict(head.training),
    }
    for name, content in ((HEAD_FILE, data), (CONFIG_FILE, (json.dumps(config, indent=1) + "\n").encode())):
        _write(f"{folder.rstrip('/')}/{name}", content)


def _write(path: str, content: bytes) -> None:
    if not remote.is_remote(path):
        pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content)
        return
    files, inner = remote.filesystem(path)
    remote.retrying(path, "writing", lambda: files.pipe_file(inner, content))


def read_head(folder: str) -> SavedHead:
    """Reads a head.

    Raises:
      FileNotFoundError: none there.
      ValueError: damaged, or a field is missing or of no use; the message names file and field.
    """
    where = f"{folder.rstrip('/')}/{CONFIG_FILE}"
    config = records.parse(_bytes(folder, CONFIG_FILE), where, "train it again, or copy it anew")
    if config.get("format") != _FORMAT:
        raise ValueError(f"{where}: not a monitor's")
    wanted = {"source": str, "fingerprint": str, "is_encoder": bool, "layer": int, "min_score": int}
    wanted |= {"threshold": float, "header_ids": list, "files": dict, "training": dict}
    for name, kind in wanted.items():
        if not isinstance(config.get(name), kind):
            raise ValueError(f"{where}: field {name!r} is {config.get(name)!r}, want a {kind.__name__}")
    if config.get("kind") not in KINDS:
        raise ValueError(f"{where}: field 'kind' is {config.get('kind')!r}, want one of {', '.join(KINDS)}")
    data = _bytes(folder, HEAD_FILE)
    if hashlib.sha256(data).hexdigest() != config["files"].get(HEAD_FILE):
        raise ValueError(f"{folder}/{HEAD_FILE}: damaged (its sha256 is not the one in {CONFIG_FILE})")
    try:
        tensors = safetensors.load(data)
    except SafetensorError as error:
        raise ValueError(f"{folder}/{HEAD_FILE}: not a safetensors file ({error})") from None
    kernel_DC, bias_C = tensors.get("kernel"), tensors.get("bias")
    scores = (MAX_SCORE + 1,)
    has_both = kernel_DC is not None and bias_C is not None
    if not has_both or kernel_DC.ndim != 2 or kernel_DC.shape[1:] != scores or bias_C.shape != scores:
        raise ValueError(f"{folder}/{HEAD_FILE}: no kernel [D, {MAX_SCORE + 1}] and bias [{MAX_SCORE + 1}]")
    own = {name: config[name] for name in wanted if name not in ("files", "header_ids")}
    header_ids = tuple(map(int, config["header_ids"]))
    return SavedHead(config["kind"], kernel_DC=kernel_DC, bias_C=bias_C, header_ids=header_ids, **own)


def is_head(folder: str) -> bool:
    """Whether there is a monitor's folder, whole or damaged."""
    return remote.exists(f"{folder.rstrip('/')}/{CONFIG_FILE}")


def _bytes(folder: str, name: str) -> bytes:
    try:
        return remote.read_bytes(f"{folder.rstrip('/')}/{name}")
    except FileNotFoundError:
        raise FileNotFoundError(f"{folder}: no monitor there (no {name})") from None
