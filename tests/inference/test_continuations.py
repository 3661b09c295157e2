"""Scored continuations and generation up to given strings, against slow and obvious references."""

import dataclasses
import types

import jax
import numpy as np
import pytest
import tiny_runs

from safelm import inference
from safelm.inference import continuations
from safelm.models import decoder as model
from safelm.models.config import ModelConfig


@pytest.fixture(scope="module")
def tiny():
    vocabulary = tiny_runs.tokenizer()
    config = ModelConfig(**tiny_runs.model_fields(max_seq_len=40, init_std=0.4))
    return config, model.init(config, jax.random.key(0)), vocabulary


def all_logits(config, params, tokens):
    padded_BT = np.zeros((1, config.max_seq_len), np.int32)
    padded_BT[0, : len(tokens)] = tokens
    return np.asarray(jax.jit(model.apply, static_argnums=0)(config, params, padded_BT))[0]


def likeliest_after(config, params, tokens):
    return int(all_logits(config, params, tokens)[len(tokens) - 1].argmax())


def slow_score(config, params, context, continuation):
    """One row at a time, all logits, cut from the left as the harness does."""
    tokens = [*context, *continuation][-(config.max_seq_len + 1) :]
    logits_TV = all_logits(config, params, tokens[:-1])
    shifted_TV = logits_TV - logits_TV.max(axis=1, keepdims=True)
    log_probs_TV = shifted_TV - np.log(np.exp(shifted_TV).sum(axis=1, keepdims=True))
    steps = range(len(tokens) - 1 - len(continuation), len(tokens) - 1)
    log_prob = sum(log_probs_TV[step, tokens[step + 1]] for step in steps)
    return log_prob, all(log_probs_TV[step].argmax() == tokens[step + 1] for step in steps)


def test_scores_are_those_of_one_row_at_a_time(tiny):
    config, params, _ = tiny
    rng = np.random.default_rng(0)
    pairs = [
        (rng.integers(4, 280, length).tolist(), rng.integers(4, 280, 1 + length % 4).tolist())
        for length in (1, 5, 14, 33, 38, 39, 40, 45)
    ]
    shared = rng.integers(4, 280, 9).tolist()
    pairs += [(shared, [token]) for token in (5, 6, 7)] + [(shared, [5, token]) for token in (8, 9)]
    pairs.append((shared, [likeliest_after(config, params, shared)]))
    scores = inference.score_continuations(config, params, pairs, tokens_at_once=160)
    assert scores[-1].is_greedy and not all(score.is_greedy for score in scores)
    for score, pair in zip(scores, pairs, strict=True):
        log_prob, is_greedy = slow_score(config, params, *pair)
        assert score.logprob == pytest.approx(log_prob, abs=2e-4)
        assert score.is_greedy == is_greedy


def test_continuations_of_one_context_share_a_row_and_know_nothing_of_each_other(tiny):
    config, params, _ = tiny
    letters = [([5, 6, 7], [token]) for token in range(8, 12)]
    (row,) = continuations._rows(config, letters)
    assert [branch.last for branch in row.branches] == [[8, 9, 10, 11]]
    texts = [([5, 6, 7, 8, 9], [10, 11, 12, 13]), ([5, 6, 7, 8, 9], [10, 11, 14]), ([5, 6, 7, 8, 9], [15])]
    (row,) = continuations._rows(config, texts)
    assert [branch.tokens for branch in row.branches] == [(), (10, 11), (10, 11, 12)] and row.num_tokens == 10
    scores = inference.score_continuations(config, params, texts)
    for score, pair in zip(scores, texts, strict=True):
        assert score.logprob == pytest.approx(slow_score(config, params, *pair)[0], abs=2e-4)
    rows = continuations._rows(config, [([5, 6], [7] * count) for count in range(2, 9)])
    assert all(row.num_tokens <= 6 or len(row.branches) == 1 for row in rows)  # short contexts are not worth a long row
    assert sum(len(row.branches) for row in rows) == 7


