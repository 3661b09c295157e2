"""Greedy coordinate gradient: its loss against a plain forward, its gradient against differences, what it finds."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs

from safelm.inference import Greedy, tag_probability
from safelm.models import decoder
from safelm.models.config import ModelConfig
from safelm.robustness import gradient_suffix
from safelm.robustness.gradient_suffix import SuffixSearch, find_suffix, suffix_gradient, usable_tokens
from safelm.robustness.soft_prompt import SoftPromptSearch, find_soft_prompt, soft_contexts, with_vectors
from safelm.robustness.suffix_rows import attacked_rows, initial_suffix, objective_of
from safelm.robustness.target import Target, label_answers

pytestmark = pytest.mark.usefixtures("quick_compilation")

PROMPTS, ANSWERS = ("the cat sat", "the dog did not"), ("on the mat", "the cat sat on")


@pytest.fixture(scope="module", params=[False, pytest.param(True, marks=pytest.mark.slow)], ids=["text", "chat"])
def target(request):
    config = ModelConfig(**tiny_runs.model_fields(num_layers=2, max_seq_len=128, init_std=0.4))
    return Target(config, decoder.init(config, jax.random.key(0)), tiny_runs.tokenizer(), is_chat=request.param)


def plain_loss(target, prompt, answer, suffix, tag_weight):
    """From the text alone, as an attacker's request would be read."""
    context = target.context(prompt + suffix)
    tokens = target.context(prompt + suffix, answer)
    logits = np.asarray(decoder.apply(target.config, target.params, jnp.asarray([tokens])), np.float64)[0]
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    places = range(len(context) - 1, len(tokens) - 1)
    nats = [-log_probs[t, tokens[t + 1]] + tag_weight * log_probs[t, target.tokenizer.harm_tag_id] for t in places]
    return np.mean(nats)


@pytest.mark.parametrize("tag_weight", [pytest.param(0.0, marks=pytest.mark.slow), 0.5])
def test_the_loss_is_that_of_the_text_and_no_step_makes_it_worse(target, tag_weight):
    search = SuffixSearch(tokens=4, steps=4, top_k=32, candidates=16, tag_weight=tag_weight)
    seen = []
    found = find_suffix(target, PROMPTS, ANSWERS, search, seen.append)
    losses = [each.loss for each in seen]
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] and found == seen[-1]
    assert [each.step for each in seen] == list(range(5))
    for each in (seen[0], found):
        pairs = zip(PROMPTS, ANSWERS, strict=True)
        wanted = np.mean([plain_loss(target, *pair, each.text, tag_weight) for pair in pairs])
        np.testing.assert_allclose(each.loss, wanted, rtol=1e-4)
    assert found == find_suffix(target, PROMPTS, ANSWERS, search)


def test_a_step_goes_on_with_its_best_candidate_also_where_that_is_worse(target, monkeypatch):
    """Algorithm 1 of Zou et al. 2023; what was found is the best of all steps."""
    tried, seen = [], []

    def losses(objective, params, rows, suffixes_CS):
        tried.append(suffixes_CS)
        return len(tried) + np.arange(len(suffixes_CS))[::-1] / 100  # the last is the best, and worse than any before

    monkeypatch.setattr(gradient_suffix, "_losses", losses)
    found = find_suffix(target, PROMPTS, ANSWERS, SuffixSearch(tokens=4, steps=3, candidates=8), seen.append)
    for before, after in itertools.pairwise(tried):
        assert ((after != before[-1]).sum(axis=1) <= 1).all()
    assert (tried[3] != tried[0]).any(axis=1).all() and {each.text for each in seen} == {found.text}
    assert (found.loss, found.text) == (1.0, target.tokenizer.decode(tried[0][0].tolist()))


