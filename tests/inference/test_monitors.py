"""Monitors against full forwards written out, along texts and inside SafeBeam; what doesn't fit is named."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import safe_beam_reference as reference
from random_decoders import CONFIG, EOS, TAG, VOCAB, apply, full_model, random_model, random_prompts

from safelm.inference import Engine, EngineRequest, Greedy, SafeBeam, generate, tag_probability
from safelm.inference.methods import described, needs_tag, settings_of
from safelm.inference.monitors import (
    LinearHead,
    RefusalProbability,
    TagProbability,
    extra_flops_per_token,
    levels,
    reading_flops_per_token,
)
from safelm.models import decoder

pytestmark = pytest.mark.usefixtures("quick_compilation")
NEW_TOKENS = 6
HEADER = (7, 8, 9)
_draw = np.random.default_rng(0)
KERNEL, BIAS = _draw.normal(0, 3, (CONFIG.d_model, 6)).astype(np.float32), _draw.normal(0, 1, 6).astype(np.float32)
PROBE = LinearHead(1, KERNEL, BIAS, 4, name="probe")
MONITORS = {
    "tag": TagProbability(TAG),
    "probe": PROBE,
    "header probe": dataclasses.replace(PROBE, layer=2, header_ids=HEADER),
    "refusal": RefusalProbability(HEADER, (11, 13, 17)),
}
MODEL = random_model(3, eos_bias=1.5, tag_bias=1.5)


@functools.partial(jax.jit, static_argnames="layer")
def stream(tokens_BT, *, layer):
    return decoder.hidden_states(CONFIG, MODEL, tokens_BT, layer=layer)


def slow_level(monitor, tokens) -> float:
    """From one full forward over the text and the header behind it."""
    tokens = [*tokens, *monitor.header_ids]
    padded = np.zeros((1, CONFIG.max_seq_len), np.int32)
    padded[0, : len(tokens)] = tokens
    if isinstance(monitor, LinearHead):
        logits = np.asarray(stream(padded, layer=monitor.layer))[0, len(tokens) - 1].astype(np.float64) @ KERNEL + BIAS
        chances = np.exp(logits - np.logaddexp.reduce(logits))
        return float(chances[monitor.min_score :].sum())
    logits = np.asarray(apply(MODEL, padded))[0, len(tokens) - 1].astype(np.float64)
    chances = np.exp(logits - np.logaddexp.reduce(logits))
    wanted = [monitor.tag_id] if isinstance(monitor, TagProbability) else list(monitor.refusal_ids)
    return float(chances[wanted].sum())


@pytest.mark.parametrize("name", MONITORS)
def test_levels_along_texts_are_those_of_full_forwards(name):
    monitor, texts = MONITORS[name], [*random_prompts(1, 3), [5]]
    found = levels(CONFIG, MODEL, monitor, texts)
    for tokens, level_T in zip(texts, found, strict=True):
        wanted = [slow_level(monitor, tokens[: end + 1]) for end in range(len(tokens))]
        np.testing.assert_allclose(level_T, wanted, rtol=2e-3, atol=1e-6)
    if name == "tag":
        for level_T, own_T in zip(found, tag_probability(CONFIG, MODEL, texts, harm_tag_id=TAG), strict=True):
            np.testing.assert_allclose(level_T, own_T, rtol=1e-5)
    if name == "refusal":  # every third token is read, and its level holds until the next
        sparse = levels(CONFIG, MODEL, dataclasses.replace(monitor, every=3), texts)
        for level_T, sparse_T in zip(found, sparse, strict=True):
            np.testing.assert_allclose(
                sparse_T, [level_T[place - place % 3] for place in range(len(level_T))], rtol=1e-4
            )


@pytest.mark.parametrize("name", ["probe", pytest.param("refusal", marks=pytest.mark.slow)])
def test_safe_beam_by_a_monitor_equals_the_slow_reference_and_needs_no_tag(name):
    monitor, language_model = MONITORS[name], full_model(MODEL)
    method = SafeBeam(num_beams=3, num_candidates=3, monitor=monitor)
    for prompt, got in zip(
        random_prompts(4, 4),
        generate(
            CONFIG, MODEL, random_prompts(4, 4), method, max_new_tokens=NEW_TOKENS, end_ids=[EOS], harm_tag_id=None
        ),
        strict=True,
    ):

        def with_level(text):  # the level as one more id, which is never a candidate
            return np.append(language_model(text), np.log(slow_level(monitor, text)))

        wanted = reference.decode(with_level, prompt, method, eos_id=EOS, tag_id=VOCAB, max_new_tokens=NEW_TOKENS)
        assert (got.tokens, got.stopped_by) == (wanted.new, wanted.stopped_by)
        np.testing.assert_allclose(got.tag_probs, wanted.trace, rtol=5e-3, atol=1e-6)


def test_p_tag_as_a_monitor_steers_as_p_tag_itself():
    prompts, settings = random_prompts(6, 3), {"max_new_tokens": NEW_TOKENS, "end_ids": [EOS], "harm_tag_id": TAG}
    own = generate(CONFIG, MODEL, prompts, SafeBeam(num_beams=3, num_candidates=3), **settings)
    method = SafeBeam(num_beams=3, num_candidates=3, monitor=MONITORS["tag"])
    for first, second in zip(own, generate(CONFIG, MODEL, prompts, method, **settings), strict=True):
        assert first.tokens == second.tokens
        np.testing.assert_allclose(first.tag_probs, second.tag_probs, rtol=1e-5)


def test_settings_name_a_monitor_and_programs_are_shared_by_equal_ones():
    method, again = SafeBeam(monitor=PROBE), SafeBeam(monitor=dataclasses.replace(PROBE))
    assert method == again and hash(method) == hash(again)
    other = dataclasses.replace(PROBE, bias_C=BIAS + 1)
    assert SafeBeam(monitor=other) != method and other.fingerprint != PROBE.fingerprint
    assert described(method)["monitor"] == f"probe {PROBE.fingerprint}" and "monitor" not in described(SafeBeam())
    assert "monitor" not in settings_of("safe_beam")
    assert needs_tag(SafeBeam()) and not needs_tag(method) and not needs_tag(Greedy())


def test_costs_rise_with_what_is_read():
    probe, header, refusal = (MONITORS[name] for name in ("probe", "header probe", "refusal"))
    extra = [extra_flops_per_token(each, CONFIG, 16) for each in (MONITORS["tag"], probe, header, refusal)]
    assert extra[0] == 0 and extra[1] == 2 * CONFIG.d_model * 6 and extra[1] < extra[2]
    sparse = dataclasses.replace(refusal, every=4)
    assert extra_flops_per_token(sparse, CONFIG, 16) == extra[3] / 4
    whole = CONFIG.flops_per_token(16) / 3
    assert reading_flops_per_token(MONITORS["tag"], CONFIG, 16) == pytest.approx(whole)
    assert reading_flops_per_token(probe, CONFIG, 16) < whole < reading_flops_per_token(header, CONFIG, 16)


@pytest.mark.parametrize(
    ("monitor", "message"),
    [
        (dataclasses.replace(PROBE, layer=3), "monitor probe: reads layer 3, the model has 0 to 2"),
        (dataclasses.replace(PROBE, kernel_DC=KERNEL[:9]), "reads a stream of 9 values, the model's has 32"),
        (dataclasses.replace(PROBE, header_ids=(VOCAB,)), f"id {VOCAB} of its header is not among the {VOCAB}"),
        (dataclasses.replace(PROBE, header_ids=HEADER * 6), "and its header of 18 don't fit the context of 24"),
        (RefusalProbability(HEADER, (99,)), "ids 99 to 99 of refusals"),
        (TagProbability(VOCAB), "has no harm tag"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_monitor_that_does_not_fit_is_refused_before_anything_runs(monitor, message):
    engine = Engine(CONFIG, MODEL, harm_tag_id=TAG)
    with pytest.raises(ValueError, match=message):
        engine.submit(EngineRequest((5, 6), SafeBeam(monitor=monitor), 8, (EOS,)))
    with pytest.raises(ValueError, match=message):
        levels(CONFIG, MODEL, monitor, [[5] * 10])
    with pytest.raises(ValueError, match="every"):
        SafeBeam(monitor=dataclasses.replace(PROBE, every=2))
