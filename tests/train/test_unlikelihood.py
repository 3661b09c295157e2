"""The unlikelihood term, -log(1 - p), against a slow reference in float64; what training on it does to p."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_runs
from hypothesis import example, given, settings
from hypothesis import strategies as st
from token_stores import EOS_ID, write_store

from safelm.data.channels import TASK_CHANNELS
from safelm.data.loader import eval_batches
from safelm.models import blocked_loss, sharding
from safelm.models import decoder as model
from safelm.models.chunked_loss import next_token_loss
from safelm.models.decoder import ModelConfig
from safelm.models.loss import LossSums
from safelm.train import step as train_step

pytestmark = pytest.mark.usefixtures("quick_compilation")

CONFIG = ModelConfig(**tiny_runs.model_fields())
WAYS = {"whole": 1, "chunked": 3, "blocked": 0}
ROWS, LENGTH, Z_LOSS = 4, 12, 1e-2


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """What is not asked for in chunks is computed in blocks of at most 16 tokens."""
    monkeypatch.setattr(blocked_loss, "MIN_BLOCK_TOKENS", 4)
    monkeypatch.setattr(blocked_loss, "BLOCK_BYTES", 4 * 16 * CONFIG.padded_vocab_size)


@functools.cache
def loss_and_gradients(vocab_chunks):
    def loss(kernel_VD, x_BTD, targets_BT, *weights):
        tied = {"embedder": {"embedding": kernel_VD}}
        return next_token_loss(CONFIG, tied, x_BTD, targets_BT, *weights, z_loss=Z_LOSS, vocab_chunks=vocab_chunks)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


def slow(kernel_VD, x_BTD, targets_BT, weight_BT, unlikely_BT):
    """The total and its gradients position by position, in float64."""
    kernel_VD, x_BTD, weight_BT, unlikely_BT = (
        np.asarray(a, np.float64) for a in (kernel_VD, x_BTD, weight_BT, unlikely_BT)
    )
    kernel_VD = kernel_VD[: CONFIG.vocab_size]
    total, unlikelihood, kernel_grad, x_grad = 0.0, 0.0, np.zeros_like(kernel_VD), np.zeros_like(x_BTD)
    for at in np.ndindex(*weight_BT.shape):
        logits, target = kernel_VD @ x_BTD[at], targets_BT[at]
        log_z = logits.max() + np.log(np.exp(logits - logits.max()).sum())
        others = np.delete(logits, target)
        log_rest = others.max() + np.log(np.exp(others - others.max()).sum())
        shares = np.exp(logits - log_z)
        rest = np.exp(np.where(np.arange(len(logits)) == target, -np.inf, logits) - log_rest)
        unlikelihood += unlikely_BT[at] * np.logaddexp(0.0, logits[target] - log_rest)
        total += weight_BT[at] * (log_z - logits[target] + Z_LOSS * log_z**2)
        grad = weight_BT[at] * shares * (1 + 2 * Z_LOSS * log_z)
        is_target = np.arange(len(logits)) == target
        grad += unlikely_BT[at] * shares[target] * (is_target - rest)
        grad[target] -= weight_BT[at]
        kernel_grad += np.outer(grad, x_BTD[at])
        x_grad[at] = grad @ kernel_VD
    return total + unlikelihood, unlikelihood, kernel_grad, x_grad


def assert_close(ours, theirs, tolerance=2e-5):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * max(np.abs(theirs).max(), 1e-30))


@functools.cache
def kernel():
    params = jax.jit(functools.partial(model.init, CONFIG))(jax.random.key(0))
    return np.round(np.asarray(params["embedder"]["embedding"]) * 10 * 2**8) / np.float32(2**8)


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), certain=st.sampled_from([1.0, 30.0, 300.0]), share=st.sampled_from([0.1, 1.0]))
@example(seed=323, certain=300.0, share=0.1)
@pytest.mark.parametrize("way", WAYS)
def test_the_term_and_its_gradients_are_those_in_float64(way, seed, certain, share):
    """Up to targets that the model is certain of: 1 - p is then 0 in float32.

    States are on a grid, as the kernel is, so that float32 has every logit exactly: at 300 the rounding of logits alone
    moves the term by .00002 of itself.
    """
    rng = np.random.default_rng(seed)
    step = 2.0 ** (math.floor(math.log2(certain)) - 11)
    states_BTD = certain * rng.normal(size=(ROWS, LENGTH, CONFIG.d_model))
    x_BTD = (np.round(states_BTD / step) * step).astype(np.float32)
    targets_BT = rng.integers(0, CONFIG.vocab_size, (ROWS, LENGTH)).astype(np.int32)
    targets_BT[:, ::2] = (x_BTD @ kernel()[: CONFIG.vocab_size].T).argmax(-1)[:, ::2]
    is_unlikely_BT = rng.random((ROWS, LENGTH)) < share
    unlikely_BT = (is_unlikely_BT * rng.random((ROWS, LENGTH))).astype(np.float32)
    weight_BT = (~is_unlikely_BT * rng.random((ROWS, LENGTH))).astype(np.float32)
    inputs = (kernel(), x_BTD, targets_BT, weight_BT, unlikely_BT)
    (total, sums), (kernel_grad, x_grad) = jax.device_get(loss_and_gradients(WAYS[way])(*inputs))
    slow_total, slow_unlikelihood, slow_kernel_grad, slow_x_grad = slow(*inputs)
    assert_close(total, slow_total)
    assert_close(sums.unlikelihood, slow_unlikelihood)
    # A share is exp(logit - log z), so its relative error is their rounding: float32's spacing at the largest logit.
    rounding = float(np.spacing(np.abs(x_BTD @ kernel().T).max()))
    assert_close(kernel_grad[: CONFIG.vocab_size], slow_kernel_grad, 2e-5 + rounding)
    assert_close(x_grad, slow_x_grad, 2e-5 + rounding)
    weights = weight_BT.sum() + unlikely_BT.sum()
    assert_close(sums.divisor(), weights or 1.0)
    assert sums.tokens == np.count_nonzero(weight_BT)


@pytest.mark.parametrize("way", WAYS)
def test_weights_of_zero_change_nothing(way):
    rng = np.random.default_rng(0)
    x_BTD = rng.normal(size=(ROWS, LENGTH, CONFIG.d_model)).astype(np.float32)
    targets_BT = rng.integers(0, CONFIG.vocab_size, (ROWS, LENGTH)).astype(np.int32)
    weight_BT = np.ones((ROWS, LENGTH), np.float32)
    with_zeros = loss_and_gradients(WAYS[way])(kernel(), x_BTD, targets_BT, weight_BT, 0 * weight_BT)
    without = loss_and_gradients(WAYS[way])(kernel(), x_BTD, targets_BT, weight_BT)
    assert without[0][1].unlikelihood is None and with_zeros[0][1].unlikelihood == 0
    assert_close(with_zeros[0][0], without[0][0])
    jax.tree.map(assert_close, with_zeros[1], without[1])


def test_sums_with_and_without_the_term_add_up():
    with_it, without = LossSums(*map(jnp.float32, range(1, 7))), LossSums(*map(jnp.float32, range(1, 5)))
    for total in (with_it + without, without + with_it):
        assert [float(value) for value in jax.tree.leaves(total)] == [2, 4, 6, 8, 5, 6]
        assert float(total.total(0.0)) == 7 and float(total.divisor()) == 12


# ---- a whole update


def updated(tmp_path, *, grad_accum_steps, steps, weigh, learned_first=0):
    """The sums of each of some updates on four documents whose tokens 3 to 5 are masked, their unlikelihood `weigh`.

    `learned_first`: updates before, in which every token is learned.
    """
    rng = np.random.default_rng(1)
    documents = [np.append(rng.integers(4, CONFIG.vocab_size, LENGTH - 2), EOS_ID) for _ in range(ROWS)]
    numbers = []
    for document in documents:
        loss_weight, unlikelihood = np.ones(len(document), np.float32), np.zeros(len(document), np.float32)
        loss_weight[3:6] = 0
        unlikelihood[3:6] = weigh
        numbers.append({"loss_weight": loss_weight, "unlikelihood": unlikelihood})
    store = write_store(tmp_path, documents, numbers=numbers, channels=TASK_CHANNELS)
    (batch,) = eval_batches(store, batch_size=ROWS, seq_len=LENGTH, packing="fit")
    planted_BT = np.asarray(batch.loss_weight_BT == 0) & (batch.segment_ids_BT > 0)
    assert planted_BT.sum() == 3 * ROWS and (batch.targets_BT[planted_BT] > 0).all() == (weigh > 0)
    mesh = sharding.make_mesh({"data": 1}, devices=jax.devices()[:1])
    program = train_step.make_program(
        CONFIG, optax.identity(), mesh, batch_size=ROWS, grad_accum_steps=grad_accum_steps
    )
    with jax.set_mesh(mesh):
        state = program.start(program.init_params(jax.random.key(0)))
        told = []
        every_token = batch._replace(
            loss_weight_BT=(batch.segment_ids_BT > 0).astype(np.float32),
            channels={"unlikelihood": np.zeros_like(batch.channels["unlikelihood"])},
        )
        for _ in range(learned_first):
            state, _ = program.step(state, every_token, train_step.Controls(np.float32(0.5)))
        for _ in range(steps):
            state, metrics = program.step(state, batch, train_step.Controls(np.float32(0.5)))
            told.append(jax.device_get(metrics.loss))
    return told


def test_training_lowers_the_probability_of_planted_tokens(tmp_path):
    whole = updated(tmp_path / "whole", grad_accum_steps=1, steps=30, weigh=1.0, learned_first=40)
    assert whole[0].unlikelihood > 1 > 5 * whole[-1].unlikelihood
    assert whole[-1].mean_cross_entropy() < whole[0].mean_cross_entropy()
    whole = updated(tmp_path / "ones", grad_accum_steps=1, steps=2, weigh=1.0)
    parts = updated(tmp_path / "parts", grad_accum_steps=2, steps=2, weigh=1.0)
    for ours, theirs in zip(parts, whole, strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), ours, theirs)


def test_targets_of_no_weight_at_all_are_not_there(tmp_path):
    told = updated(tmp_path / "masked", grad_accum_steps=1, steps=1, weigh=0.0)
    assert told[0].unlikelihood == 0 and told[0].tokens == ROWS * (LENGTH - 4)
