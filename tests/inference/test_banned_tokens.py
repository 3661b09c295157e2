"""Banned tokens: never chosen by any method, log-probs the model's own, the rest of the choice unchanged."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny_runs

from safelm.evaluate.commands import flags as evaluate_flags
from safelm.inference import generate
from safelm.inference.methods import Beam, Greedy, SafeBeam, Sampling
from safelm.inference.token_log_probs import token_log_probs
from safelm.models import decoder
from safelm.models.decoder import ModelConfig
from safelm.text.banned_tokens import SPECIAL, banned_ids

pytestmark = pytest.mark.usefixtures("quick_compilation")

METHODS = [Greedy(), Sampling(temperature=3.0), Beam(num_beams=2), SafeBeam(num_beams=2, num_candidates=2)]
PROMPTS = [[5, 6, 7], [9, 8, 10, 11]]


@pytest.fixture(scope="module")
def model():
    config = ModelConfig(**tiny_runs.model_fields(init_std=0.5))
    return config, decoder.init(config, jax.random.key(0))


def continued(config, params, method):
    vocabulary = tiny_runs.tokenizer()
    return generate(
        config,
        params,
        PROMPTS,
        method,
        max_new_tokens=8,
        end_ids=[vocabulary.eos_id],
        harm_tag_id=vocabulary.harm_tag_id,
    )


@pytest.mark.parametrize(
    "method",
    [METHODS[0], *(pytest.param(each, marks=pytest.mark.slow) for each in METHODS[1:3]), METHODS[3]],
    ids=lambda method: type(method).__name__,
)
def test_special_tokens_added_in_tuning_leak_into_answers_unless_they_are_banned(model, method):
    config, params = model
    free = continued(config, params, method)
    leaked = tuple(sorted({token for each in free for token in each.text_tokens}))
    banned = dataclasses.replace(config, banned_ids=leaked)
    found = continued(banned, params, method)
    for prompt, each in zip(PROMPTS, found, strict=True):
        assert not set(leaked) & set(each.tokens) and each.tokens
        told = token_log_probs(config, params, [*prompt, *each.tokens]).chosen_T[len(prompt) - 1 :]
        np.testing.assert_allclose(each.logprob, sum(told), rtol=1e-4)


def test_banning_what_is_never_chosen_changes_nothing(model):
    config, params = model
    free = [each.tokens for each in continued(config, params, METHODS[0])]
    chosen = {token for tokens in free for token in tokens}
    unused = next(i for i in range(20, config.vocab_size) if i not in {*chosen, *tiny_runs.tokenizer().special_ids})
    same = continued(dataclasses.replace(config, banned_ids=(unused,)), params, METHODS[0])
    assert [each.tokens for each in same] == free


def test_an_end_or_an_unknown_id_cannot_be_banned(model):
    config, params = model
    for token, message in ((tiny_runs.tokenizer().eos_id, "ends a text"), (config.vocab_size, "is not in the model's")):
        with pytest.raises(ValueError, match=message):
            continued(dataclasses.replace(config, banned_ids=(token,)), params, Greedy())


def test_names_become_ids():
    vocabulary = tiny_runs.tokenizer()
    special = banned_ids(vocabulary, SPECIAL)
    assert not {vocabulary.harm_tag_id, *vocabulary.conventions.end_ids} & set(special)
    assert {*special, vocabulary.harm_tag_id, *vocabulary.conventions.end_ids} >= set(vocabulary.special_ids)
    some = special[:1]
    name = vocabulary.special_token(some[0])
    assert banned_ids(vocabulary, f" {name} ,") == some and banned_ids(vocabulary, "") == ()
    flags = [f"a={name}", "b=<|never|>"]
    assert evaluate_flags.banned_ids(flags, "a", ("a", "b"), vocabulary) == some
    assert evaluate_flags.banned_ids([name], "c", ("a", "c"), vocabulary) == some
    with pytest.raises(ValueError, match=r"--banned_tokens=misspelt=.*, a: 'misspelt=.*' is no special token of"):
        evaluate_flags.banned_ids([f"misspelt={name}"], "a", ("a", "b"), vocabulary)
    with pytest.raises(ValueError, match=r"--banned_tokens=b=<\|never\|>, b: '<\|never\|>' is no special token of"):
        evaluate_flags.banned_ids(flags, "b", ("a", "b"), vocabulary)
    end = vocabulary.special_token(vocabulary.eos_id)
    with pytest.raises(ValueError, match="ends an answer, which would never end then"):
        banned_ids(vocabulary, end)
