"""The loss over parts of the vocabulary is the loss of whole logits, which are then nowhere in the program."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from safelm.models import blocked_loss, sharding
from safelm.models import decoder as model
from safelm.models.chunked_loss import next_token_loss, num_chunks
from safelm.models.decoder import ModelConfig
from safelm.train import step as train_step
from safelm.train.optimizer import make_optimizer

ROWS, LENGTH, REAL, PADDED = 8, 6, 300, 384
TIED = ModelConfig(
    vocab_size=REAL, num_layers=1, d_model=16, d_ff=16, num_heads=2, num_kv_heads=2, head_dim=8, dtype="float32"
)
UNTIED = dataclasses.replace(TIED, tie_embeddings=False)


@functools.cache
def _inputs(config: ModelConfig, dtype="float32"):
    """Parameters with spread-out logits, hidden states, targets (an id of padding among them) and unequal weights."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: p * 20, jax.jit(functools.partial(model.init, config))(jax.random.key(0)))
    x_BTD = jnp.asarray(rng.normal(size=(ROWS, LENGTH, config.d_model)), dtype)
    targets_BT = jnp.asarray(rng.integers(0, REAL, (ROWS, LENGTH)), jnp.int32)
    loss_weight_BT = jnp.asarray(rng.random((ROWS, LENGTH)) * rng.integers(0, 2, (ROWS, LENGTH)), jnp.float32)
    return params, x_BTD, targets_BT, loss_weight_BT


@functools.cache
def _step(config: ModelConfig, chunks: int, z_loss: float = 0.01):
    def loss(params, x_BTD, targets_BT, loss_weight_BT):
        return next_token_loss(config, params, x_BTD, targets_BT, loss_weight_BT, z_loss=z_loss, vocab_chunks=chunks)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


def _evaluate(config: ModelConfig):
    """The total without a gradient."""
    return jax.jit(lambda *inputs: next_token_loss(config, *inputs, z_loss=0.01)[0])


def _assert_close(ours, theirs, tolerance):
    """Every array within a share of the other's largest number."""
    for a, b in zip(jax.tree.leaves(jax.device_get(ours)), jax.tree.leaves(jax.device_get(theirs)), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * np.abs(b).max())


@pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied"])
@pytest.mark.parametrize("chunks, z_loss", [(3, 0.01), pytest.param(48, 0.0, marks=pytest.mark.slow)])
def test_parts_give_the_loss_and_gradients_of_the_whole(config, chunks, z_loss):
    ours = _step(config, chunks, z_loss)(*_inputs(config))
    _assert_close(ours, _step(config, 1, z_loss)(*_inputs(config)), 1e-5)
    kernel_grad_VD = model.unembedding(config, ours[1][0])
    assert kernel_grad_VD[:REAL].any(axis=1).all() and not kernel_grad_VD[REAL:].any()


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 16 tokens."""
    monkeypatch.setattr(blocked_loss, "MIN_BLOCK_TOKENS", 4)
    monkeypatch.setattr(blocked_loss, "BLOCK_BYTES", 4 * 16 * PADDED)
    _step.cache_clear()


@pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied"])
def test_blocks_of_tokens_give_the_loss_and_gradients_of_the_whole(small_blocks, config):
    assert blocked_loss.num_blocks(ROWS * LENGTH, PADDED, config.d_model) == 3
    text = _step(config, 0).lower(*_inputs(config)).as_text()
    assert f"tensor<16x{PADDED}xf32>" in text and f"x{LENGTH}x{PADDED}xf32" not in text
    _assert_close(_step(config, 0)(*_inputs(config)), _step(config, 1)(*_inputs(config)), 1e-5)
    (total, _), evaluated = _step(config, 0)(*_inputs(config))[0], _evaluate(config)(*_inputs(config))
    _assert_close(evaluated, total, 1e-6)


def test_blocks_only_where_they_are_faster():
    assert blocked_loss.num_blocks(4096, 2048, 128) == 4
    assert blocked_loss.num_blocks(512, 49_280, 576) == 1  # a kernel too large
    assert blocked_loss.num_blocks(4099, 2048, 128) == 1  # a prime number of tokens
    assert blocked_loss.num_blocks(8, 384, 16) == 1
    with jax.set_mesh(sharding.make_mesh({"data": 8})):
        assert blocked_loss.num_blocks(4096, 2048, 128) == 1


@pytest.mark.parametrize("chunks", [3, 0])
def test_a_target_that_is_padding_gives_no_gradient_either(small_blocks, chunks):
    params, x_BTD, targets_BT, loss_weight_BT = _inputs(TIED)
    inputs = (params, x_BTD, targets_BT.at[:, 0].set(REAL + 1), loss_weight_BT)
    _assert_close(_step(TIED, chunks)(*inputs)[1], _step(TIED, 1)(*inputs)[1], 1e-5)


def test_bfloat16_is_summed_in_float32():
    config = dataclasses.replace(TIED, dtype="bfloat16")
    params, x_BTD, *rest = _inputs(config, "bfloat16")
    (_, sums), (param_grads, x_grad_BTD) = _step(config, 3)(params, x_BTD, *rest)
    assert x_grad_BTD.dtype == jnp.bfloat16 and param_grads["embedder"]["embedding"].dtype == jnp.float32
    rounded = jax.tree.map(lambda p: p.astype(jnp.bfloat16).astype(jnp.float32), params)
    (_, exact), exact_grads = _step(TIED, 1)(rounded, x_BTD.astype(jnp.float32), *rest)
    _assert_close(sums, exact, 1e-5)
    _assert_close(jax.tree.map(jnp.float32, (param_grads, x_grad_BTD)), exact_grads, 1e-2)


@pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied"])
@pytest.mark.parametrize(
    "shape",
    [pytest.param({"fsdp": 8}, marks=pytest.mark.slow), {"data": 2, "fsdp": 2, "tensor": 2}],
    ids=["fsdp", "tensor"],
)
def test_over_a_mesh(config, shape):
    theirs = _step(config, 1)(*_inputs(config))
    mesh = sharding.make_mesh(shape)
    params, *batch = _inputs(config)
    with jax.set_mesh(mesh):
        params = jax.device_put(params, sharding.param_shardings(mesh, model.logical_axes(config)))
        _assert_close(_step(config, 3)(params, *jax.device_put(batch, sharding.batch_sharding(mesh))), theirs, 1e-5)


def _largest_array(text: str) -> int:
    """Elements of the largest array in a compiled program."""
    return max(int(np.prod([int(n) for n in shape.split(",")])) for shape in re.findall(r"\w\d+\[([\d,]+)\]", text))


@pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied"])
def test_whole_logits_are_nowhere_in_the_program(config):
    tokens, parameters = 8 * 24, PADDED * config.d_model
    params, x_BTD, targets_BT, loss_weight_BT = _inputs(config)
    inputs = (params, *(jnp.tile(array, (1, 4, 1)[: array.ndim]) for array in (x_BTD, targets_BT, loss_weight_BT)))
    largest = {chunks: _largest_array(_step(config, chunks).lower(*inputs).compile().as_text()) for chunks in (1, 6)}
    assert largest[1] >= tokens * PADDED  # or the test sees nothing
    assert largest[6] == tokens * PADDED // 6 > parameters


def test_number_of_parts(monkeypatch):
    assert [num_chunks(asked, 8, 384) for asked in (0, 1, 2, 5, 49, 384)] == [1, 1, 2, 6, 64, 384]
    assert num_chunks(0, 512, 49_280) == 1 and num_chunks(0, 16_384, 49_280) == 14
    with jax.set_mesh(sharding.make_mesh({"fsdp": 4, "tensor": 2})):
        assert num_chunks(0, 16_384, 49_280) == 2 and num_chunks(0, 4 * 16_384, 49_280) == 7
        with pytest.raises(ValueError, match=r"loss.vocab_chunks is 193: a device holds 192 ids of the vocabulary"):
            num_chunks(193, 8, 384)


def test_the_training_step_takes_its_parts():
    mesh = sharding.make_mesh({}, devices=jax.devices()[:1])
    optimizer = make_optimizer(axes=model.logical_axes(TIED))
    with_whole_logits = {}
    for chunks in (1, 3):
        program = train_step.make_program(
            TIED, optimizer, mesh, batch_size=ROWS, grad_accum_steps=1, vocab_chunks=chunks
        )
        batch = train_step.abstract_batch(program, ROWS, LENGTH)
        step = program.step.lower(program.abstract_state, batch, train_step.abstract_controls(mesh))
        evaluate = program.evaluate.lower(program.abstract_state.params, batch)
        with_whole_logits[chunks] = [f"{ROWS}x{LENGTH}x{PADDED}xf32" in low.as_text() for low in (step, evaluate)]
    assert with_whole_logits == {1: [True, True], 3: [False, False]}
