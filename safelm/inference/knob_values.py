"""The values of a knob on prompts, by which it decides: for calibrating it."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64

from safelm.inference.decode import run_all
from safelm.inference.engine import Engine
from safelm.inference.knobs import REFUSAL, BoundKnob
from safelm.inference.methods import Greedy, Method
from safelm.inference.programs import step_shape
from safelm.inference.prompts import check_prompt
from safelm.inference.requests import EngineRequest
from safelm.models import decoder as model
from safelm.models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Answering:
    """How answers are made whose flags are looked for.

    Attributes:
      max_new_tokens: the most new tokens of an answer.
      end_ids: ids of which any ends it.
    """

    method: Method
    max_new_tokens: int
    end_ids: Sequence[int]
    seed: int = 0
    batch_size: int = 64


def knob_values(
    config: ModelConfig,
    params: model.Params,
    prompts: Sequence[Sequence[int]],
    knob: BoundKnob,
    answering: Answering,
    *,
    harm_tag_id: int | None,
    **settings: Any,
) -> Float64[np.ndarray, "P K"]:
    """The knob's K values on each prompt: of `refusal` at the answer's start, of `red_flag` the largest along it.

    Args:
      harm_tag_id: of the vocabulary; None if it has no tag.
      **settings: those of `Engine`, such as `weights`.

    Raises ValueError as `safelm.inference.generate` does.
    """
    is_refusal = knob.kind == REFUSAL
    method = Greedy() if is_refusal else answering.method
    new = 1 if is_refusal else answering.max_new_tokens
    requests = [
        EngineRequest(
            tuple(check_prompt(config, prompt, max_new_tokens=new, name=f"prompt {index}")),
            method,
            new,
            tuple(answering.end_ids),
            (answering.seed & 0xFFFFFFFF) << 32 | index,
            watch_ids=knob.token_ids,
        )
        for index, prompt in enumerate(prompts)
    ]
    slots = min(answering.batch_size, max(1, len(requests))) * step_shape(method).num_rows
    watched_tag = harm_tag_id if knob.flag_id is None else knob.flag_id
    sizes = {"slots": slots, "max_tokens": slots * config.max_seq_len}
    engine = Engine(config, params, harm_tag_id=watched_tag, **sizes, **settings)
    found = run_all(engine, requests, show_progress=True)
    if is_refusal:
        return np.array([knob.values_at_start(each.watched) for each in found], np.float64)
    largest = [max([*knob.values_at_start(each.watched), *each.tag_probs]) for each in found]
    return np.array(largest, np.float64)[:, None]
