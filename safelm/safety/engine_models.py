"""Loads a language model that judges or writes on our own engine."""

import dataclasses

from safelm.formats.sources import Model, read_model
from safelm.safety.embedding import installed_path


def read_engine_model(source: str, dtype: str, *, where: str) -> tuple[str, Model]:
    """Returns the path or URL of a model, and the model.

    Args:
      source: a checkpoint of ours, a Hugging Face folder, a GGUF file, or "smollm2" (installed weights).
      dtype: of the computation, float32 or bfloat16; empty for the model's own.
      where: the caller's name, for messages.

    Raises FileNotFoundError if there is no model, ValueError for an unsupported model or dtype.
    """
    if dtype not in ("", "float32", "bfloat16"):
        raise ValueError(f"{where}: dtype={dtype!r}: one of float32, bfloat16")
    place = str(installed_path(source)) if source == "smollm2" else source
    config, params, tokenizer = read_model(place)
    return place, (dataclasses.replace(config, dtype=dtype or config.dtype), params, tokenizer)
