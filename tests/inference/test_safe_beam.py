"""SafeBeam against algorithm 1 written out with a full model call per sequence: token for token and in log-prob."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safe_beam_reference as reference
from random_decoders import CONFIG, EOS, TAG, VOCAB, full_model, random_model, random_prompts

from safelm.inference import Beam, Greedy, SafeBeam, generate, kv_cache, programs
from safelm.inference import asked as asked_lib
from safelm.inference import safe_beam as safe_beam_lib
from safelm.inference.weights import prepare

NEW_TOKENS = 7
pytestmark = pytest.mark.usefixtures("quick_compilation")


def decode(params, prompts, method, max_new_tokens=NEW_TOKENS):
    return generate(CONFIG, params, prompts, method, max_new_tokens=max_new_tokens, end_ids=[EOS], harm_tag_id=TAG)


MODELS = [(0, 0.0, 0.0), (1, 2.0, 0.0), (2, 0.0, 3.0), (3, 1.5, 1.5)]  # seed, EOS-prone, tag-prone
TAG_STOPS = SafeBeam(num_beams=2, num_candidates=3, drop_fraction=0.0, tag_candidate="stop")
METHODS = [
    SafeBeam(),
    SafeBeam(tag_candidate="stop"),
    SafeBeam(num_beams=3, num_candidates=3, tag_candidate="stop"),  # pools of odd size
    TAG_STOPS,
    SafeBeam(num_beams=4, num_candidates=1),
    SafeBeam(num_beams=1, num_candidates=5),
    SafeBeam(num_beams=2, num_candidates=7, drop_fraction=0.3),
    SafeBeam(num_beams=5, num_candidates=2, drop_fraction=0.8, tag_candidate="stop"),
    SafeBeam(drop_above=0.02, anchor=1.0),
    SafeBeam(num_beams=3, num_candidates=3, drop_fraction=0.0, anchor=0.5),  # which may end early
]
FIRST = (METHODS[2], TAG_STOPS, METHODS[8])


@pytest.mark.parametrize(
    "method",
    [method if method in FIRST else pytest.param(method, marks=pytest.mark.slow) for method in METHODS],
    ids=str,
)
def test_equals_the_slow_reference(method):
    stopped_by = set()
    for seed, eos_bias, tag_bias in MODELS:
        params = random_model(seed, eos_bias=eos_bias, tag_bias=tag_bias)
        prompts = random_prompts(seed, 8)
        language_model = full_model(params)
        for prompt, got in zip(prompts, decode(params, prompts, method), strict=True):
            want = reference.decode(language_model, prompt, method, eos_id=EOS, tag_id=TAG, max_new_tokens=NEW_TOKENS)
            assert (got.tokens, got.stopped_by) == (want.new, want.stopped_by), (seed, prompt)
            assert got.logprob == pytest.approx(want.log_prob, abs=1e-4)
            np.testing.assert_allclose(got.tag_probs, want.trace, atol=1e-5, rtol=1e-3)
            stopped_by.add(got.stopped_by)
    assert {"eos", "length"} <= stopped_by, "the draws must show both ends"
    assert "tag" in stopped_by or method != TAG_STOPS


def test_a_cache_that_stays_in_place_gives_the_same_as_one_that_follows_its_beams(monkeypatch):
    """On TPUs beams know which rows hold their tokens; prompts of other lengths join and rooms grow meanwhile."""
    method, prompts = SafeBeam(num_beams=3, num_candidates=4, tag_candidate="stop"), random_prompts(6, 12)
    params = random_model(3, eos_bias=1.0, tag_bias=1.5)
    followed = decode(params, prompts, method, max_new_tokens=10)
    monkeypatch.setattr(programs, "step_shape", functools.partial(programs.step_shape, platform="tpu"))
    assert programs.step_shape(method).shares_rows
    monkeypatch.delattr(kv_cache, "follow_beams")
    shared = decode(params, prompts, method, max_new_tokens=10)
    assert [(g.tokens, g.stopped_by) for g in shared] == [(g.tokens, g.stopped_by) for g in followed]
    np.testing.assert_allclose([g.logprob for g in shared], [g.logprob for g in followed], atol=1e-4)


def test_the_tag_can_stop_a_beam():
    params = random_model(2, tag_bias=3.0)
    prompts = random_prompts(5, 8)
    stopped = [g for g in decode(params, prompts, TAG_STOPS) if g.stopped_by == "tag"]
    assert stopped
    assert all(g.tokens[-1] == TAG and TAG not in g.text_tokens and g.finished for g in stopped)
    assert not any(TAG in g.tokens for g in decode(params, prompts, SafeBeam()))


@pytest.mark.parametrize("num_candidates", [3, pytest.param(5, marks=pytest.mark.slow)])
def test_without_dropping_it_is_beam_search(num_candidates):
    params, prompts = random_model(1, eos_bias=1.5), random_prompts(3, 8)
    safe = decode(params, prompts, SafeBeam(num_beams=3, num_candidates=num_candidates, drop_fraction=0.0))
    plain = decode(params, prompts, Beam(num_beams=3))
    assert [g.tokens for g in safe] == [g.tokens for g in plain]
    np.testing.assert_allclose([g.logprob for g in safe], [g.logprob for g in plain], atol=1e-5)


def test_anchored_and_without_dropping_it_is_greedy():
    params, prompts = random_model(1, eos_bias=1.5), random_prompts(3, 8)
    anchored = decode(params, prompts, SafeBeam(num_beams=4, num_candidates=4, drop_fraction=0.0, anchor=1.0))
    assert [g.tokens for g in anchored] == [g.tokens for g in decode(params, prompts, Greedy())]


def test_it_lowers_the_tags_probability():
    params, prompts = random_model(2, tag_bias=2.0), random_prompts(4, 8)

    def mean_tag_prob(method):
        return np.mean([np.mean(g.tag_probs) for g in decode(params, prompts, method)])

    assert mean_tag_prob(SafeBeam()) < mean_tag_prob(Beam(num_beams=3))


@pytest.mark.parametrize(
    ("fraction", "sizes"), [(0.5, (0, 0, 1, 1, 2)), (0.3, (0, 0, 0, 0, 1)), (0.0, (0,) * 5), (0.99, (0, 0, 1, 2, 3))]
)
def test_the_dropped_share_is_rounded_down(fraction, sizes):
    assert SafeBeam(num_beams=2, num_candidates=2, drop_fraction=fraction).drop_counts() == sizes


def test_decimal_fractions_drop_what_they_say():
    counts = SafeBeam(num_beams=10, num_candidates=10, drop_fraction=0.29).drop_counts()
    assert counts[100] == 29  # 0.29 * 100 is 28.999.. in floats


def test_ties_keep_the_earlier_and_missing_candidates_do_not_count():
    method = SafeBeam(num_beams=1, num_candidates=6)
    tag_log_prob_PWC = jnp.log(jnp.array([[[0.2, 0.1, 0.2, 0.2, 0.9, 0.0]]]))
    is_candidate_PWC = jnp.array([[[True, True, True, True, True, False]]])
    kept = safe_beam_lib.undropped(is_candidate_PWC, tag_log_prob_PWC, jnp.array([method.drop_counts()]))
    assert kept[0, 0].tolist() == [True, True, True, False, False, False]  # 5 candidates: 2 dropped


def test_a_step_is_one_forward_over_beams_times_candidates():
    """Every matmul with the feed-forward weights in a step's program sees W * C tokens, in one call."""
    num_beams, num_candidates, num_prompts = 3, 5, 2
    method = SafeBeam(num_beams=num_beams, num_candidates=num_candidates)
    params, shape = random_model(0), programs.step_shape(method)
    rows = [(length, 4, (EOS,), method, 0) for length in (4, 9)]
    state, cache = programs.empty_state(CONFIG, shape, num_prompts=num_prompts, max_len=16, harm_tag_id=TAG)
    state = state.replace(asked=asked_lib.ask(rows, harm_tag_id=TAG, max_pool=shape.num_dropped_from))
    jaxpr = jax.make_jaxpr(functools.partial(shape.step, CONFIG, prepare(CONFIG, params)))(state, cache)
    products = []
    for equation in all_equations(jaxpr.jaxpr):
        if equation.primitive.name == "dot_general":
            products.append(equation.outvars[0].aval.shape)
    tokens, vocab = num_prompts * num_beams * num_candidates, CONFIG.padded_vocab_size
    assert [shape for shape in products if shape[-1] == vocab] == [(tokens, vocab)]
    assert products.count((tokens, CONFIG.d_ff)) == 2 * CONFIG.num_layers  # gate and up


def all_equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from all_equations(inner)


def test_needs_a_model_with_the_tag():
    with pytest.raises(ValueError, match="SafeBeam needs a model with the harm tag"):
        generate(CONFIG, random_model(0), [[1]], SafeBeam(), max_new_tokens=2, end_ids=[EOS], harm_tag_id=None)
    with pytest.raises(ValueError, match="harm_tag_id=50 is not in the model's vocabulary of 50"):
        generate(CONFIG, random_model(0), [[1]], SafeBeam(), max_new_tokens=2, end_ids=[EOS], harm_tag_id=VOCAB)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 0}, "SafeBeam: num_beams=0, want at least 1"),
        ({"num_candidates": 0}, "num_candidates=0"),
        ({"drop_fraction": 1.0}, r"drop_fraction=1.0, want in \[0, 1\)"),
        ({"drop_above": -0.1}, r"drop_above=-0.1, want a probability in \[0, 1\]"),
        ({"anchor": 1.5}, r"anchor=1.5, want a number in \[0, 1\]"),
        ({"tag_candidate": "allow"}, "tag_candidate='allow', want one of mask, stop"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SafeBeam(**settings)
