"""Large products by the C++ kernels against float64, their gradients and the loss against XLA's, who may use them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_builds import compiled
from random_decoders import TINY, random_params

from safelm.inference.continuations import score_continuations
from safelm.inference.token_log_probs import token_log_probs
from safelm.models import cpu_kernels, decoder, product_kernels, remat, sharding
from safelm.models.chunked_loss import next_token_loss
from safelm.models.projection import from_heads, project, project_by_rows, to_heads

# M, K, N: none whole tiles, one tile, several pieces of work, and more summed than are multiplied at once
SIZES = [(1, 1, 1), (5, 3, 7), (33, 65, 31), (64, 64, 64), (100, 1100, 70), (300, 257, 260), (2, 40, 700)]


@pytest.fixture
def large(vectors):
    """Every build that multiplies large matrices."""
    if refusal := cpu_kernels.matmul_refusal():
        pytest.skip(refusal)


def assert_near(ours, theirs):
    """Trees whose arrays are apart by what rounding to bfloat16 makes."""
    for got, want in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert np.linalg.norm(np.float32(got) - np.float32(want)) <= 0.03 * np.linalg.norm(np.float32(want))


def random(rng, shape, dtype):
    return jnp.asarray(rng.standard_normal(shape), dtype)


@pytest.mark.parametrize("dtypes", [("bfloat16", "bfloat16"), ("float32", "bfloat16"), ("bfloat16", "float32")])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_products_are_those_of_rounded_numbers(large, sizes, dtypes):
    rng, (M, K, N) = np.random.default_rng(0), sizes
    for transpose_left in (False, True):
        for transpose_right in (False, True):
            left = random(rng, (K, M) if transpose_left else (M, K), dtypes[0])
            right = random(rng, (N, K) if transpose_right else (K, N), dtypes[1])
            how = {"transpose_left": transpose_left, "transpose_right": transpose_right}
            got, rounded = (compiled(cpu_kernels.matmul, dtype=d, **how)(left, right) for d in ("float32", "bfloat16"))
            x, y = (np.asarray(array.astype(jnp.bfloat16), np.float64) for array in (left, right))
            want = (x.T if transpose_left else x) @ (y.T if transpose_right else y)
            np.testing.assert_allclose(got, want, atol=1e-5 * np.sqrt(K))
            np.testing.assert_array_equal(rounded, got.astype(jnp.bfloat16))


def test_what_is_no_number_stays_none_and_stays_in_its_row(large):
    left = jnp.ones((40, 50), jnp.bfloat16).at[3, 7].set(jnp.nan)
    got = np.asarray(compiled(cpu_kernels.matmul)(left, jnp.ones((50, 33), jnp.bfloat16)))
    assert np.isnan(got[3]).all()
    np.testing.assert_array_equal(np.delete(got, 3, axis=0), 50)


def test_a_row_does_not_depend_on_the_rows_beside_it(large):
    rng = np.random.default_rng(1)
    left, right = random(rng, (300, 700), "bfloat16"), random(rng, (700, 90), "bfloat16")
    whole, alone = (compiled(cpu_kernels.matmul)(rows, right) for rows in (left, left[:1]))
    np.testing.assert_array_equal(whole[:1], alone)


@pytest.mark.parametrize(
    "equation", ["pd,df->pf", "pd,pf->df", "pf,df->pd", "btd,sud->btsu", "btsu,sud->btd", "btsu,btd->sud", "nd,vd->vn"]
)
def test_equations_are_einsums(large, equation):
    rng, sizes = np.random.default_rng(2), dict(zip("pdfbtsunv", (6, 5, 7, 2, 3, 1, 4, 3, 8), strict=True))
    left, right = (
        random(rng, [sizes[axis] for axis in axes], "bfloat16") for axes in equation[:-1].split("->")[0].split(",")
    )
    ours, theirs = (product_kernels.einsum(equation, left, right, jnp.float32, kernel) for kernel in ("native", "xla"))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("equation", ["bnd,bmd->bnm", "pde,df->pef", "pd,df->fxp"])
def test_an_equation_that_is_no_product_of_matrices_is_refused(equation):
    sizes = dict.fromkeys("bnmdpefx", 2)
    left, right = (jnp.ones([sizes[axis] for axis in axes]) for axes in equation.split("->")[0].split(","))
    with pytest.raises(ValueError, match=f"'{equation}' is not a product of two matrices"):
        product_kernels.einsum(equation, left, right, None, "native")


def test_gradients_of_projections_are_xlas(large):
    rng = np.random.default_rng(3)
    arguments = [random(rng, shape, "bfloat16") for shape in ((2, 5, 6), (6, 3, 4), (3, 4, 6), (6, 9))]

    def total(kernels):
        def of(x_BTD, kernel_DNH, kernel_NHD, kernel_DF):
            heads_BTNH = to_heads(x_BTD, kernel_DNH, is_flat=False, kernels=kernels)
            x_BTD += from_heads(heads_BTNH, kernel_NHD, is_flat=False, kernels=kernels)
            out_BTF = jnp.sin(project(x_BTD, kernel_DF, jnp.float32, kernels))
            return (out_BTF * project_by_rows(x_BTD, 2 * kernel_DF.T, jnp.float32, kernels)).sum()

        return compiled(jax.value_and_grad(of, argnums=(0, 1, 2, 3)))(*arguments)

    ours, theirs = total("native"), total("xla")
    assert_near(ours, theirs)


@pytest.mark.parametrize("vocab_chunks", [0, 1, 2], ids=["blocks", "whole", "chunks"])
@pytest.mark.parametrize("scan_layers", [False, True])
def test_loss_and_its_gradients_are_xlas(large, scan_layers, vocab_chunks):
    config = dataclasses.replace(TINY, dtype="bfloat16", scan_layers=scan_layers)
    params, rng = random_params(config), np.random.default_rng(4)
    rows_BT = jnp.asarray(rng.integers(0, config.vocab_size, (8, 65)), jnp.int32)

    def loss(products):
        settled = dataclasses.replace(config, products=products)

        def of(params):
            x_BTD = decoder.hidden_states(settled, params, rows_BT[:, :-1])
            weights_BT = jnp.ones((8, 64)) / 512
            return next_token_loss(settled, params, x_BTD, rows_BT[:, 1:], weights_BT, vocab_chunks=vocab_chunks)[0]

        return compiled(jax.value_and_grad(of))(params)

    (ours, gradients), (theirs, expected) = loss("native"), loss("xla")
    assert ours == pytest.approx(float(theirs), rel=2e-3)
    assert_near(gradients, expected)


def test_remat_dots_keeps_the_product_and_does_not_compute_it_again(large):
    x_BTD, kernel_DF = jnp.ones((2, 5, 3), jnp.bfloat16), jnp.ones((3, 7), jnp.bfloat16)
    layer = jax.checkpoint(lambda x: jnp.sin(project(x, kernel_DF, None, "native")), policy=remat.POLICIES["dots"])
    kept = jax.tree.leaves(jax.eval_shape(lambda x: jax.vjp(layer, x)[1], x_BTD))
    assert {(2, 5, 7), (10, 7)} & {array.shape for array in kept}


def test_auto_is_native_in_bfloat16_on_one_cpu_and_says_why_not_elsewhere(native):
    one, many = (sharding.make_mesh({"data": n, "fsdp": 1, "tensor": 1}, jax.devices()[:n]) for n in (1, 2))
    half, full = (dataclasses.replace(TINY, dtype=dtype) for dtype in ("bfloat16", "float32"))
    refusal = cpu_kernels.matmul_refusal()
    assert product_kernels.choose(half, one).kernel == ("xla" if refusal else "native")
    assert product_kernels.choose(half, many).reason == "auto: not native, XLA doesn't split its products over a mesh"
    forced = dataclasses.replace(full, products="native")
    with pytest.raises(
        ValueError, match=r"products='native' can't run: it multiplies in bfloat16, model.dtype is float32"
    ):
        product_kernels.choose(forced, one)
    assert product_kernels.choose(dataclasses.replace(half, products="xla"), one).kernel == "xla"


def test_likelihoods_are_xlas(large):
    params = random_params(TINY)
    config = dataclasses.replace(TINY, dtype="bfloat16")
    pairs = [((1, 2, 3), (4, 5)), ((1, 2, 3), (6,)), ((7,), (8, 9, 10))]
    ours, theirs = (
        score_continuations(dataclasses.replace(config, products=products), params, pairs)
        for products in ("auto", "xla")
    )
    np.testing.assert_allclose([s.logprob for s in ours], [s.logprob for s in theirs], atol=0.05)
    got, want = (
        token_log_probs(dataclasses.replace(config, products=products), params, list(range(1, 40)))
        for products in ("auto", "xla")
    )
    np.testing.assert_allclose(got.chosen_T, want.chosen_T, atol=0.05)


def test_products_are_settled_for_the_devices_of_the_parameters(native):
    half, devices = dataclasses.replace(TINY, dtype="bfloat16"), jax.devices()
    params, kernel = random_params(TINY), "xla" if cpu_kernels.matmul_refusal() else "native"
    assert product_kernels.settled(half, params).products == kernel
    assert product_kernels.settled(half, jax.tree.map(np.asarray, params)).products == kernel
    mesh = sharding.make_mesh({"data": 2, "fsdp": 1, "tensor": 1}, devices[:2])
    everywhere = jax.device_put(params, sharding.replicated(mesh))
    assert product_kernels.settled(half, everywhere).products == "xla"
