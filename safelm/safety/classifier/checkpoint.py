"""A classifier on disk: a folder, local or behind a URL, that is whole or not loadable at all.

    config.json           which backbone (arguments and fingerprint), classes, calibration, thresholds, what it was
                          trained on and how good it was on held-out text, and the sha256 of the files beside it
    head.safetensors      kernel [D, 6] and bias [6]; kinds_kernel [D, K] and kinds_bias [K] where there are kinds
    backbone.safetensors  the backbone's parameters where they were trained, else absent

A local folder gets its name when everything is in it; behind a URL `config.json`, without which nothing loads, comes
last.
"""

import hashlib
import json
import os
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors import numpy as safetensors

from safelm.io import records, remote
from safelm.io.files import whole_folder
from safelm.safety.classifier.calibration import Calibration
from safelm.safety.classifier.harm_kinds import KINDS
from safelm.safety.classifier.metrics import CLASSES
from safelm.safety.embedding import Backbone, load_backbone

CONFIG_FILE, HEAD_FILE, BACKBONE_FILE = "config.json", "head.safetensors", "backbone.safetensors"
_FORMAT = "safelm-classifier"
_SEPARATOR = "/"
Tensors = dict[str, np.ndarray]


def check_free(folder: str) -> None:
    """Raises ValueError if something stands at `folder` already (an empty local folder is fine)."""
    found = remote.kind(folder)
    if found == "file" or (found and (remote.is_remote(folder) or os.listdir(folder))):
        raise ValueError(f"--output={folder}: not empty; name a new folder")


def save(
    folder: str,
    backbone: Backbone,
    head: Mapping[str, Any],
    calibration: Calibration,
    training: Mapping[str, Any],
    tuned: Mapping[str, Any] | None = None,
    kinds: Sequence[str] = (),
) -> None:
    """Writes a classifier.

    Args:
      training: what it was trained on and how good it was, JSON-able.
      tuned: the backbone's parameters if they were trained.
      kinds: of harm that the head has a unit for, in its order.
    """
    check_free(folder)
    config = {
        "format": _FORMAT,
        "version": 1,
        "classes": CLASSES,
        "kinds": list(kinds),
        "backbone": {"spec": dict(backbone.spec), "fingerprint": backbone.fingerprint, "dim": backbone.dim},
        "calibration": calibration.to_json(),
        "training": training,
    }
    tensors = {HEAD_FILE: {name: np.asarray(value, np.float32) for name, value in head.items()}}
    if tuned is not None:
        tensors[BACKBONE_FILE] = _flat(tuned)
    if remote.is_remote(folder):
        with tempfile.TemporaryDirectory() as whole:
            _write(pathlib.Path(whole), config, tensors)
            for name in (*tensors, CONFIG_FILE):
                remote.upload(f"{whole}/{name}", f"{folder.rstrip('/')}/{name}")
        return
    place = pathlib.Path(folder).absolute()
    with whole_folder(place, "--output") as whole:
        _write(whole, config, tensors)
        if place.is_dir():
            place.rmdir()  # empty: see `check_free`


def _write(folder: pathlib.Path, config: dict[str, Any], tensors: Mapping[str, Tensors]) -> None:
    config["files"] = {}
    for name, values in tensors.items():
        data = safetensors.save({key: np.ascontiguousarray(value) for key, value in values.items()})
        config["files"][name] = hashlib.sha256(data).hexdigest()
        (folder / name).write_bytes(data)
    (folder / CONFIG_FILE).write_bytes((json.dumps(config, indent=1) + "\n").encode())


