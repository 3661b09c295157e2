"""Reads a model of any kind: our checkpoint, a Hugging Face folder, a hub's model by name, or a GGUF file."""

import dataclasses
import logging
from pathlib import Path

from safelm.checkpoints import checkpoint
from safelm.formats import decoder_tensors, gguf, huggingface
from safelm.io import gguf_file, hub, remote
from safelm.models import decoder as model
from safelm.tags import HARM_TAG
from safelm.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

Model = tuple[model.ModelConfig, model.Params, Tokenizer]


def source_kind(source: str) -> str:
    """The kind of model at `source`: "safelm", "huggingface" or "gguf".

    Raises:
      FileNotFoundError: nothing is there.
      ValueError: it is none of the three.
    """
    path = Path(source)
    if hub.is_name(source):
        return "huggingface"
    if remote.is_remote(source):
        return "safelm"
    if not path.exists():
        raise FileNotFoundError(f"{source}: no such file or folder")
    if path.is_file():
        with open(path, "rb") as file:
            if file.read(len(gguf_file.MAGIC)) == gguf_file.MAGIC:
                return "gguf"
        raise ValueError(f"{source}: not a GGUF file; a Hugging Face model is given as its folder")
    if (path / "checkpoints").is_dir():
        return "safelm"
    if (path / huggingface.CONFIG_FILE).exists():
        return "huggingface"
    raise ValueError(f"{source}: holds neither checkpoints/ (ours) nor config.json (Hugging Face)")


def load_tokenizer(source: str) -> Tokenizer:
    """The tokenizer of the model at `source`, of any kind."""
    return checkpoint.load_tokenizer(source) if source_kind(source) == "safelm" else Tokenizer.from_pretrained(source)


def read_meta(source: str) -> checkpoint.Meta:
    """The record of the model at `source`, of any kind, as `checkpoint.model_meta` has it; weights are not read."""
    kind = source_kind(source)
    if kind == "safelm":
        checkpoints, _, meta = checkpoint.open_checkpoint(source)
        checkpoints.close()
        return meta
    place = Path(hub.folder(source, with_weights=False))
    config = (gguf.read_config if kind == "gguf" else huggingface.read_config)(place)
    tokenizer = Tokenizer.from_pretrained(source)
    return checkpoint.model_meta(dataclasses.replace(config, vocab_size=tokenizer.vocab_size), tokenizer)


def saw_tag(source: str, *, step: int | None = None) -> bool | None:
    """Whether the model at `source` was trained on the harm tag; None if nothing says so.

    `step`: of a checkpoint of ours; None for the newest.
    """
    kind = source_kind(source)
    if kind == "safelm":
        return checkpoint.saw_tag(source, step=step)
    if not _has_tag(source, kind):
        return False
    return huggingface.saw_tag(Path(hub.folder(source, with_weights=False))) if kind == "huggingface" else None


def _has_tag(source: str, kind: str) -> bool:
    path = Path(hub.folder(source, with_weights=False))
    if kind == "gguf":
        return gguf.has_token(path, HARM_TAG)
    return HARM_TAG in (path / "tokenizer.json").read_text(encoding="utf-8")


def read_model(source: str, *, step: int | None = None, fit_vocabulary: bool = True, chat_template: str = "") -> Model:
    """Reads the model at `source`, of any kind, with the harm tag in its vocabulary.

    Args:
      source: a folder, file or URL, or a name on a hub (`safelm.io.hub`).
      step: of a checkpoint of ours; None for the newest.
      fit_vocabulary: whether to resize the embedding to the tokenizer's ids.
      chat_template: a name or file that replaces the model's own template, see `safelm.text.named_templates`.
    """
    config, params, tokenizer = _read_model(source, step, fit_vocabulary)
    return config, params, tokenizer.with_chat_template(chat_template)


def _read_model(source: str, step: int | None, fit_vocabulary: bool) -> Model:
    kind = source_kind(source)
    if kind == "safelm":
        return checkpoint.load_for_inference(source, step=step)
    if step is not None:
        raise ValueError(f"step={step}: only our own checkpoints have steps, {source} is of kind {kind}")
    source = hub.pinned(source)
    config, params = (gguf.read_file if kind == "gguf" else huggingface.read_folder)(Path(hub.folder(source)))
    tokenizer = Tokenizer.from_pretrained(source)
    if not fit_vocabulary:
        return config, params, tokenizer
    return _fit_vocabulary(config, params, tokenizer, has_tag=_has_tag(source, kind))


def _fit_vocabulary(config: model.ModelConfig, params: model.Params, tokenizer: Tokenizer, *, has_tag: bool) -> Model:
    """Resizes the embedding to the tokenizer's ids; a new tag's row starts as the mean of the others."""
    num_trained = min(config.vocab_size, tokenizer.vocab_size)
    if not has_tag:
        num_trained = min(num_trained, tokenizer.harm_tag_id)
    if config.vocab_size > tokenizer.vocab_size:
        log.info("ids %d to %d have no token: dropped", tokenizer.vocab_size, config.vocab_size - 1)
    if num_trained < tokenizer.vocab_size:
        new = f"ids from {num_trained} to {tokenizer.vocab_size - 1} ({HARM_TAG})"
        log.info("%s are new: their embedding starts as the mean of the %d others", new, num_trained)
    config, params = decoder_tensors.resize_vocabulary(config, params, tokenizer.vocab_size, num_trained=num_trained)
    return config, params, tokenizer
