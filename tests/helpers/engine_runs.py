"""Engines of a tiny random model, random requests to them, and their results."""

import dataclasses

import numpy as np
import pytest
from random_decoders import CONFIG, EOS, TAG

from safelm.inference import Beam, Engine, EngineRequest, Greedy, SafeBeam, Sampling, TagPenalty

SLOTS, STEPS = 4, 3


def random_method(rng):
    tag = str(rng.choice(["mask", "stop"]))
    return [
        lambda: Greedy(tag_candidate=str(rng.choice(["mask", "stop", "allow"]))),
        lambda: Sampling(float(rng.uniform(0.3, 2)), int(rng.choice([0, 1, 5])), float(rng.choice([1, 0.8])), tag),
        lambda: TagPenalty(num_candidates=3, threshold=0.02, penalty=float(rng.uniform(0, 5))),
        lambda: Beam(2, length_penalty=float(rng.choice([0, 0.7]))),
        lambda: SafeBeam(2, 3, drop_fraction=float(rng.choice([0, 0.3, 0.5, 0.8])), tag_candidate=tag),
    ][rng.integers(5)]()


def random_request(rng, **changes):
    prompt = tuple(rng.integers(1, TAG, size=rng.integers(1, 15)).tolist())
    request = EngineRequest(prompt, random_method(rng), int(rng.integers(1, 10)), (EOS,), int(rng.integers(2**63)))
    return dataclasses.replace(request, **changes)


def make_engine(params, **settings):
    return Engine(CONFIG, params, **({"harm_tag_id": TAG, "slots": SLOTS, "steps_per_call": STEPS} | settings))


def told(updates):
    """All updates of one request as one."""
    assert [bool(update.finished) for update in updates] == [False] * (len(updates) - 1) + [True]
    tokens = tuple(token for update in updates for token in update.tokens)
    return tokens, [p for update in updates for p in update.tag_probs], updates[-1].finished, updates[-1].log_prob


def run_alone(engine, request):
    assert engine.is_idle
    engine.submit(request)
    updates = []
    while not engine.is_idle:
        updates += engine.step()
    return told(updates)


def assert_same(got, want):
    assert (got[0], got[2]) == (want[0], want[2])
    np.testing.assert_allclose(got[1], want[1], atol=1e-5, rtol=1e-3)
    assert got[3] == pytest.approx(want[3], abs=1e-4)