def test_windows_keep_continuations_apart(tiny):
    config, _, _ = tiny
    windowed = dataclasses.replace(config, windows=(4,) * config.num_layers)
    params = model.init(windowed, jax.random.key(0))
    texts = [([5, 6, 7, 8, 9, 10], [10, 11, 12, 13]), ([5, 6, 7, 8, 9, 10], [10, 11, 14])]
    assert len(continuations._rows(windowed, texts)) == 2
    for score, pair in zip(inference.score_continuations(windowed, params, texts), texts, strict=True):
        assert score.logprob == pytest.approx(slow_score(windowed, params, *pair)[0], abs=2e-4)
    with pytest.raises(ValueError, match="branches_BT: not with attention='auto', windows"):
        model.hidden_states(windowed, params, np.ones((1, 3), np.int32), branches_BT=np.ones((1, 3), np.int32))


def test_shapes_are_few(tiny):
    config, _, _ = tiny
    config = dataclasses.replace(config, max_seq_len=512)
    rng = np.random.default_rng(1)
    pairs = [(rng.integers(4, 280, length).tolist(), [5] * (1 + length % 13)) for length in range(1, 400)]
    rows = continuations._rows(config, pairs)
    shapes = {(width, scored) for width, scored, _ in continuations._batches(config, rows, 1024, 64)}
    assert len(shapes) < 36
    assert all(
        width >= row.num_tokens and scored >= row.num_scored
        for width, scored, batch in continuations._batches(config, rows, 1024, 64)
        for row in batch
    )


@pytest.mark.parametrize("pair", [([], [5]), ([5], []), ([5], [5] * 41), ([5], [999])])
def test_a_pair_that_cannot_be_scored_is_named(tiny, pair):
    config, params, _ = tiny
    with pytest.raises(ValueError, match="pair 1"):
        inference.score_continuations(config, params, [([5], [6]), pair])


def test_greedy_pieces_are_one_greedy_run_cut_at_the_string(tiny):
    config, params, vocabulary = tiny
    prompts = [vocabulary.encode(text) for text in ("the cat", "a dog on the mat", "x")]
    common = {"max_new_tokens": 20, "end_ids": [vocabulary.eos_id]}
    whole = inference.generate(
        config, params, prompts, inference.Greedy(), harm_tag_id=vocabulary.harm_tag_id, **common
    )
    texts = [vocabulary.decode(each.text_tokens, keep_special=False) for each in whole]
    pieces = inference.generate_until(config, params, vocabulary, prompts, inference.Greedy(), until=[], **common)
    assert pieces == texts and max(map(len, texts)) > inference.until.FIRST_PIECE
    stop = texts[0][3:5]
    cut = inference.generate_until(config, params, vocabulary, prompts, inference.Greedy(), until=[stop, ""], **common)
    assert cut == [text.split(stop)[0] for text in texts]


def test_a_stop_string_that_is_a_special_token_stops_at_that_token(tiny, monkeypatch):
    config, params, vocabulary = tiny
    before, after = vocabulary.encode("the cat"), vocabulary.encode(" on the mat")
    made = [*before, vocabulary.chat_end_id, *after]
    generation = types.SimpleNamespace(text_tokens=made, finished=False)
    asked = []
    monkeypatch.setattr(inference.until, "generate", lambda *rest, **settings: asked.append(rest[2]) or [generation])
    common = {"max_new_tokens": 40, "end_ids": [vocabulary.eos_id]}
    arguments = config, params, vocabulary, [[5]], inference.Greedy()
    (text,) = inference.generate_until(*arguments, until=["<|im_end|>"], **common)
    assert text == "the cat" and len(asked) == 1  # and nothing more is made of it
    (text,) = inference.generate_until(*arguments, until=["nowhere"], **common)
    assert text.startswith("the cat on the mat") and len(asked) > 2


def test_a_method_with_a_state_makes_all_tokens_at_once(tiny):
    config, params, vocabulary = tiny
    prompts, method = [vocabulary.encode("the cat")], inference.SafeBeam(num_beams=2, num_candidates=2)
    common = {"max_new_tokens": 20, "end_ids": [vocabulary.eos_id]}
    (whole,) = inference.generate(config, params, prompts, method, harm_tag_id=vocabulary.harm_tag_id, **common)
    (text,) = inference.generate_until(config, params, vocabulary, prompts, method, until=[], **common)
    assert text == vocabulary.decode(whole.text_tokens, keep_special=False)
