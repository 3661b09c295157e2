"""The engine's requests and updates."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

from safelm.inference.adjustments import NEUTRAL, Adjustment
from safelm.inference.methods import Method
from safelm.inference.token_mask import MakeMask

Finished = Literal["", "eos", "tag", "length", "withheld", "cancelled", "error"]
Outcome = Literal["kept", "dropped", "outranked"]


@dataclasses.dataclass(frozen=True)
class EngineRequest:
    """A prompt to continue.

    Attributes:
      prompt: ids, at least one (see `safelm.text.prompting`).
      max_new_tokens: the most new tokens, including the ending one.
      end_ids: ids of which any ends the text.
      seed: of sampling, 64 bits. The result depends only on the request (up to float rounding).
      want_trace: whether a beam method's last update lists every step's candidates.
      mask: makes a new token mask, which says what may come next (Greedy and Sampling only). While one is active, the
        lane's requests take one step at a time, because the mask of a token depends on the token before.
      adjustment: of the scores by which tokens are chosen (not with Beam or SafeBeam).
      watch_ids: ids whose log-probs as the first token the first update reports.
      plan: makes the plan that answers it (`safelm.inference.plans`).
    """

    prompt: tuple[int, ...]
    method: Method
    max_new_tokens: int
    end_ids: tuple[int, ...]
    seed: int = 0
    want_trace: bool = False
    mask: MakeMask | None = None
    watch_ids: tuple[int, ...] = ()
    adjustment: Adjustment = NEUTRAL
    plan: Callable[["EngineRequest"], Any] | None = None


@dataclasses.dataclass(frozen=True)
class TraceCandidate:
    """A candidate of one step's pool.

    Attributes:
      parent: index of the beam that it continues among those of the step before (0 is the best).
      token: the id tried; None for a beam that had already ended.
      log_prob: of the whole sequence including it (nats).
      tag_prob: P(tag | the sequence including it); None if it wasn't computed.
      outcome: "dropped" for its P(tag), "outranked" by candidates of higher score, or "kept".
      beam: its index among the new beams if kept, otherwise None.
    """

    parent: int
    token: int | None
    log_prob: float
    tag_prob: float | None
    outcome: Outcome
    beam: int | None


Trace = tuple[tuple[TraceCandidate, ...], ...]


@dataclasses.dataclass(frozen=True)
class Update:
    """News about a request.

    Attributes:
      tokens: tokens that became final since the last update, including the ending one (EOS or the tag). Those of beam
        methods are final once all live beams begin with them; with a trace they come at the end.
      tag_probs: P(tag | text up to and including it) for each of them, for an ending token that of the text before it;
        empty if the vocabulary has no tag. With a monitor, its levels.
      finished: "" while there is more to come. "cancelled" comes without tokens. "withheld": a knob or method put the
        tokens in place of the answer, without P(tag) and with a log_prob of 0.
      log_prob: of all tokens so far under the model (nats), without temperature or filters; of beam methods the best
        beam's, whose own tokens not all are final before the last update.
      watched: with the first update, the log-prob of each of the request's `watch_ids` as the first token (nats, over
        the whole vocabulary, before any mask).
      trace: with a beam method's last update, if requested: every step's candidates in the pool's order.
      error: what happened, with finished="error".
      untold: with the first update, how many tokens the answer begins with that aren't among `tokens`: a refusal
        token that a knob chose.
    """

    request_id: int
    tokens: tuple[int, ...] = ()
    tag_probs: tuple[float, ...] = ()
    finished: Finished = ""
    log_prob: float = 0.0
    watched: tuple[float, ...] = ()
    trace: Trace | None = None
    error: str = ""
    untold: int = 0

    def behind(self, before: "Update") -> "Update":
        """This update with the tokens, levels and first log-probs of the one before it in front of its own."""
        return dataclasses.replace(
            self,
            tokens=before.tokens + self.tokens,
            tag_probs=before.tag_probs + self.tag_probs,
            watched=before.watched + self.watched,
        )
