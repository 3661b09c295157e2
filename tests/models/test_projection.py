"""`project` and the loss's choice of a logit: values and gradients are autodiff's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from safelm.models import attention, remat
from safelm.models.loss import loss_sums
from safelm.models.projection import from_heads, project, project_by_rows, to_heads


@pytest.mark.parametrize(("D", "F"), [(3, 8), (8, 3)], ids=["wider", "narrower"])
@pytest.mark.parametrize("by_rows", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_value_and_gradients_are_those_of_a_plain_product(D, F, dtype, by_rows):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (2, 5, D), (D, F), (2, 5, F)
    x_BTD, kernel_DF, weight_BTF = (jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True))
    arguments = x_BTD.astype(dtype), kernel_DF.astype(dtype)

    def total(product):
        return lambda x, kernel: jnp.sum(product(x, kernel) * weight_BTF)

    plain = total(lambda x, kernel: jnp.einsum("btd,df->btf", x, kernel, preferred_element_type=jnp.float32))

    def of_kernel(x, kernel):
        return project_by_rows(x, kernel.T, jnp.float32) if by_rows else project(x, kernel, jnp.float32)

    ours = total(of_kernel)
    expected, got = (jax.value_and_grad(f, argnums=(0, 1))(*arguments) for f in (plain, ours))
    assert [g.dtype for g in got[1]] == [dtype, dtype]
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == "float32" else {"rtol": 2e-2, "atol": 2e-2}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(np.float32(a), np.float32(b), **tolerance), got, expected)


def test_remat_dots_keeps_the_product_and_does_not_compute_it_again():
    x_BTD, kernel_DF = jnp.ones((2, 5, 3)), jnp.ones((3, 7))
    layer = jax.checkpoint(lambda x: jnp.sin(project(x, kernel_DF)), policy=remat.POLICIES["dots"])
    kept = jax.tree.leaves(jax.eval_shape(lambda x: jax.vjp(layer, x)[1], x_BTD))
    assert (2, 5, 7) in [array.shape for array in kept]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rotating_by_a_product_is_rotating_and_its_product_is_not_kept(dtype):
    keys, shape = jax.random.split(jax.random.key(0)), (2, 5, 3, 8)
    x_BTNH, weight_BTNH = (jax.random.normal(key, shape).astype(dtype) for key in keys)
    angles_BT1P = jnp.linspace(0, 7, 2 * 5 * 4).reshape(2, 5, 1, 4)
    cos_sin = jnp.cos(angles_BT1P), jnp.sin(angles_BT1P)

    def value_and_gradient(rotate):
        out_BTNH, pull = jax.vjp(lambda x: rotate(x, *cos_sin), x_BTNH)
        return out_BTNH, *pull(weight_BTNH)

    expected, got = value_and_gradient(attention.rotate), value_and_gradient(attention.rotate_by_product)
    tolerance = {"atol": 1e-6} if dtype == "float32" else {"atol": 0.02}  # a sum may round once or twice
    jax.tree.map(lambda a, b: np.testing.assert_allclose(np.float32(a), np.float32(b), **tolerance), got, expected)
    layer = jax.checkpoint(lambda x: attention.rotate_by_product(x, *cos_sin), policy=remat.POLICIES["dots"])
    kept = jax.tree.leaves(jax.eval_shape(lambda x: jax.vjp(layer, x)[1], x_BTNH))
    assert not any(sorted(a.shape) == sorted(shape) and a.dtype == jnp.float32 for a in kept) or dtype == "float32"


def test_products_of_heads_are_the_same_with_one_axis_for_heads_and_their_width():
    keys = jax.random.split(jax.random.key(1), 3)
    x_BTD, kernel_DNH, kernel_NHD = (
        jax.random.normal(key, shape) for key, shape in zip(keys, ((2, 5, 6), (6, 3, 4), (3, 4, 6)), strict=True)
    )

    def total(is_flat):
        def of(x_BTD, kernel_DNH, kernel_NHD):
            heads_BTNH = to_heads(x_BTD, kernel_DNH, is_flat=is_flat)
            return jnp.square(from_heads(jnp.sin(heads_BTNH), kernel_NHD, is_flat=is_flat)).sum()

        return jax.value_and_grad(of, argnums=(0, 1, 2))(x_BTD, kernel_DNH, kernel_NHD)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), total(True), total(False))


def test_gradient_of_the_loss_is_that_of_log_softmax():
    rng = np.random.default_rng(0)
    logits_BTV = jnp.asarray(rng.normal(size=(2, 3, 7)), jnp.float32)
    targets_BT, mask_BT = jnp.asarray(rng.integers(0, 7, (2, 3))), jnp.asarray([[1.0, 0, 1], [1, 1, 0]])

    def plain(logits_BTV):
        log_p_BT = jnp.take_along_axis(jax.nn.log_softmax(logits_BTV), targets_BT[..., None], axis=-1)[..., 0]
        return -jnp.sum(log_p_BT * mask_BT)

    got = jax.grad(lambda x: loss_sums(x, targets_BT, mask_BT).cross_entropy)(logits_BTV)
    np.testing.assert_allclose(got, jax.grad(plain)(logits_BTV), atol=1e-6)
