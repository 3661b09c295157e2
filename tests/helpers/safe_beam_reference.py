"""Decoding written the slow and obvious way: Python lists, and the full model called anew for every sequence.

Written from the paper's algorithm 1 and from what `safelm.inference` documents, sharing no code with it. A language
model is a function from a list of ids to the log-probs of the next one (over real ids only).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np

LanguageModel = Callable[[list[int]], np.ndarray]


@dataclass
class Hypothesis:
    prompt: list[int]
    log_prob: float
    tag_log_prob: float  # of an ended one: before its last token
    new: list[int] = field(default_factory=list)
    trace: list[float] = field(default_factory=list)
    stopped_by: str = "length"
    behind: float = 0.0  # log-prob of the likeliest token, summed over the steps

    @property
    def text(self) -> list[int]:
        return self.prompt + self.new


def safe_beam(
    next_log_probs: LanguageModel,
    prompt: list[int],
    *,
    num_beams: int,
    num_candidates: int,
    drop_fraction: str,
    tag_candidate: str,
    eos_id: int,
    tag_id: int,
    max_new_tokens: int,
    drop_above: float = 0.0,
    anchor: float = 0.0,
) -> Hypothesis:
    beams = [Hypothesis(prompt, 0.0, next_log_probs(prompt)[tag_id])]
    for _ in range(max_new_tokens):
        if all(beam.stopped_by != "length" for beam in beams):
            break
        pool = []
        for beam in beams:
            if beam.stopped_by != "length":
                pool.append(beam)
                continue
            log_probs = next_log_probs(beam.text)
            tokens = [t for t in range(len(log_probs)) if not (t == tag_id and tag_candidate == "mask")]
            tried = sorted(tokens, key=lambda t: (-log_probs[t], t))[:num_candidates]
            for token in tried:
                pool.append(extend(next_log_probs, beam, token, float(log_probs[token]), eos_id, tag_id))
                pool[-1].behind = beam.behind + float(log_probs[tried[0]])
        num_kept = len(pool) - int(Fraction(drop_fraction) * len(pool))
        safest = sorted(range(len(pool)), key=lambda i: (pool[i].tag_log_prob, i))[:num_kept]
        safest += [i for i in range(len(pool)) if i not in safest and np.exp(pool[i].tag_log_prob) <= drop_above]
        scores = [each.log_prob - anchor * each.behind for each in pool]
        beams = [pool[i] for i in sorted(safest, key=lambda i: (-scores[i], i))[:num_beams]]
        assert len({tuple(beam.text) for beam in beams}) == len(beams)
    return beams[0]


def decode(
    next_log_probs: LanguageModel, prompt: list[int], method: Any, *, eos_id: int, tag_id: int, max_new_tokens: int
) -> Hypothesis:
    """`safe_beam` with the settings of a `SafeBeam`."""
    return safe_beam(
        next_log_probs,
        prompt,
        num_beams=method.num_beams,
        num_candidates=method.num_candidates,
        drop_fraction=str(method.drop_fraction),
        tag_candidate=method.tag_candidate,
        eos_id=eos_id,
        tag_id=tag_id,
        max_new_tokens=max_new_tokens,
        drop_above=method.drop_above,
        anchor=method.anchor,
    )


def extend(
    next_log_probs: LanguageModel, beam: Hypothesis, token: int, log_prob: float, eos_id: int, tag_id: int | None
) -> Hypothesis:
    stopped_by = {eos_id: "eos", tag_id: "tag"}.get(token, "length")
    tag_log_prob = beam.tag_log_prob
    if stopped_by == "length" and tag_id is not None:
        tag_log_prob = float(next_log_probs([*beam.text, token])[tag_id])
    return Hypothesis(
        beam.prompt,
        beam.log_prob + log_prob,
        tag_log_prob,
        [*beam.new, token],
        [*beam.trace, float(np.exp(tag_log_prob))],
        stopped_by,
    )


def beam_search(
    next_log_probs: LanguageModel,
    prompt: list[int],
    *,
    num_beams: int,
    length_penalty: float,
    eos_id: int,
    masked: set[int],
    max_new_tokens: int,
) -> Hypothesis:
    def score(beam: Hypothesis) -> float:
        return beam.log_prob / len(beam.new) ** length_penalty

    beams = [Hypothesis(prompt, 0.0, -np.inf)]
    for _ in range(max_new_tokens):
        pool = [beam for beam in beams if beam.stopped_by == "eos"]
        for beam in beams:
            if beam.stopped_by == "length":
                log_probs = next_log_probs(beam.text)
                for token in range(len(log_probs)):
                    if token not in masked:
                        pool.append(extend(next_log_probs, beam, token, float(log_probs[token]), eos_id, None))
        beams = sorted(pool, key=score, reverse=True)[:num_beams]
    return beams[0]


def greedy(
    next_log_probs: LanguageModel, prompt: list[int], *, eos_id: int, masked: set[int], max_new_tokens: int
) -> list[int]:
    new: list[int] = []
    while len(new) < max_new_tokens and eos_id not in new:
        log_probs = next_log_probs(prompt + new).copy()
        log_probs[list(masked)] = -np.inf
        new.append(int(log_probs.argmax()))
    return new
