"""Encodes the candidates of every step of a beam search for the reply."""

import json
from typing import Any

from safelm.inference.requests import Trace, TraceCandidate
from safelm.serving.numbers import rounded
from safelm.text.tokenizer import Tokenizer


def encode_trace(trace: Trace | None, tokenizer: Tokenizer) -> str:
    """JSON with the candidates of every step, best log-prob first; `chosen` marks those that became the text.

    Step i chose the text's token i. A candidate without an id is a beam that had already ended. Encoding a long trace
    takes seconds, in short pieces that let other threads run.
    """
    steps = []
    place: int | None = 0  # of the text among the beams behind the step; the best stands first
    for pool in reversed(trace or ()):
        chosen = next((candidate for candidate in pool if candidate.beam == place), None)
        ordered = sorted(pool, key=lambda candidate: -candidate.log_prob)
        step = [_candidate(candidate, tokenizer) | _mark(candidate is chosen) for candidate in ordered]
        steps.append(json.dumps(step, separators=(",", ":")))
        place = None if chosen is None else chosen.parent
    return f"[{','.join(reversed(steps))}]"


def _candidate(candidate: TraceCandidate, tokenizer: Tokenizer) -> dict[str, Any]:
    text = "" if candidate.token is None else tokenizer.token_bytes(candidate.token).decode(errors="replace")
    return {
        "parent": candidate.parent,
        "id": candidate.token,
        "text": text,
        "log_prob": rounded(candidate.log_prob),
        "tag_prob": rounded(candidate.tag_prob),
        "outcome": candidate.outcome,
        "beam": candidate.beam,
    }


def _mark(is_chosen: bool) -> dict[str, bool]:
    return {"chosen": True} if is_chosen else {}
