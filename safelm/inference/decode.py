"""Continues a fixed list of prompts, by an engine that does nothing else."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

from jax.sharding import Mesh

from safelm.inference.engine import Engine
from safelm.inference.methods import Method, check_ids
from safelm.inference.planning import Planner
from safelm.inference.programs import step_shape
from safelm.inference.prompts import check_prompt
from safelm.inference.requests import EngineRequest, Update
from safelm.inference.weights import Weights
from safelm.io.progress import Bar
from safelm.models import decoder as model
from safelm.models.config import ModelConfig

StoppedBy = Literal["eos", "tag", "length", "withheld"]


@dataclasses.dataclass
class Generation:
    """A prompt's continuation.

    Attributes:
      tokens: the new ids, including the ending one (EOS or the tag).
      logprob: log-probability of all of them under the model (nats), without temperature or filters; 0 of a withheld
        answer.
      tag_probs: P(tag | prompt and tokens up to and including this one) for every token; for an ending token that of
        the text before it, since ending adds no text. Empty if the vocabulary has no tag, and of a withheld answer.
        With a monitor, its levels.
      stopped_by: "withheld" if a knob or a method put the tokens in place of the answer.
      watched: log-probs of the request's `watch_ids` as the first token.
    """

    tokens: list[int]
    logprob: float
    tag_probs: list[float]
    stopped_by: StoppedBy
    watched: tuple[float, ...] = ()

    @property
    def finished(self) -> bool:
        """Whether the sequence ended by itself, not at `max_new_tokens`."""
        return self.stopped_by != "length"

    @property
    def text_tokens(self) -> list[int]:
        """The tokens without the one that ended the sequence."""
        return self.tokens[:-1] if self.stopped_by in ("eos", "tag") else self.tokens


def generate(
    config: ModelConfig,
    params: model.Params | Weights,
    prompts: Sequence[Sequence[int]],
    method: Method,
    *,
    max_new_tokens: int,
    end_ids: Sequence[int],
    harm_tag_id: int | None,
    seed: int = 0,
    seeds: Sequence[int] | None = None,
    batch_size: int = 64,
    weights: str = "",
    lookup_tokens: int = 0,
    mesh: Mesh | None = None,
    planner: Planner | None = None,
    show_progress: bool = False,
) -> list[Generation]:
    """Continues every prompt; the results are in the prompts' order.

    A prompt's result does not depend on its batch (up to float rounding), since sampling draws from (seed, the prompt's
    index, step). An `Engine` of `batch_size` slots does the work and gives a finished prompt's slot to the next one.

    Args:
      end_ids: ids of which any ends a text.
      max_new_tokens: the most new tokens, including the ending one.
      seeds: one per prompt, in place of `seed` and the prompt's index, so that order doesn't matter either.
      batch_size: prompts decoded at once; each takes num_beams rows of the cache.
      weights: one of `weights.WEIGHTS_DTYPES`; empty for the config's dtype.
      lookup_tokens: guessed and checked at once, see `Engine`.
      mesh: splits weights and cache over its devices; None for the first device.
      planner: of a method or knob that needs plans (`safelm.inference.planning.planner`).
      show_progress: whether to show a bar over prompts (only on a terminal).

    Raises:
      ValueError: a prompt and `max_new_tokens` don't fit the context, an id is outside the vocabulary, the method needs
        the harm tag and the vocabulary has none, or a mesh doesn't divide the model.
    """
    if planner is not None and planner.flag_id is not None:
        harm_tag_id = planner.flag_id
    check_ids(config, method, end_ids, harm_tag_id)
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: must be at least 1")
    checked = [
        check_prompt(config, prompt, max_new_tokens=max_new_tokens, name=f"prompt {index}")
        for index, prompt in enumerate(prompts)
    ]
    slots = min(batch_size, max(1, len(checked))) * step_shape(method).num_rows
    engine = Engine(
        config,
        params,
        harm_tag_id=harm_tag_id,
        slots=slots,
        max_tokens=slots * config.max_seq_len,
        weights=weights,
        lookup_tokens=lookup_tokens,
        mesh=mesh,
    )
    seeds = [(seed & 0xFFFFFFFF) << 32 | index for index in range(len(checked))] if seeds is None else seeds
    requests = [
        EngineRequest(tuple(prompt), method, max_new_tokens, tuple(end_ids), own_seed, plan=planner)
        for prompt, own_seed in zip(checked, seeds, strict=True)
    ]
    return run_all(engine, requests, show_progress=show_progress)


def run_all(
    engine: Engine, requests: Sequence[EngineRequest], *, show_progress: bool = False, unit: str = "prompt"
) -> list[Generation]:
    """An idle engine's results for the requests, shortest prompts first.

    Raises RuntimeError for a request that ends with an error.
    """
    shortest_first = sorted(range(len(requests)), key=lambda index: len(requests[index].prompt))
    index_of = {engine.submit(requests[index]): index for index in shortest_first}
    generations = [Generation([], 0.0, [], "length") for _ in requests]
    try:
        with Bar(total=len(requests), unit=unit, disable=None if show_progress else True) as progress:
            while not engine.is_idle:
                for update in engine.step():
                    _add(generations[index_of[update.request_id]], update)
                    progress.update(bool(update.finished))
    finally:
        engine.clear()  # also where it was interrupted
    return generations


def _add(generation: Generation, update: Update) -> None:
    if update.finished == "error":
        raise RuntimeError(update.error)
    generation.tokens.extend(update.tokens)
    generation.tag_probs.extend(update.tag_probs)
    generation.watched += update.watched
    generation.logprob, generation.stopped_by = update.log_prob, update.finished or "length"