def read(
    folder: str, backbone: Backbone | str | None = None
) -> tuple[Backbone, dict[str, Any], Tensors, Calibration, dict[str, Any]]:
    """(backbone, its parameters, head, calibration, config.json) of a classifier.

    Args:
      backbone: already loaded, or where it lies; when not given, what config.json names is loaded.

    Raises:
      FileNotFoundError: no classifier there, or not its backbone.
      ValueError: damaged, of another class count, or trained on another backbone than the one given or found.
    """
    config = read_config(folder)
    trained_on = config["backbone"]
    if backbone is None or isinstance(backbone, str):
        backbone = _backbone(folder, trained_on["spec"] | ({"source": backbone} if backbone else {}))
    if backbone.fingerprint != trained_on["fingerprint"]:
        raise ValueError(
            f"{folder}: trained on another backbone: {trained_on['spec'].get('source')} with fingerprint "
            f"{trained_on['fingerprint'][:12]}, not {backbone.spec.get('source')} with {backbone.fingerprint[:12]}"
        )
    head = _tensors(folder, HEAD_FILE, config)
    shapes = {name: value.shape for name, value in head.items()}
    expected = {"kernel": (backbone.dim, CLASSES), "bias": (CLASSES,)}
    if count := len(config["kinds"]):
        expected |= {"kinds_kernel": (backbone.dim, count), "kinds_bias": (count,)}
    if shapes != expected:
        raise ValueError(
            f"{folder}: the head is {shapes}, not {backbone.dim} dimensions to {CLASSES} classes and {count} kinds"
        )
    params = backbone.params
    if BACKBONE_FILE in config["files"]:
        params = _nested(folder, _tensors(folder, BACKBONE_FILE, config), backbone.params)
    return backbone, params, head, Calibration.from_json(config["calibration"]), config


def _backbone(folder: str, spec: Mapping[str, Any]) -> Backbone:
    try:
        return load_backbone(**spec)
    except FileNotFoundError as error:
        where = f"classifier:{folder}?backbone=FOLDER says where it lies now"
        raise FileNotFoundError(f"{folder}: its backbone is not there ({error}); {where}") from error
    except ValueError as error:
        raise ValueError(f"{folder}: its backbone {spec.get('source')} can't be used: {error}") from error


def read_config(folder: str) -> dict[str, Any]:
    """config.json, checked; errors as in `read`."""
    try:
        data = _bytes(folder, CONFIG_FILE)
    except FileNotFoundError:
        raise FileNotFoundError(f"{folder}: no classifier there (no {CONFIG_FILE})") from None
    config = records.parse(data, f"{folder}/{CONFIG_FILE}", "train the classifier again, or copy it anew")
    if config.get("format") != _FORMAT:
        raise ValueError(f"{folder}/{CONFIG_FILE}: not a classifier's")
    if config.get("classes") != CLASSES:
        raise ValueError(f"{folder}: has {config.get('classes')} classes, where scores 0 to 5 need {CLASSES}")
    wrong = [name for name in ("backbone", "calibration", "files") if not isinstance(config.get(name), dict)]
    if wrong:
        raise ValueError(f"{folder}/{CONFIG_FILE}: field {wrong[0]!r} is missing or no object")
    if not isinstance(config.get("kinds"), list) or set(config["kinds"]) - set(KINDS):
        raise ValueError(f"{folder}/{CONFIG_FILE}: field 'kinds' is not a list of {', '.join(KINDS)}")
    if not isinstance(config["backbone"].get("spec"), dict) or "fingerprint" not in config["backbone"]:
        raise ValueError(f"{folder}/{CONFIG_FILE}: field 'backbone' has no spec or no fingerprint")
    return config


def fingerprint(config: Mapping[str, Any]) -> str:
    """What scores depend on: backbone, tensors, calibration. Not where it lies or how it was measured."""
    parts = [config["backbone"]["fingerprint"], config["files"], config["calibration"], config["kinds"]]
    return records.fingerprint(parts)


def _bytes(folder: str, name: str) -> bytes:
    return remote.read_bytes(f"{folder.rstrip('/')}/{name}")


def _tensors(folder: str, name: str, config: Mapping[str, Any]) -> Tensors:
    try:
        data = _bytes(folder, name)
    except FileNotFoundError:
        raise FileNotFoundError(f"{folder}: {name} is missing") from None
    if hashlib.sha256(data).hexdigest() != config["files"].get(name):
        raise ValueError(f"{folder}/{name}: damaged (its sha256 is not the one in {CONFIG_FILE})")
    try:
        return safetensors.load(data)
    except SafetensorError as error:
        raise ValueError(f"{folder}/{name}: not a safetensors file ({error})") from None


def _flat(params: Mapping[str, Any]) -> Tensors:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {_SEPARATOR.join(key.key for key in path): np.asarray(leaf, np.float32) for path, leaf in leaves}


def _nested(folder: str, tensors: Tensors, like: Mapping[str, Any]) -> dict[str, Any]:
    expected = {name: value.shape for name, value in _flat(like).items()}
    if {name: value.shape for name, value in tensors.items()} != expected:
        raise ValueError(f"{folder}/{BACKBONE_FILE}: its tensors are not those of the backbone")
    leaves = [tensors[name] for name in _flat(like)]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)
