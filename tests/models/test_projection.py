"""`project` and the loss's choice of a logit: values and gradients are autodiff's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from safelm.models.config import REMAT_POLICIES
from safelm.models.loss import loss_sums
from safelm.models.projection import project


@pytest.mark.parametrize(("D", "F"), [(3, 8), (8, 3)], ids=["wider", "narrower"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_value_and_gradients_are_those_of_a_plain_product(D, F, dtype):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (2, 5, D), (D, F), (2, 5, F)
    x_BTD, kernel_DF, weight_BTF = (jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True))
    arguments = x_BTD.astype(dtype), kernel_DF.astype(dtype)

    def total(product):
        return lambda x, kernel: jnp.sum(product(x, kernel) * weight_BTF)

    plain = total(lambda x, kernel: jnp.einsum("btd,df->btf", x, kernel, preferred_element_type=jnp.float32))
    ours = total(lambda x, kernel: project(x, kernel, jnp.float32))
    expected, got = (jax.value_and_grad(f, argnums=(0, 1))(*arguments) for f in (plain, ours))
    assert [g.dtype for g in got[1]] == [dtype, dtype]
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == "float32" else {"rtol": 2e-2, "atol": 2e-2}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(np.float32(a), np.float32(b), **tolerance), got, expected)


def test_remat_dots_keeps_the_product_and_does_not_compute_it_again():
    x_BTD, kernel_DF = jnp.ones((2, 5, 3)), jnp.ones((3, 7))
    layer = jax.checkpoint(lambda x: jnp.sin(project(x, kernel_DF)), policy=REMAT_POLICIES["dots"])
    kept = jax.tree.leaves(jax.eval_shape(lambda x: jax.vjp(layer, x)[1], x_BTD))
    assert (2, 5, 7) in [array.shape for array in kept]


def test_gradient_of_the_loss_is_that_of_log_softmax():
    rng = np.random.default_rng(0)
    logits_BTV = jnp.asarray(rng.normal(size=(2, 3, 7)), jnp.float32)
    targets_BT, mask_BT = jnp.asarray(rng.integers(0, 7, (2, 3))), jnp.asarray([[1.0, 0, 1], [1, 1, 0]])

    def plain(logits_BTV):
        log_p_BT = jnp.take_along_axis(jax.nn.log_softmax(logits_BTV), targets_BT[..., None], axis=-1)[..., 0]
        return -jnp.sum(log_p_BT * mask_BT)

    got = jax.grad(lambda x: loss_sums(x, targets_BT, mask_BT).cross_entropy)(logits_BTV)
    np.testing.assert_allclose(got, jax.grad(plain)(logits_BTV), atol=1e-6)