def test_the_gradient_is_that_of_differences(target):
    """Along mixtures of the present token and another one, in float32: to the first order the loss moves so."""
    suffix = initial_suffix(target, 3)
    rows = attacked_rows(target, PROMPTS, ANSWERS, suffix)
    gradient = suffix_gradient(target, rows, suffix, 0.3)
    objective, size = objective_of(target, 0.3), 1e-2
    table = np.asarray(target.params["embedder"]["embedding"], np.float64)

    def loss(place, token, share):
        x = table[rows.tokens_BT]
        for row, start in enumerate(rows.start_B):
            x[row, start + place] += share * table[token]
        arrays = map(jnp.asarray, (x.astype(np.float32), rows.tokens_BT, rows.answer_BT))
        return np.asarray(objective.of_stream(target.params, *arrays), np.float64).mean()

    for place, token in ((0, 7), (1, 100), (2, 33)):
        wanted = (loss(place, token, size) - loss(place, token, -size)) / (2 * size)
        np.testing.assert_allclose(gradient[place, token], wanted, rtol=0.02, atol=2e-3)


def test_hidden_from_the_tag_it_lowers_the_tag_s_probability(target):
    def mean_log_tag(suffix):
        found = []
        for prompt, answer in zip(PROMPTS, ANSWERS, strict=True):
            start, tokens = len(target.context(prompt + suffix)), target.context(prompt + suffix, answer)
            tag = target.tokenizer.harm_tag_id
            (probs,) = tag_probability(target.config, target.params, [tokens], harm_tag_id=tag)
            found.append(np.log(probs[start - 1 : -1]).mean())
        return np.mean(found)

    plain = SuffixSearch(tokens=4, steps=6, top_k=32, candidates=24)
    hidden = SuffixSearch(tokens=4, steps=6, top_k=32, candidates=24, tag_weight=5.0)
    assert mean_log_tag(find_suffix(target, PROMPTS, ANSWERS, hidden).text) < mean_log_tag(
        find_suffix(target, PROMPTS, ANSWERS, plain).text
    )


def test_suffixes_are_text_without_control_tokens(target):
    usable = usable_tokens(target)
    tokenizer = target.tokenizer
    assert not usable[[tokenizer.harm_tag_id, tokenizer.eos_id]].any() and usable.sum() > 50
    found = find_suffix(target, PROMPTS, ANSWERS, SuffixSearch(tokens=5, steps=3, candidates=8))
    assert all(usable[token] for token in tokenizer.encode(found.text))
    assert target.context(PROMPTS[0] + found.text)[: len(target.context(PROMPTS[0])) - 8]


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ({"tokens": 0}, "tokens=0: must be at least 1"),
        ({"steps": -1}, "steps=-1"),
        ({"tokens": 200}, "a prompt with suffix and answer has .* tokens, context 128"),
    ],
)
def test_what_cannot_be_searched_is_named(target, search, message):
    with pytest.raises(ValueError, match=message):
        find_suffix(target, PROMPTS, ANSWERS, SuffixSearch(**search))


def test_vectors_that_are_tokens_embeddings_do_what_the_tokens_do_and_steps_lower_the_loss(target):
    """Soft prompts: loss, place and answers against the text whose tokens' embeddings the vectors are."""
    suffix = " the mat on"
    ids = target.tokenizer.encode(suffix)
    table = np.asarray(target.params["embedder"]["embedding"])
    wider, places = with_vectors(target, table[ids])
    as_text = [target.context(prompt + suffix) for prompt in PROMPTS]
    pairs = (target, as_text), (wider, soft_contexts(target, PROMPTS, places))
    told = [label_answers(*pair, Greedy(), max_new_tokens=6).texts for pair in pairs]
    assert told[0] == told[1] and any(told[0])
    assert np.asarray(wider.params["embedder"]["embedding"]).shape[0] >= target.config.vocab_size + len(ids)
    seen = []
    found = find_soft_prompt(target, PROMPTS, ANSWERS, SoftPromptSearch(tokens=4, steps=5), seen.append)
    assert seen[-1] == found and found.loss < seen[0].loss
    assert [each.forward_passes for each in seen] == [2 * (3 * step + 1) for step in range(6)]
    text = target.tokenizer.decode(initial_suffix(target, 4).tolist())
    plain = np.mean([plain_loss(target, *pair, text, 0.0) for pair in zip(PROMPTS, ANSWERS, strict=True)])
    np.testing.assert_allclose(seen[0].loss, plain, rtol=1e-4)
    with pytest.raises(ValueError, match="soft prompt: tokens=0"):
        SoftPromptSearch(tokens=0)
