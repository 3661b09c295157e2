"""What goes into the engine and what comes out of it."""

import dataclasses
from typing import Literal

from safelm.inference.methods import Method

Finished = Literal["", "eos", "tag", "length", "cancelled", "error"]
Outcome = Literal["kept", "dropped", "outranked"]


@dataclasses.dataclass(frozen=True)
class EngineRequest:
    """A prompt to continue.

    Attributes:
      prompt: ids, at least one (see `safelm.text.prompting`).
      max_new_tokens: at most so many tokens, the ending one included.
      end_ids: any of them ends the text.
      seed: of sampling: 64 bits. The result depends on nothing but the request (up to float rounding).
      want_trace: of beam methods: the last update tells every step's candidates.
    """

    prompt: tuple[int, ...]
    method: Method
    max_new_tokens: int
    end_ids: tuple[int, ...]
    seed: int = 0
    want_trace: bool = False


@dataclasses.dataclass(frozen=True)
class TraceCandidate:
    """A candidate of one step's pool.

    Attributes:
      parent: the beam it continues, by its place among the beams of the step before (0 the best).
      token: the id tried; None for an ended beam that stands for itself.
      log_prob: of the whole sequence with it (nats).
      tag_prob: P(tag | the sequence with it); None where beam search didn't look.
      outcome: "dropped" for its P(tag), "outranked" by candidates of higher score, or "kept".
      beam: if kept, its place among the new beams, else None.
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
    """News of a request.

    Attributes:
      tokens: those that became final since the last update (beam methods: all with the last one), the ending one (EOS,
        or the tag) included.
      tag_probs: for every one of them P(tag | text up to and with it), for an ending token that of the text before it;
        empty if the vocabulary has no tag.
      finished: "" while there is more to come. "cancelled" comes without tokens.
      log_prob: of all tokens so far under the model (nats), neither tempered nor filtered.
      trace: every step's candidates, in the pool's order, if asked for, with the last update of a beam method.
      error: what happened, with finished="error".
    """

    request_id: int
    tokens: tuple[int, ...] = ()
    tag_probs: tuple[float, ...] = ()
    finished: Finished = ""
    log_prob: float = 0.0
    trace: Trace | None = None
    error: str = ""
