"""One update: accumulated = whole, sharded = single device, bfloat16 state, metrics and MFU's numbers."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_runs

from safelm.data.batch import Batch
from safelm.models import sharding
from safelm.models.decoder import ModelConfig, logical_axes
from safelm.train import metrics as train_metrics
from safelm.train import step as train_step
from safelm.train.optimizer import make_optimizer

ROWS, LENGTH = 16, 12


def _batch(seed=0):
    """Rows of two documents each, whose masks are very unequal: row r counts about r of 12 positions."""
    rng = np.random.default_rng(seed)
    tokens_BT = rng.integers(4, tiny_runs.tokenizer().vocab_size, (ROWS, LENGTH + 1)).astype(np.int32)
    positions_BT = np.tile(np.r_[np.arange(5), np.arange(LENGTH - 5)], (ROWS, 1)).astype(np.int32)
    segment_ids_BT = np.tile(np.r_[np.full(5, 1), np.full(LENGTH - 5, 2)], (ROWS, 1)).astype(np.int32)
    loss_weight_BT = (rng.random((ROWS, LENGTH)) < np.arange(ROWS)[:, None] / ROWS).astype(np.float32)
    return Batch(
        inputs_BT=tokens_BT[:, :-1],
        targets_BT=tokens_BT[:, 1:],
        positions_BT=positions_BT,
        segment_ids_BT=segment_ids_BT,
        loss_weight_BT=loss_weight_BT,
        source_ids_B=np.zeros(ROWS, np.int32),
        channels={},
    )


def _controls(step=0, **limits):
    return train_step.Controls(np.float32(1e-2 * (1 - step / 10)), **limits)


@functools.cache
def _program(mesh_shape, grad_accum_steps):
    """The functions of a tiny run on a mesh over the first devices, and the mesh."""
    config = ModelConfig(**tiny_runs.model_fields(num_kv_heads=2))
    optimizer = make_optimizer(eps=1e-4, weight_decay=0.0, axes=logical_axes(config))
    num_devices = int(np.prod([size for _, size in mesh_shape]))
    mesh = sharding.make_mesh(dict(mesh_shape), devices=jax.devices()[:num_devices])
    program = train_step.make_program(
        config, optimizer, mesh, batch_size=ROWS, grad_accum_steps=grad_accum_steps, z_loss=1e-3
    )
    return program, mesh


def _update(mesh_shape, *, grad_accum_steps=1, steps=3):
    """Runs updates on a mesh; returns the state on the host and the last metrics."""
    program, mesh = _program(tuple(mesh_shape.items()), grad_accum_steps)
    state = program.start(program.init_params(jax.random.key(0)))
    with jax.set_mesh(mesh):
        for step in range(steps):
            state, metrics = program.step(state, jax.device_put(_batch(step), program.batch_sharding), _controls(step))
        assert program.step._cache_size() == 1  # nothing is compiled twice
    for leaf, target in zip(jax.tree.leaves(state), jax.tree.leaves(program.abstract_state), strict=True):
        assert leaf.sharding == target.sharding and leaf.dtype == target.dtype
    return jax.device_get(state), jax.device_get(metrics)


@pytest.fixture(scope="module")
def whole():
    return _update({"data": 1})


def _assert_same(a, b):
    (state_a, metrics_a), (state_b, metrics_b) = a, b
    np.testing.assert_allclose(jax.tree.leaves(metrics_a), jax.tree.leaves(metrics_b), rtol=2e-5)
    for x, y in zip(jax.tree.leaves(state_a), jax.tree.leaves(state_b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=2e-5)


def test_accumulated_is_not_accumulated(whole):
    counts = _batch().loss_weight_BT.reshape(ROWS // 4, 4, LENGTH).sum((0, 2))
    assert len(set(counts)) > 1  # the micro-batches' masks are unequal, or this would prove little
    _assert_same(whole, _update({"data": 1}, grad_accum_steps=4))


@pytest.mark.parametrize(
    ("mesh_shape", "grad_accum_steps"),
    [
        ({"data": 8}, 2),
        pytest.param({"fsdp": 8}, 2, marks=pytest.mark.slow),
        ({"data": 2, "fsdp": 2, "tensor": 2}, 2),
    ],
)
def test_sharded_is_single_device(whole, mesh_shape, grad_accum_steps):
    _assert_same(whole, _update(mesh_shape, grad_accum_steps=grad_accum_steps))


def test_gradients_cross_the_data_axis_once_an_update_not_once_a_micro_batch():
    program, mesh = _program((("data", 8),), 2)
    arguments = (program.abstract_state, train_step.abstract_batch(program, ROWS, LENGTH))
    with jax.set_mesh(mesh):
        compiled = program.step.lower(*arguments, train_step.abstract_controls(mesh)).compile().as_text()
    loops, once = compiled.split("\nENTRY ")
    assert " while(" in once and " all-reduce(" in once and " all-reduce(" not in loops


def test_a_batch_without_targets_changes_nothing():
    program, mesh = _program((("data", 1),), 4)
    before = jax.device_get(program.init_params(jax.random.key(1)))
    batch = _batch()._replace(loss_weight_BT=np.zeros((ROWS, LENGTH), np.float32))
    with jax.set_mesh(mesh):
        state = program.start(jax.device_put(before))
        state, metrics = program.step(state, jax.device_put(batch, program.batch_sharding), _controls())
    assert metrics.loss.tokens == 0 and metrics.grad_norm == 0
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.params), before)


@pytest.mark.parametrize("limit", [{"max_loss": np.float32(0.5)}, {"max_grad_norm": np.float32(1e-3)}, "nan"])
def test_an_update_above_a_limit_is_not_applied(limit):
    program, mesh = _program((("data", 1),), 1)
    with jax.set_mesh(mesh):
        state = program.start(program.init_params(jax.random.key(1)))
        batch = jax.device_put(_batch(), program.batch_sharding)
        if limit == "nan":
            poisoned = _batch().loss_weight_BT
            poisoned[3, 3] = np.nan
            bad, limits = batch._replace(loss_weight_BT=jax.device_put(poisoned, program.batch_sharding)), {}
        else:
            bad, limits = batch, limit
        state, _ = program.step(state, batch, _controls())
        before = jax.device_get(state)
        state, metrics = program.step(state, bad, _controls(1, **limits))
        assert not metrics.applied and int(state.step) == 2
        after = jax.device_get((state.params, state.opt_state))
        jax.tree.map(np.testing.assert_array_equal, after, (before.params, before.opt_state))
        state, metrics = program.step(state, batch, _controls(2))
        assert metrics.applied and program.step._cache_size() == 1


def test_the_learning_rate_is_data():
    program, mesh = _program((("data", 1),), 1)
    with jax.set_mesh(mesh):
        batch = jax.device_put(_batch(), program.batch_sharding)
        moved = []
        for rate in (1e-3, 2e-3):
            start = program.start(program.init_params(jax.random.key(1)))
            old = jax.device_get(start.params["final_norm"]["scale"])
            state, _ = program.step(start, batch, train_step.Controls(np.float32(rate)))
            moved.append(jax.device_get(state.params["final_norm"]["scale"]) - old)
        np.testing.assert_allclose(moved[1], 2 * moved[0], rtol=1e-3)
        lowered = program.step.lower(
            program.abstract_state, train_step.abstract_batch(program, ROWS, LENGTH), train_step.abstract_controls(mesh)
        )
        assert lowered.out_info[1].applied.dtype == bool


def test_evaluation_is_the_loss_of_the_step():
    program, mesh = _program((("data", 1),), 1)
    state = program.start(program.init_params(jax.random.key(0)))
    batch = jax.device_put(_batch(), program.batch_sharding)
    with jax.set_mesh(mesh):
        evaluated = program.evaluate(state.params, batch)
        _, metrics = program.step(state, batch, _controls())
    np.testing.assert_allclose(evaluated.cross_entropy, metrics.loss.cross_entropy, rtol=1e-5)
    assert evaluated.tokens == _batch().loss_weight_BT.sum()


def test_micro_batches_that_do_not_divide_are_refused():
    config = ModelConfig(**tiny_runs.model_fields())
    with pytest.raises(ValueError, match=r"batch_size.*4.*8"):
        train_step.make_program(
            config, optax.identity(), sharding.make_mesh({"data": 8}), batch_size=16, grad_accum_steps=4
        )


def test_mfu_formula():
    config = ModelConfig(49_152, 30, 576, 1536, 9, 3, 64)  # SmolLM2-135M
    norms = (2 * 30 + 1) * 576
    assert config.num_params == 134_515_008
    attention = 12 * 30 * 9 * 64 * 2048
    assert config.flops_per_token(2048) == 6 * (134_515_008 - norms) + attention
    assert train_metrics.peak_flops("TPU v5 lite") == 197e12
    assert train_metrics.peak_flops("TPU v5p") == 459e12 and train_metrics.peak_flops("TPU v4") == 275e12
    assert train_metrics.peak_flops("NVIDIA H100 80GB HBM3") == 989e12 != train_metrics.peak_flops("NVIDIA H100 PCIe")
    assert train_metrics.peak_flops("NVIDIA A10G") is None, "another chip than the A10"
    assert train_metrics.peak_flops("cpu") is None and train_metrics.peak_flops("cpu", 1.5e11) == 1.5e11


def test_window_leaves_out_updates_that_were_not_applied():
    sums = train_step.LossSums(jnp.float32(6.0), jnp.float32(0.0), jnp.float32(3.0), jnp.float32(4.0))
    good = train_step.StepMetrics(sums, jnp.float32(1.0), jnp.bool(True))
    window = train_metrics.LossWindow()
    assert window.add(good) == (2.0, 1.0, True)
    bad = good.replace(loss=sums.replace(cross_entropy=jnp.float32(np.nan)), applied=jnp.bool(False))
    assert not window.add(bad)[2]
    resumed = train_metrics.LossWindow()
    resumed.load(json.loads(json.dumps(window.record())))
    for each in (window, resumed):
        assert each.take() == {"loss": 2.0, "tokens_learned": 4, "grad_norm": 1.0} and each.take() == {}
