"""A request's state in the engine."""

import dataclasses
import operator
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from safelm.inference import asked, programs
from safelm.inference.beams import Tried
from safelm.inference.prefixes import Behind
from safelm.inference.prompts import bucket
from safelm.inference.requests import EngineRequest, Finished, TraceCandidate, Update
from safelm.inference.token_mask import MaskedText

_FINISHED: dict[int, Finished] = {asked.RUNNING: "length", asked.ENDED_BY_EOS: "eos", asked.ENDED_BY_TAG: "tag"}


@dataclasses.dataclass(eq=False)
class Entry:
    """A request with a slot.

    Attributes:
      num_tokens: number of tokens generated so far.
      tokens: those already told.
      behind: what was read of the prompt so far, or found, if it isn't read to its end.
      has_begun: whether reading it has begun.
      is_read: whether it was read to its end.
      mask: the mask of its text, if any.
      watched: log-probs of watched ids of all prompts read together, and this one's row; None once reported.
    """

    request_id: int
    request: EngineRequest
    prompt: list[int]
    behind: Behind | None = None
    has_begun: bool = False
    is_read: bool = False
    mask: MaskedText | None = None
    watched: Any = None
    num_tokens: int = 0
    tokens: list[int] = dataclasses.field(default_factory=list)
    trace: list[tuple[TraceCandidate, ...]] = dataclasses.field(default_factory=list)

    @property
    def need(self) -> int:
        """The cache tokens that a row will need in the end."""
        return len(self.prompt) + self.request.max_new_tokens

    def settings(self) -> tuple[Any, ...]:
        """The row that `asked.ask` takes."""
        request = self.request
        return len(self.prompt), request.max_new_tokens, request.end_ids, request.method, request.seed

    def note(self, tried: Tried | None, slot: int, num_tokens: int) -> None:
        """Adds the request's steps up to `num_tokens` to its trace, from `tried` of a block of steps."""
        if not self.request.want_trace or tried is None:
            return
        for step in range(num_tokens - self.num_tokens):
            self.trace.append(_candidates(jax.tree.map(operator.itemgetter((step, slot)), tried)))

    def update(self, outcome: Sequence[Any], *, is_over: bool, has_tag: bool) -> Update:
        """The request's next update, from the outcome of its slot; `has_tag`: with P(tag) or a monitor's levels."""
        tokens_T, tag_log_probs_T, num_tokens, log_prob, end = outcome
        if np.isnan(log_prob):
            return Update(self.request_id, finished="error", error="the model's log-probs are not numbers")
        news = slice(len(self.tokens), int(num_tokens))
        self.tokens += tokens_T[news].tolist()
        return Update(
            self.request_id,
            tokens=tuple(tokens_T[news].tolist()),
            tag_probs=tuple(np.exp(tag_log_probs_T[news]).tolist()) if has_tag else (),
            finished=_FINISHED[int(end)] if is_over else "",
            log_prob=float(log_prob),
            watched=self._take_watched(),
            trace=tuple(self.trace) if is_over and self.trace else None,
        )

    def _take_watched(self) -> tuple[float, ...]:
        if self.watched is None:
            return ()
        (found_PI, row), self.watched = self.watched, None
        return tuple(np.asarray(found_PI)[row, : len(self.request.watch_ids)].tolist())


def _candidates(tried: Tried) -> tuple[TraceCandidate, ...]:
    """One prompt's candidates of a step."""
    beam_at = {int(place): beam for beam, place in enumerate(tried.place_PW) if tried.is_beam_PW[beam]}
    num_candidates = len(tried.tokens_PM) // len(tried.place_PW)
    return tuple(
        TraceCandidate(
            parent=place // num_candidates,
            token=None if tried.is_held_PM[place] else int(tried.tokens_PM[place]),
            log_prob=float(tried.log_prob_PM[place]),
            tag_prob=None if np.isnan(tried.tag_log_prob_PM[place]) else float(np.exp(tried.tag_log_prob_PM[place])),
            outcome="dropped" if tried.is_dropped_PM[place] else "kept" if place in beam_at else "outranked",
            beam=beam_at.get(place),
        )
        for place in np.flatnonzero(np.isfinite(tried.log_prob_PM)).tolist()
    )


def watch(entries: Sequence[Entry], logits_GV: jax.Array) -> None:
    """Computes the log-probs of the ids that these requests watch."""
    most = max(len(entry.request.watch_ids) for entry in entries)
    if not most:
        return
    ids_GI = np.zeros((len(logits_GV), bucket(most, 8, np.inf)), np.int32)
    for row, entry in enumerate(entries):
        ids_GI[row, : len(entry.request.watch_ids)] = entry.request.watch_ids
    found_GI = programs.log_probs_of(logits_GV, ids_GI)
    for row, entry in enumerate(entries):
        entry.watched = (found_GI, row)
