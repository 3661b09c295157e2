"""Llama-family Hugging Face folders: config.json and safetensors, whole or sharded."""

import json
import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from safelm import model
from safelm.formats import llama_tensors
from safelm.tokenizer import Tokenizer

CONFIG_FILE = "config.json"
_WEIGHTS_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"
# What our decoder can represent; a key that is absent or null has the first value.
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "model_type": ("llama",),
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "rope_interleaved": (False, None),
    "rope_scaling": (None,),
    "partial_rotary_factor": (None, 1, 1.0),
    "sliding_window": (None,),
    "quantization_config": (None,),
}
_DEFAULT_ROPE = ("rope_type", "type", "rope_theta")


def read_config(folder: Path) -> model.ModelConfig:
    """Our config of the model in a Hugging Face folder.

    Raises:
      ValueError: config.json is not JSON, lacks a size, or asks for what the decoder does not have (biases, another
        activation, scaled rotary positions ...); the message names the key.
    """
    path = folder / CONFIG_FILE
    values = read_json(path)
    values["rope_scaling"] = _refuse_default_rope(values.get("rope_scaling"))
    rope = values.get("rope_parameters") or {}
    if rope:
        llama_tensors.check_expected(f"{path} rope_parameters", rope, {"rope_type": ("default",)})
        if unknown := sorted(set(rope) - {*_DEFAULT_ROPE, "partial_rotary_factor"}):
            raise ValueError(f"{path}: rope_parameters.{unknown[0]} = {rope[unknown[0]]!r} is not supported")
        values.setdefault("partial_rotary_factor", rope.get("partial_rotary_factor"))
    if "model_type" not in values:
        raise ValueError(f"{path}: model_type is missing: not the config of a model")
    llama_tensors.check_expected(str(path), values, _SUPPORTED)

    def size(key: str, default: Any = None) -> Any:
        value = default if values.get(key) is None else values[key]
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"{path}: {key} is missing" if value is None else f"{path}: {key} = {value!r}: no integer")
        return value

    num_heads = size("num_attention_heads")
    return model.ModelConfig(
        vocab_size=size("vocab_size"),
        num_layers=size("num_hidden_layers"),
        d_model=size("hidden_size"),
        d_ff=size("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=size("num_key_value_heads", num_heads),
        head_dim=size("head_dim", size("hidden_size") // num_heads),
        max_seq_len=size("max_position_embeddings", 2048),
        rope_theta=float(rope.get("rope_theta") or values.get("rope_theta") or 10_000.0),
        rms_norm_eps=float(values.get("rms_norm_eps", 1e-6)),
        tie_embeddings=bool(values.get("tie_word_embeddings", False)),
        init_std=float(values.get("initializer_range", 0.02)),
        dtype="float32",
    )


def _refuse_default_rope(scaling: Any) -> Any:
    """Null for a scaling that scales nothing, as some exports spell it."""
    if isinstance(scaling, dict) and scaling.get("rope_type", scaling.get("type")) == "default":
        return None
    return scaling


def read_folder(folder: Path) -> tuple[model.ModelConfig, model.Params]:
    """The model in a Hugging Face folder; parameters in float32 as numpy arrays.

    Raises:
      FileNotFoundError: no config, no safetensors, or a shard named in the index is missing.
      ValueError: see `read_config` and `llama_tensors.params_from_tensors`; or a truncated file.
    """
    config = read_config(folder)
    files = tensor_files(folder)

    def read(name: str) -> np.ndarray:
        with open_tensors(files[name]) as file:
            return np.asarray(file.get_tensor(name).astype(jnp.float32))

    return config, llama_tensors.params_from_tensors(config, files, read, where=str(folder))


def write_folder(
    folder: Path, config: model.ModelConfig, params: model.Params, tokenizer: Tokenizer, *, dtype: str = "float32"
) -> None:
    """Writes a folder that `transformers` loads with `from_pretrained`: config, weights in `dtype`, tokenizer.

    The harm tag stays the last row of the embedding; rows that only pad the vocabulary are left out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    tensors = {
        name: np.ascontiguousarray(tensor.astype(target))
        for name, tensor in llama_tensors.tensors_from_params(config, params).items()
    }
    safetensors.numpy.save_file(tensors, folder / _WEIGHTS_FILE, metadata={"format": "pt"})
    (folder / _WEIGHTS_FILE).chmod(0o644)
    _write_json(folder / CONFIG_FILE, _config_json(config, tokenizer, dtype))
    tokenizer.save(str(folder))


def _config_json(config: model.ModelConfig, tokenizer: Tokenizer, dtype: str) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_seq_len,
        "rope_theta": config.rope_theta,  # transformers 4
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},  # transformers 5
        "rms_norm_eps": config.rms_norm_eps,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
        "torch_dtype": dtype,  # transformers 4
        "dtype": dtype,  # transformers 5
        "bos_token_id": (*tokenizer.conventions.begin_ids, tokenizer.eos_id)[0],
        "eos_token_id": tokenizer.eos_id,
        "use_cache": True,
    }


def tensor_files(folder: Path) -> dict[str, Path]:
    """The file that holds each tensor of a folder, whole or sharded.

    Raises FileNotFoundError if there is no safetensors file or one named in the index is missing, ValueError for a
    broken index.
    """
    if (folder / _INDEX_FILE).exists():
        weight_map = read_json(folder / _INDEX_FILE).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(f"{folder / _INDEX_FILE}: weight_map is missing")
        files = {name: folder / str(file) for name, file in weight_map.items()}
        for name, file in files.items():
            if not file.exists():
                raise FileNotFoundError(f"{file}: no such file, but {_INDEX_FILE} says that it holds {name}")
        return files
    if not (folder / _WEIGHTS_FILE).exists():
        raise FileNotFoundError(f"{folder}: has neither {_WEIGHTS_FILE} nor {_INDEX_FILE}")
    with open_tensors(folder / _WEIGHTS_FILE) as file:
        return dict.fromkeys(file.keys(), folder / _WEIGHTS_FILE)


def open_tensors(path: Path) -> Any:
    """A safetensors file, open for reading; ValueError if it isn't whole."""
    try:
        return safetensors.safe_open(path, framework="flax")  # numpy has no bfloat16
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from error


def read_json(path: Path) -> dict[str, Any]:
    """A file that holds a JSON object; ValueError names it if it doesn't."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: not a JSON object")
    return values


def _write_json(path: Path, values: dict[str, Any]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(values, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
