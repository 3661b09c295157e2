"""From prompts to generations: checks, batches, and the decoder that a method asks for."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import jax
import numpy as np
import tqdm

from safelm import model
from safelm.inference import beam, forward, safe_beam, sampling
from safelm.inference.beams import BeamState
from safelm.inference.methods import Beam, Greedy, Method, SafeBeam, looks_ahead
from safelm.inference.prompts import PromptBatch, batches, check_prompts
from safelm.inference.sampling import SequenceState
from safelm.model_config import ModelConfig

StoppedBy = Literal["eos", "tag", "length"]
_STOPPED_BY: dict[int, StoppedBy] = {
    forward.RUNNING: "length",
    forward.ENDED_BY_EOS: "eos",
    forward.ENDED_BY_TAG: "tag",
}


@dataclasses.dataclass(frozen=True)
class Generation:
    """What a prompt was continued with.

    Attributes:
      tokens: the new ids, the ending one (EOS, or the tag) included.
      logprob: of all of them together under the model (nats), neither tempered nor filtered.
      tag_probs: for every token P(tag | prompt and tokens up to and with it); for an ending token that of the text
        before it, as ending adds no text. Empty if the vocabulary has no tag.
    """

    tokens: list[int]
    logprob: float
    tag_probs: list[float]
    stopped_by: StoppedBy

    @property
    def finished(self) -> bool:
        """Whether the sequence ended by itself, not at `max_new_tokens`."""
        return self.stopped_by != "length"

    @property
    def text_tokens(self) -> list[int]:
        """The tokens without the one that ended the sequence."""
        return self.tokens[:-1] if self.finished else self.tokens


def generate(
    config: ModelConfig,
    params: model.Params,
    prompts: Sequence[Sequence[int]],
    method: Method,
    *,
    max_new_tokens: int,
    eos_id: int,
    harm_tag_id: int | None,
    seed: int = 0,
    seeds: Sequence[int] | None = None,
    batch_size: int = 64,
    show_progress: bool = False,
) -> list[Generation]:
    """Continues every prompt; the results are in the prompts' order.

    A prompt's result depends on neither the batch it is in nor its neighbours (up to float rounding): sampling draws
    from (seed, the prompt's index, step). An empty prompt starts from `eos_id`, as after a document's end. One program
    is compiled per (method, max_new_tokens, bucket of prompt lengths, bucket of batch sizes).

    Args:
      max_new_tokens: at most so many tokens, the ending one included.
      seeds: one a prompt, in place of `seed` and the prompt's index: then its place doesn't matter either.
      batch_size: prompts decoded at once; each takes num_beams rows of the cache.
      show_progress: a bar over batches (quiet when not on a terminal).

    Raises:
      ValueError: a prompt and `max_new_tokens` don't fit the context, an id is outside the vocabulary, or the method
        needs the harm tag and the vocabulary has none.
    """
    _check_ids(config, method, eos_id, harm_tag_id)
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}={value}: must be at least 1")
    checked = check_prompts(config, prompts, max_new_tokens=max_new_tokens, eos_id=eos_id)
    ends = forward.Ends(eos_id, harm_tag_id, method.tag_candidate)
    generations: dict[int, Generation] = {}
    with tqdm.tqdm(total=len(checked), unit="prompt", disable=None if show_progress else True) as progress:
        for batch in batches(checked, max_rows=batch_size, max_len=config.max_seq_len - max_new_tokens):
            own_seeds = seed if seeds is None else [seeds[index] for index in batch.indices]
            state = _decode(config, params, batch, method, ends, max_new_tokens, own_seeds)
            generations |= zip(batch.indices, _read(state, len(batch.indices), harm_tag_id), strict=True)
            progress.update(len(batch.indices))
    return [generations[index] for index in range(len(checked))]


def _decode(
    config: ModelConfig,
    params: model.Params,
    batch: PromptBatch,
    method: Method,
    ends: forward.Ends,
    max_new_tokens: int,
    seed: int | Sequence[int],
) -> SequenceState | BeamState:
    args = (config, params, batch.tokens_PT, batch.lengths_P)
    static = {"ends": ends, "max_new_tokens": max_new_tokens}
    if isinstance(method, Beam):
        return beam.decode(*args, method=method, **static)
    if isinstance(method, SafeBeam):
        return safe_beam.decode(*args, method=method, **static)
    if isinstance(method, Greedy):
        return sampling.decode(*args, None, method=method, **static)
    row_numbers = np.zeros(len(batch.lengths_P), np.uint32)
    row_numbers[: len(batch.indices)] = batch.indices if isinstance(seed, int) else seed
    if isinstance(seed, int):
        keys_P = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seed), row_numbers)
    else:
        keys_P = jax.vmap(jax.random.key)(row_numbers)
    return sampling.decode(*args, keys_P, method=method, **static)


def _read(state: SequenceState | BeamState, num_rows: int, harm_tag_id: int | None) -> list[Generation]:
    """The decoded rows on the host; of beams the best, which stands first."""
    if isinstance(state, BeamState):
        device = (state.tokens_PWT, state.tag_log_probs_PWT, state.num_tokens_PW, state.log_prob_PW, state.ends_PW)
        host = [array[:num_rows, 0] for array in jax.device_get(device)]
    else:
        device = (state.tokens_PT, state.tag_log_probs_PT, state.num_tokens_P, state.log_prob_P, state.ends_P)
        host = [array[:num_rows] for array in jax.device_get(device)]
    rows = []
    for tokens, tag_log_probs, length, log_prob, end in zip(*host, strict=True):
        rows.append(
            Generation(
                tokens=tokens[:length].tolist(),
                logprob=float(log_prob),
                tag_probs=[] if harm_tag_id is None else np.exp(tag_log_probs[:length]).tolist(),
                stopped_by=_STOPPED_BY[int(end)],
            )
        )
    return rows


def _check_ids(config: ModelConfig, method: Method, eos_id: int, harm_tag_id: int | None) -> None:
    for name, token in (("eos_id", eos_id), ("harm_tag_id", harm_tag_id)):
        if token is not None and not 0 <= token < config.vocab_size:
            raise ValueError(f"{name}={token} is not in the model's vocabulary of {config.vocab_size}")
    if eos_id == harm_tag_id:
        raise ValueError(f"eos_id and harm_tag_id are both {eos_id}")
    name = type(method).__name__
    if harm_tag_id is None and (looks_ahead(method) or method.tag_candidate == "stop"):
        raise ValueError(f"{name} needs a model with the harm tag, and this vocabulary has none (harm_tag_id=None)")
    for field in ("num_beams", "num_candidates"):
        if (wanted := getattr(method, field, 0)) > config.vocab_size:
            raise ValueError(f"{name}: {field}={wanted} is more than the vocabulary of {config.vocab_size}")
