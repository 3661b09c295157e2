"""Properties of the loss: masked = subset, parts add up, z-loss's gradient, float32."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.test_util import check_grads

from safelm.models.loss import LossSums, loss_sums


def _batch(seed=0, B=3, T=5, V=11):
    rng = np.random.default_rng(seed)
    logits_BTV = jnp.asarray(rng.normal(size=(B, T, V)), jnp.float32)
    targets_BT = jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32)
    loss_weight_BT = jnp.asarray(rng.integers(0, 2, (B, T)), jnp.float32)
    return logits_BTV, targets_BT, loss_weight_BT


def test_masked_loss_is_the_loss_on_the_subset():
    logits_BTV, targets_BT, loss_weight_BT = _batch()
    sums = loss_sums(logits_BTV, targets_BT, loss_weight_BT)
    kept = np.asarray(loss_weight_BT) == 1
    log_p_BTV = np.asarray(jax.nn.log_softmax(logits_BTV))
    expected = -sum(log_p_BTV[b, t, targets_BT[b, t]] for b, t in zip(*np.nonzero(kept), strict=True))
    np.testing.assert_allclose(sums.cross_entropy, expected, rtol=1e-6)
    assert sums.tokens == kept.sum()


def test_what_is_masked_has_neither_loss_nor_gradient():
    logits_BTV, targets_BT, loss_weight_BT = _batch()
    other_BT = jnp.where(loss_weight_BT == 1, targets_BT, (targets_BT + 1) % 11)
    other_BTV = jnp.where(loss_weight_BT[..., None] == 1, logits_BTV, 50.0)
    a = loss_sums(logits_BTV, targets_BT, loss_weight_BT)
    b = loss_sums(other_BTV, other_BT, loss_weight_BT)
    assert jax.tree.leaves(a) == jax.tree.leaves(b)
    grad_BTV = jax.grad(lambda x: loss_sums(x, targets_BT, loss_weight_BT).total(1e-2))(logits_BTV)
    assert np.all(np.asarray(grad_BTV)[np.asarray(loss_weight_BT) == 0] == 0)


def test_parts_of_unequal_masks_add_up():
    logits_BTV, targets_BT, _ = _batch(B=4)
    loss_weight_BT = jnp.zeros((4, 5)).at[0, 0].set(1).at[2:].set(1)
    whole = loss_sums(logits_BTV, targets_BT, loss_weight_BT)
    parts = LossSums.zero()
    for b in range(4):
        parts += loss_sums(logits_BTV[b : b + 1], targets_BT[b : b + 1], loss_weight_BT[b : b + 1])
    np.testing.assert_allclose(jax.tree.leaves(parts), jax.tree.leaves(whole), rtol=1e-6)
    means = [
        loss_sums(logits_BTV[b : b + 1], targets_BT[b : b + 1], loss_weight_BT[b : b + 1]).mean_cross_entropy()
        for b in (0, 2, 3)
    ]
    assert abs(np.mean(means) - whole.mean_cross_entropy()) > 1e-3  # what averaging micro-batches would give


def test_uniform_logits_and_no_tokens():
    targets_BT, mask_BT = jnp.zeros((2, 3), jnp.int32), jnp.ones((2, 3))
    sums = loss_sums(jnp.zeros((2, 3, 7)), targets_BT, mask_BT)
    np.testing.assert_allclose(sums.mean_cross_entropy(), np.log(7), rtol=1e-6)
    np.testing.assert_allclose(sums.z_square, 6 * np.log(7) ** 2, rtol=1e-6)
    assert loss_sums(jnp.zeros((2, 3, 7)), targets_BT, 0 * mask_BT).mean_cross_entropy() == 0


def test_gradients_with_z_loss():
    logits_BTV, targets_BT, loss_weight_BT = _batch()

    def total(logits_BTV):
        return loss_sums(jnp.asarray(logits_BTV), targets_BT, loss_weight_BT).total(0.1)

    check_grads(total, (logits_BTV,), order=1, modes=["rev"], rtol=2e-2)


def test_bfloat16_logits_are_summed_in_float32():
    logits_BTV, targets_BT, loss_weight_BT = _batch()
    sums = loss_sums(logits_BTV.astype(jnp.bfloat16), targets_BT, loss_weight_BT)
    exact = loss_sums(logits_BTV.astype(jnp.bfloat16).astype(jnp.float32), targets_BT, loss_weight_BT)
    assert sums.cross_entropy.dtype == jnp.float32 and sums.cross_entropy == exact.cross_entropy
