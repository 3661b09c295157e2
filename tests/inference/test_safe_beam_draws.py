"""Hundreds of random (model, prompt, k, N, fraction, length) draws of SafeBeam against the slow reference.

All draws of a model go through one engine at once, so few programs serve them all.
"""

import dataclasses

import numpy as np
import pytest
import safe_beam_reference as reference
from random_decoders import CONFIG, EOS, TAG, full_model, random_model

from safelm.inference import Engine, EngineRequest, SafeBeam

pytestmark = pytest.mark.usefixtures("quick_compilation")
SHAPES = [(2, 3), (3, 2), (1, 4), (4, 1)]  # beams, candidates
DRAWS = 80  # per model


def draw(rng) -> EngineRequest:
    num_beams, num_candidates = SHAPES[rng.integers(len(SHAPES))]
    fraction = float(rng.choice([0.0, 0.25, 0.5, 0.9, round(rng.uniform(0, 1), 2) % 1]))
    method = SafeBeam(num_beams, num_candidates, fraction, str(rng.choice(["mask", "stop"])))
    prompt = tuple(rng.integers(1, TAG, size=rng.integers(1, 15)).tolist())
    return EngineRequest(prompt, method, int(rng.integers(1, 10)), (EOS,))


@pytest.mark.parametrize(
    ("seed", "eos_bias", "tag_bias"),
    [
        pytest.param(20, 0.0, 0.0, marks=pytest.mark.slow),
        pytest.param(21, 2.0, 1.0, marks=pytest.mark.slow),
        (22, 1.0, 3.0),
        pytest.param(23, 1.5, 5.0, marks=pytest.mark.slow),
    ],
)
def test_equals_the_slow_reference(seed, eos_bias, tag_bias):
    rng, params = np.random.default_rng(seed), random_model(seed, eos_bias=eos_bias, tag_bias=tag_bias)
    engine = Engine(CONFIG, params, harm_tag_id=TAG, slots=16, steps_per_call=4)
    requests = {}
    for index, request in enumerate(draw(rng) for _ in range(DRAWS)):
        beyond = {"drop_above": (0.0, 0.02, 0.0, 0.3)[index % 4], "anchor": (0.0, 1.0, 0.5, 0.0, 1.0)[index % 5]}
        method = dataclasses.replace(request.method, **beyond)
        request = dataclasses.replace(request, method=method)
        requests[engine.submit(request)] = request
    results = {}
    while not engine.is_idle:
        for update in engine.step():
            before = results.get(update.request_id)
            results[update.request_id] = update if before is None else update.behind(before)
    language_model, ends = full_model(params), set()
    for request_id, request in requests.items():
        method, got = request.method, results[request_id]
        want = reference.decode(
            language_model, list(request.prompt), method, eos_id=EOS, tag_id=TAG, max_new_tokens=request.max_new_tokens
        )
        assert (list(got.tokens), got.finished) == (want.new, want.stopped_by), request
        assert got.log_prob == pytest.approx(want.log_prob, abs=1e-4)
        np.testing.assert_allclose(got.tag_probs, want.trace, atol=1e-5, rtol=1e-3)
        ends.add(got.finished)
    assert {"eos", "length"} <= ends
