"""Top-k and the nucleus against a sort in float64, also of distributions with many equal log-probs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safelm.inference.truncation import filtered

compiled = jax.jit(filtered)
ROUNDING = 1e-5  # of a sum of float32: a token that near to the nucleus's end may be on either side


def cut(log_probs, *, top_k=0, top_p=1.0):
    """The tokens that stay, by row."""
    rows = len(log_probs)
    settings = {"top_k_P": jnp.full(rows, top_k), "top_p_P": jnp.full(rows, top_p, jnp.float32)}
    found = np.asarray(compiled(jnp.asarray(log_probs), **settings, is_used_P=jnp.ones(rows, bool)))
    stays = found != -np.inf
    np.testing.assert_array_equal(found[stays], np.asarray(log_probs, np.float32)[stays])
    return stays


def before(log_probs, top_k):
    """The probability before each token, of those within the `top_k`, in the order of the tokens; inf without."""
    order = np.argsort(-log_probs, axis=1, kind="stable")
    probs = np.exp(np.take_along_axis(log_probs.astype(np.float64), order, 1))
    probs[:, top_k or log_probs.shape[1] :] = 0
    probs /= probs.sum(1, keepdims=True)
    ahead = probs.cumsum(1) - probs
    ahead[:, top_k or log_probs.shape[1] :] = np.inf
    found = np.empty_like(ahead)
    np.put_along_axis(found, order, ahead, 1)
    return found


@pytest.mark.parametrize("step", [0.0, 0.25, 2.0])  # of the log-probs: the coarser, the more are equal
@given(
    seed=st.integers(0, 10_000),
    spread=st.sampled_from([0.0, 0.5, 3.0, 20.0]),
    shift=st.sampled_from([0.0, -50.0, 30.0]),
    vocab_size=st.sampled_from([1, 2, 67, 500]),
    top_k=st.sampled_from([0, 1, 3, 60, 1000]),
    top_p=st.sampled_from([1e-6, 0.3, 0.9, 0.999, 1.0]),
)
@settings(max_examples=200, deadline=None)
def test_what_stays_is_what_a_sort_keeps(step, seed, spread, shift, vocab_size, top_k, top_p):
    rng = np.random.default_rng(seed)
    log_probs = (shift + spread * rng.standard_normal((3, vocab_size))).astype(np.float32)
    if step:
        log_probs = np.round(log_probs / step) * np.float32(step)
    log_probs[rng.random(log_probs.shape) < 0.1] = -np.inf
    log_probs[:, 0] = np.maximum(log_probs[:, 0], shift)
    kept, ahead = cut(log_probs, top_k=top_k, top_p=top_p), before(log_probs, min(top_k, vocab_size))
    can_stay = log_probs > -np.inf
    limit = np.inf if top_p == 1 else top_p
    assert kept[can_stay & (ahead < limit - ROUNDING)].all()
    assert not kept[ahead > limit + ROUNDING].any()
    assert not kept[ahead == np.inf].any()
    assert kept[np.arange(3), log_probs.argmax(1)].all()


def test_of_equal_tokens_those_with_small_ids_stay():
    zeros = np.array([[-0.0, 0.0, -0.0, 0.0]], np.float32)  # equal numbers of two forms
    assert np.flatnonzero(cut(zeros, top_k=2)[0]).tolist() == [0, 1]
    assert np.flatnonzero(cut(np.zeros((1, 40), np.float32), top_k=7)[0]).tolist() == list(range(7))
    assert np.flatnonzero(cut(np.zeros((1, 40), np.float32), top_p=0.24)[0]).tolist() == list(range(10))


def test_each_row_has_its_own_settings_and_unused_ones_are_not_waited_for():
    log_probs = jnp.log(jnp.array([[0.1, 0.4, 0.25, 0.05, 0.2]] * 4))
    top_k, top_p, is_used = jnp.array([0, 2, 0, 3]), jnp.array([0.6, 1.0, 1.0, 0.5]), jnp.array([True] * 3 + [False])
    found = filtered(log_probs, top_k_P=top_k, top_p_P=top_p, is_used_P=is_used)
    assert [np.flatnonzero(row > -np.inf).tolist() for row in found[:3]] == [[1, 2], [1, 2], [0, 1, 2, 3, 4]]
