"""Adapters as folders of PEFT: adapter_config.json and adapter_model.safetensors, named as `save_pretrained` does.

Source: "PEFT checkpoint format" of its documentation. A tensor is `base_model.model.`, the module's name in
`transformers`, and `.lora_A.weight` [R, inputs] or `.lora_B.weight` [outputs, R]. Beside them, in the file's metadata,
ours have fingerprints of the model they were trained beside, rounded to bfloat16 so that an export in that dtype is
still that model, and whether it and they were trained on the harm tag.
"""

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from safelm.checkpoints import checkpoint, integrity
from safelm.formats import decoder_tensors, families, huggingface
from safelm.formats.json_fields import JsonFields, read_json
from safelm.formats.sources import source_kind
from safelm.io import hub, remote
from safelm.io.files import write_whole
from safelm.models import lora
from safelm.models.config import PROJECTIONS, Lora, ModelConfig
from safelm.models.decoder import Params

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_BASE, _SAW_TAG = "safelm_base", "safelm_saw_tag"  # keys of the metadata
_EXPECTED = {
    "peft_type": ("LORA",),
    # The others (pissa, olora, corda, loftq ...) train beside a base that they have changed.
    "init_lora_weights": (True, False, "gaussian", "eva", None),
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layers_to_transform": (None, []),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, []),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
}
# Without effect on what the finished adapters compute, or said by the tensors' names.
_WITHOUT_EFFECT = (
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "loftq_config",
    "lora_dropout",
    "megatron_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
)
_READ = ("r", "lora_alpha", "use_rslora")


def write_folder(
    folder: Path, config: ModelConfig, params: Params, *, base: str = "", saw_tag: bool | None = None
) -> None:
    """Writes the adapters of a model that has some.

    Args:
      base: the frozen model's name, of a hub if it has one there.
      saw_tag: whether model and adapters were trained on the harm tag; None if unknown.
    """
    trained, frozen = lora.split(config, params)
    adapters = jax.tree.map(np.asarray, trained["layers"][lora.PART])
    tensors = {}
    for tensor, module, name in _tensors(config):
        rank_first = adapters[name].reshape(config.num_layers, *_flat(name, config.lora.rank))
        for layer, values in enumerate(rank_first):
            tensors[_tensor_name(layer, module, tensor)] = np.ascontiguousarray(values.T, np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt", _BASE: json.dumps(_fingerprints(frozen)), _SAW_TAG: json.dumps(saw_tag)}
    safetensors.numpy.save_file(tensors, folder / WEIGHTS_FILE, metadata=metadata)
    (folder / WEIGHTS_FILE).chmod(0o644)
    write_whole(folder / CONFIG_FILE, json.dumps(_config_json(config, base), indent=2) + "\n")


def read_folder(folder: Path, config: ModelConfig, params: Params, *, where: str) -> tuple[ModelConfig, Params]:
    """The model `where` is from, with the adapters of a folder among its parameters.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: an adapter of another kind or of another model; the message names the key, tensor or parameter.
    """
    fields = JsonFields(str(folder / CONFIG_FILE), read_json(folder / CONFIG_FILE))
    fields.expect(_EXPECTED)
    asked = {key: value for key, value in fields.values.items() if value not in (None, False, "", [], {})}
    JsonFields(fields.where, asked).expect_no_others((*_EXPECTED, *_WITHOUT_EFFECT, *_READ))
    rank = fields.size("r", 8)
    alpha = fields.number("lora_alpha", 8.0) * (math.sqrt(rank) if fields.flag("use_rslora", False) else 1.0)
    if not (folder / WEIGHTS_FILE).exists():
        raise FileNotFoundError(f"{folder}: has no {WEIGHTS_FILE}; pickles, which may run code, are never loaded")
    with huggingface.open_tensors(folder / WEIGHTS_FILE) as file:
        stored, metadata = set(file.keys()), file.metadata() or {}
    modules = _modules(config)
    present = [name for name, module in modules.items() if any(f".{module}.lora_" in tensor for tensor in stored)]
    if not present:
        raise ValueError(f"{folder}: an adapter of another model: none of its tensors is of {', '.join(modules)}")
    adapted = dataclasses.replace(config, lora=Lora(rank, alpha, present))
    adapters = _read_adapters(folder, adapted, stored, where)
    _check_base(metadata.get(_BASE), params, f"{folder}: an adapter of another model: ", where)
    return adapted, lora.joined({"layers": {lora.PART: adapters}}, params)


def saw_tag(source: str) -> bool | None:
    """Whether adapters, given as to `read_adapter`, were trained on the harm tag; None if nothing says so."""
    folder = hub.folder(source) if hub.is_name(source) else source
    if remote.is_remote(folder) or not (Path(folder) / CONFIG_FILE).exists():
        return checkpoint.saw_tag(folder)
    with huggingface.open_tensors(Path(folder) / WEIGHTS_FILE) as file:
        return {"true": True, "false": False}.get((file.metadata() or {}).get(_SAW_TAG))


def read_adapter(source: str, config: ModelConfig, params: Params, *, where: str) -> tuple[ModelConfig, Params]:
    """`read_folder` for a folder of PEFT, a hub's by name, or a run of ours whose checkpoint has adapters."""
    folder = hub.folder(source) if hub.is_name(source) else source
    if not remote.is_remote(folder) and (Path(folder) / CONFIG_FILE).exists():
        return read_folder(Path(folder), config, params, where=where)
    if source_kind(folder) != "safelm":
        raise FileNotFoundError(f"{source}: has neither {CONFIG_FILE} (PEFT) nor checkpoints/ (ours)")
    theirs, theirs_params, _ = checkpoint.load(source)
    if theirs.lora is None:
        raise ValueError(f"{source}: its checkpoint has no adapters")
    for name in checkpoint.ARCHITECTURE_FIELDS:
        there, here = getattr(theirs, name), getattr(config, name)
        if there != here:
            raise ValueError(f"{source}: an adapter of another model: {name} is {there} there, {here} in {where}")
    trained, frozen = lora.split(theirs, theirs_params)
    base = json.dumps(_fingerprints(frozen))
    _check_base(base, params, f"{source}: an adapter of another model: ", where)
    return dataclasses.replace(config, lora=theirs.lora), lora.joined(trained, params)


def _config_json(config: ModelConfig, base: str) -> dict[str, Any]:
    name = hub.parse(base) if hub.is_name(base) else None
    modules = _modules(config)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": name.repository if name else base or None,
        "revision": name.revision if name else None,
        "r": config.lora.rank,
        "lora_alpha": config.lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": [modules[name].rpartition(".")[2] for name in config.lora.targets],
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
        "use_dora": False,
    }


