"""Reads and writes decoders of our families in Hugging Face folders: config.json and safetensors, whole or sharded."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from safelm.formats import decoder_tensors, families
from safelm.formats.json_fields import JsonFields, read_json
from safelm.io import hub
from safelm.io.files import write_whole
from safelm.models import decoder as model
from safelm.text.tokenizer import Tokenizer

CONFIG_FILE = "config.json"
_WEIGHTS_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"
_SAW_TAG = "safelm_saw_tag"  # of config.json: ours alone, transformers leaves it as it is
_READABLE = ("F32", "BF16", "F16", "F64")


def read_config(folder: Path) -> model.ModelConfig:
    """Reads the config of the model in a Hugging Face folder.

    Raises:
      ValueError: config.json is not JSON, is of an unknown family, lacks a size, or has an unsupported feature (biases,
        another activation, other rotary positions ...); the message names the key.
    """
    path = folder / CONFIG_FILE
    values = read_json(path)
    family = families.family_named(values.get("model_type"), where=str(path))
    fields = JsonFields(str(path), {**family.defaults, **values})
    fields.expect(family.expected)
    num_heads, d_model = fields.size("num_attention_heads"), fields.size("hidden_size")
    return decoder_tensors.make_config(
        str(path),
        vocab_size=fields.size("vocab_size"),
        num_layers=fields.size("num_hidden_layers"),
        d_model=d_model,
        d_ff=fields.size("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=fields.size("num_key_value_heads", num_heads),
        head_dim=fields.size("head_dim", max(1, d_model // num_heads)),
        max_seq_len=fields.size("max_position_embeddings", 2048),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        init_std=fields.number("initializer_range", 0.02),
        dtype="float32",
        **family.read(fields),
    )


def read_folder(folder: Path) -> tuple[model.ModelConfig, model.Params]:
    """Reads the model in a Hugging Face folder; parameters are numpy arrays in float32.

    Raises:
      FileNotFoundError: the config, the safetensors file or a shard named in the index is missing.
      ValueError: as in `read_config` and `decoder_tensors.params_from_tensors`, or a file is truncated.
    """
    config = read_config(folder)
    files = tensor_files(folder)
    shapes = tensor_shapes(files)

    def read(name: str) -> np.ndarray:
        return read_tensor(files[name], name)

    return config, decoder_tensors.params_from_tensors(config, shapes, read, where=str(folder))


def saw_tag(folder: Path) -> bool | None:
    """Whether the model in a folder was trained on the harm tag, as `write_folder` was told; None if it doesn't say.

    Raises ValueError for another value than true and false.
    """
    fields = JsonFields(str(folder / CONFIG_FILE), read_json(folder / CONFIG_FILE))
    return None if fields.values.get(_SAW_TAG) is None else fields.flag(_SAW_TAG, False)


def write_folder(
    folder: Path,
    config: model.ModelConfig,
    params: model.Params,
    tokenizer: Tokenizer,
    *,
    dtype: str = "float32",
    saw_tag: bool | None = None,
) -> None:
    """Writes a folder that `transformers` loads with `from_pretrained`: config, weights in `dtype`, tokenizer.

    The harm tag stays the last row of the embedding; padding rows are left out. `saw_tag`: whether the model was
    trained on the tag, None if unknown; kept in config.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    tensors = {
        name: np.ascontiguousarray(tensor.astype(target))
        for name, tensor in decoder_tensors.tensors_from_params(config, params).items()
    }
    safetensors.numpy.save_file(tensors, folder / _WEIGHTS_FILE, metadata={"format": "pt"})
    (folder / _WEIGHTS_FILE).chmod(0o644)
    fields = _config_json(config, tokenizer, dtype) | ({} if saw_tag is None else {_SAW_TAG: saw_tag})
    write_whole(folder / CONFIG_FILE, json.dumps(fields, indent=2) + "\n")
    tokenizer.save(str(folder))


def _config_json(config: model.ModelConfig, tokenizer: Tokenizer, dtype: str) -> dict[str, Any]:
    family = families.family_of(config)
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
        "torch_dtype": dtype,  # transformers 4
        "dtype": dtype,  # transformers 5
        "bos_token_id": (*tokenizer.conventions.begin_ids, tokenizer.eos_id)[0],
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": None,  # in transformers a padding id's embedding gets no gradient, and some families have one
        "use_cache": True,
        **family.write(config),
    }


def tensor_files(folder: Path) -> dict[str, Path]:
    """The file of each tensor in a folder, whole or sharded.

    Raises FileNotFoundError if there is no safetensors file or one named in the index is missing, ValueError for a
    broken index.
    """
    if (folder / _INDEX_FILE).exists():
        weight_map = read_json(folder / _INDEX_FILE).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(f"{folder / _INDEX_FILE}: weight_map is missing")
        for name, file in weight_map.items():
            if not isinstance(file, str) or not file or "/" in file or file.startswith("."):
                raise ValueError(f"{folder / _INDEX_FILE}: weight_map.{name} = {file!r}: want a file of this folder")
            if not (folder / file).is_file():
                raise FileNotFoundError(f"{folder / file}: no such file, but {_INDEX_FILE} says that it holds {name}")
        return {name: folder / file for name, file in weight_map.items()}
    if not (folder / _WEIGHTS_FILE).exists():
        pickles = sorted(path.name for path in folder.glob("*") if path.suffix in hub.PICKLES)
        if pickles:
            raise FileNotFoundError(
                f"{folder}: has no safetensors, only pickles ({pickles[0]}), which may run code and are never loaded"
            )
        raise FileNotFoundError(f"{folder}: has neither {_WEIGHTS_FILE} nor {_INDEX_FILE}")
    with open_tensors(folder / _WEIGHTS_FILE) as file:
        return dict.fromkeys(file.keys(), folder / _WEIGHTS_FILE)


def tensor_shapes(files: Mapping[str, Path]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor, from the files' headers.

    Raises ValueError for a tensor that its file lacks or whose number format is unsupported.
    """
    names_of: dict[Path, list[str]] = {}
    for name, path in files.items():
        names_of.setdefault(path, []).append(name)
    shapes = {}
    for path, names in names_of.items():
        with open_tensors(path) as file:
            shapes |= {name: tuple(_header(file, path, name).get_shape()) for name in names}
    return shapes


def read_tensor(path: Path, name: str) -> np.ndarray:
    """A tensor in float32. Raises ValueError if its file lacks it or its number format is unsupported."""
    with open_tensors(path) as file:
        _header(file, path, name)
        return np.asarray(file.get_tensor(name).astype(jnp.float32))


def _header(file: Any, path: Path, name: str) -> Any:
    try:
        header = file.get_slice(name)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: holds no tensor {name}, but {_INDEX_FILE} says that it does") from error
    if header.get_dtype() not in _READABLE:
        raise ValueError(f"{path}: tensor {name} is of {header.get_dtype()}: want one of {', '.join(_READABLE)}")
    return header


def open_tensors(path: Path) -> Any:
    """Opens a safetensors file for reading. Raises ValueError if it is cut short."""
    try:
        return safetensors.safe_open(path, framework="flax")  # numpy has no bfloat16
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from error
