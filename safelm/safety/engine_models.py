"""Loads a language model that judges or writes on our own engine."""

import dataclasses
from collections.abc import Sequence

from safelm.formats.sources import Model, read_model
from safelm.inference import Engine
from safelm.io import hub
from safelm.models import decoder as model
from safelm.safety.embedding import installed_path
from safelm.text.prompting import Frame


def read_engine_model(source: str, dtype: str, *, where: str, chat_template: str = "") -> tuple[str, Model]:
    """Returns the path, URL or pinned name of a model, and the model.

    Args:
      source: a checkpoint of ours, a Hugging Face folder, `hf:ORG/NAME[@REVISION]`, a GGUF file, or "smollm2"
        (installed weights).
      dtype: of the computation, float32 or bfloat16; empty for the model's own.
      chat_template: a name or file that replaces the model's own template.
      where: the caller's name, for messages.

    Raises FileNotFoundError if there is no model, ValueError for an unsupported model or dtype.
    """
    if dtype not in ("", "float32", "bfloat16"):
        raise ValueError(f"{where}: dtype={dtype!r}: one of float32, bfloat16")
    place = str(installed_path(source)) if source == "smollm2" else hub.pinned(source)
    config, params, tokenizer = read_model(place, chat_template=chat_template)
    return place, (dataclasses.replace(config, dtype=dtype or config.dtype), params, tokenizer)


def judge_engine(
    config: model.ModelConfig,
    params: model.Params,
    frames: Sequence[Frame],
    *,
    max_rows: int,
    batch_tokens: int,
    harm_tag_id: int | None = None,
) -> Engine:
    """An engine for questions that share few frames: it reads what stands before a document once per frame.

    Args:
      max_rows: documents answered at once.
      batch_tokens: tokens of documents read in one forward pass, padding included.
      harm_tag_id: of the vocabulary, if answers may be free text; None if P(tag) in an answer doesn't matter.
    """
    engine = Engine(
        dataclasses.replace(config, attention="xla", remat="none"),
        params,
        harm_tag_id=harm_tag_id,
        slots=max_rows,
        max_tokens=max_rows * config.max_seq_len,
        read_at_once=batch_tokens,
    )
    for frame in frames:
        if frame.before:
            engine.keep_prefix(frame.before)
    return engine