def _modules(config: ModelConfig) -> dict[str, str]:
    """The modules' names in a layer of `transformers`, such as self_attn.q_proj, by the projection."""
    table = families.family_of(config).layer_tensors
    named = {name: suffix.removesuffix(".weight") for suffix, (_, name) in table.items() if suffix.endswith(".weight")}
    return {name: module for name, module in named.items() if name in PROJECTIONS}


def _tensors(config: ModelConfig) -> Iterator[tuple[str, str, str]]:
    """PEFT's name of a matrix, its module and our name, of all that the adapters have."""
    modules = _modules(config)
    for name in config.lora.targets:
        yield "lora_A", modules[name], f"{name}_a"
        yield "lora_B", modules[name], f"{name}_b"


def _tensor_name(layer: int, module: str, tensor: str) -> str:
    return f"{_PREFIX}{decoder_tensors.tensor_name(layer, module)}.{tensor}.weight"


def _flat(name: str, rank: int) -> tuple[int, int]:
    return (-1, rank) if name.endswith("_a") else (rank, -1)


def _read_adapters(folder: Path, config: ModelConfig, stored: set[str], where: str) -> dict[str, np.ndarray]:
    path, ours, adapters = folder / WEIGHTS_FILE, config.block_shapes[lora.PART], {}
    names = {
        (layer, name): _tensor_name(layer, module, tensor)
        for tensor, module, name in _tensors(config)
        for layer in range(config.num_layers)
    }
    if missing := [name for name in names.values() if name not in stored]:
        raise ValueError(f"{path}: an adapter of another model: tensor {missing[0]}, which {where} needs, is missing")
    if extra := sorted(stored - set(names.values())):
        raise ValueError(f"{path}: an adapter of another model: tensor {extra[0]} has no place in {where}")
    shapes = huggingface.tensor_shapes(dict.fromkeys(names.values(), path))
    for name, shape in ours.items():
        stacked = np.empty((config.num_layers, *shape), np.float32)
        flat = stacked[0].reshape(_flat(name, config.lora.rank)).shape[::-1]
        for layer in range(config.num_layers):
            tensor = names[layer, name]
            if shapes[tensor] != flat:
                raise ValueError(
                    f"{path}: an adapter of another model: tensor {tensor} has shape {shapes[tensor]}, {where} asks "
                    f"for {flat}"
                )
            stacked[layer] = huggingface.read_tensor(path, tensor).T.reshape(shape)
        adapters[name] = stacked
    return adapters


def _fingerprints(params: Params) -> dict[str, str]:
    return integrity.fingerprints(jax.tree.map(lambda values: jnp.asarray(values, jnp.bfloat16), params))


def _check_base(base: str | None, params: Params, reason: str, where: str) -> None:
    """Raises ValueError naming the first parameter in which the model isn't the one beside which it was trained."""
    if base is None:  # PEFT's own
        return
    there, here = json.loads(base), _fingerprints(params)
    for name in here:
        if there.get(name) != here[name]:
            raise ValueError(f"{reason}it was trained beside other values of {name} than those of {where}")
