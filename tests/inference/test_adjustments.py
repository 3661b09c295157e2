"""`logit_bias` and penalties against a loop over plain forwards, whoever shares the batch."""

import dataclasses

import numpy as np
import pytest
from random_decoders import CONFIG, EOS, TAG, VOCAB, full_model, random_model

from safelm.inference import Beam, Engine, EngineRequest, Greedy, SafeBeam, Sampling, TagPenalty, programs, run_all
from safelm.inference.adjustments import Adjustment

pytestmark = pytest.mark.usefixtures("quick_compilation")
PROMPT, LENGTH = (5, 6, 7), 12
ADJUSTMENTS = (
    Adjustment(),
    Adjustment(presence_penalty=2.0),
    Adjustment(frequency_penalty=1.5),
    Adjustment(frequency_penalty=-1.0),
    Adjustment(logit_bias=((9, 4.0), (EOS, -100.0))),
    Adjustment(logit_bias=((9, 100.0), (TAG, 100.0)), presence_penalty=0.5, frequency_penalty=0.5),
)


@pytest.fixture(scope="module")
def params():
    return random_model(7, eos_bias=0.5, tag_bias=1.0)


def request(adjustment, method=None, **settings):
    return EngineRequest(PROMPT, method or Greedy(), LENGTH, (EOS,), adjustment=adjustment, **settings)


def by_hand(params, adjustment):
    """Whole forwards, and at every place the best score by the definition."""
    language_model, tokens, log_prob = full_model(params), [], 0.0
    while len(tokens) < LENGTH and (not tokens or tokens[-1] != EOS):
        log_probs_V = language_model([*PROMPT, *tokens])

        def score(token, own=log_probs_V, said=tuple(tokens)):
            count = said.count(token)
            penalty = adjustment.frequency_penalty * count + adjustment.presence_penalty * (count > 0)
            return own[token] + dict(adjustment.logit_bias).get(token, 0.0) - penalty

        tokens.append(max((t for t in range(VOCAB) if t != TAG), key=lambda token: (score(token), -token)))
        log_prob += log_probs_V[tokens[-1]]
    return tokens, log_prob


def run(params, requests, **settings):
    engine = Engine(CONFIG, params, **({"harm_tag_id": TAG, "slots": 8, "steps_per_call": 3} | settings))
    return run_all(engine, requests)


def test_every_request_of_a_batch_is_chosen_by_its_own_scores(params):
    compiled = programs.run._cache_size()
    found = run(params, [request(each) for each in ADJUSTMENTS])
    assert programs.run._cache_size() <= compiled + 2, "settings compile nothing"
    for adjustment, generation in zip(ADJUSTMENTS, found, strict=True):
        tokens, log_prob = by_hand(params, adjustment)
        assert generation.tokens == tokens, adjustment
        assert generation.logprob == pytest.approx(log_prob, abs=1e-3), "the model's own"
    assert len({tuple(each.tokens) for each in found}) > 3, "they change something"


def test_a_draw_takes_them_before_temperature_and_filters(params):
    forced = Adjustment(logit_bias=((9, 100.0),))
    for method in (Sampling(temperature=1.5, top_p=0.9), TagPenalty(num_candidates=3, top_k=5)):
        (generation,) = run(params, [request(forced, method, seed=3)])
        assert generation.tokens == [9] * LENGTH

    def first_token(adjustment, seed):
        return dataclasses.replace(request(adjustment, Sampling(), seed=seed), max_new_tokens=1)

    frequencies = [Adjustment(), Adjustment(logit_bias=((11, 3.0),))]
    counts = [
        np.mean([each.tokens == [11] for each in run(params, [first_token(one, seed) for seed in range(150)])])
        for one in frequencies
    ]
    log_probs_V = full_model(params)(list(PROMPT))
    for one, count in zip(frequencies, counts, strict=True):
        odds_V = np.exp([log_probs_V[token] + dict(one.logit_bias).get(token, 0.0) for token in range(VOCAB)])
        odds_V[TAG] = 0
        assert count == pytest.approx(odds_V[11] / odds_V.sum(), abs=0.13)


def test_what_no_engine_can_do_is_refused(params):
    engine = Engine(CONFIG, params, harm_tag_id=TAG)
    for method in (Beam(), SafeBeam()):
        with pytest.raises(ValueError, match=f"not with {type(method).__name__}"):
            engine.submit(request(ADJUSTMENTS[1], method))
        engine.submit(request(ADJUSTMENTS[0], method))
    for adjustment, message in (
        (Adjustment(logit_bias=((VOCAB, 1.0),)), "is not in the model's vocabulary"),
        (Adjustment(logit_bias=((1, 1.0), (1, 2.0))), "different ones"),
        (Adjustment(logit_bias=tuple((i % VOCAB, 1.0) for i in range(65))), "65 ids"),
        (Adjustment(presence_penalty=float("nan")), "not a finite number"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.submit(request(adjustment))
