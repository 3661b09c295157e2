"""Schedules at their corners, and what clip, decay and AdamW do to a step."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from safelm.data.batch import Batch
from safelm.models import decoder, sharding
from safelm.models.decoder import ModelConfig
from safelm.train.optimizer import make_optimizer, make_schedule
from safelm.train.step import Controls, make_program

RUN = {"peak_lr": 1.0, "min_lr": 0.1, "warmup_steps": 10, "decay_steps": 20, "total_steps": 100}


def test_wsd_warms_up_stays_and_decays():
    lr = make_schedule("wsd", **RUN)
    np.testing.assert_allclose([lr(0), lr(4), lr(9), lr(10), lr(80)], [0.1, 0.5, 1, 1, 1], rtol=1e-6)
    np.testing.assert_allclose([lr(90), lr(99), lr(100), lr(500)], [0.55, 0.145, 0.1, 0.1], rtol=1e-5)


def test_cosine_and_linear_use_all_remaining_steps():
    cosine, linear = (make_schedule(name, **RUN) for name in ("cosine", "linear"))
    for lr in (cosine, linear):
        np.testing.assert_allclose([lr(0), lr(9), lr(10), lr(55), lr(100)], [0.1, 1, 1, 0.55, 0.1], rtol=1e-5)
    assert cosine(30) > linear(30) and cosine(80) < linear(80)


@pytest.mark.parametrize("name", ["wsd", "cosine", "linear"])
def test_schedule_without_warmup_or_decay(name):
    lr = make_schedule(name, **{**RUN, "warmup_steps": 0, "decay_steps": 0})
    assert lr(0) == 1.0


def test_schedules_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"optimizer.schedule is 'step'"):
        make_schedule("step", **RUN)
    with pytest.raises(ValueError, match=r"optimizer.warmup_steps is 101"):
        make_schedule("cosine", **{**RUN, "warmup_steps": 101})
    with pytest.raises(ValueError, match=r"decay of 95 steps"):
        make_schedule("wsd", **{**RUN, "decay_steps": 95})


def test_decay_applies_to_matrices_only():
    axes = {
        "embedding": ("vocab", "embed"),
        "block": {"norm": ("layers", "embed"), "up": ("layers", "embed", "mlp")},
        "norm": ("embed",),
    }
    params = jax.tree.map(lambda axes: jnp.ones([2] * len(axes)), axes, is_leaf=lambda node: isinstance(node, tuple))
    optimizer = make_optimizer(weight_decay=0.1, axes=axes)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    new = jax.tree.map(lambda p, u: p - 0.5 * u, params, updates)
    np.testing.assert_allclose(new["embedding"], 0.95, rtol=1e-6)  # 1 - lr * decay
    np.testing.assert_allclose(new["block"]["up"], 0.95, rtol=1e-6)
    np.testing.assert_array_equal(new["block"]["norm"], 1.0)
    np.testing.assert_array_equal(new["norm"], 1.0)


def test_clip_bounds_what_adam_sees():
    params = {"w": jnp.zeros((2, 2))}
    gradients = {"w": jnp.full((2, 2), 50.0)}  # global norm 100
    optimizer = make_optimizer(clip_norm=1.0, weight_decay=0.0)
    _, state = optimizer.update(gradients, optimizer.init(params), params)
    moments = optax.tree_utils.tree_get(state, "mu")["w"]
    np.testing.assert_allclose(moments, 0.1 * 0.5, rtol=1e-6)  # (1 - b1) * 50 / 100
    _, state = make_optimizer(clip_norm=0).update(gradients, optimizer.init(params), params)
    np.testing.assert_allclose(optax.tree_utils.tree_get(state, "mu")["w"], 5.0, rtol=1e-6)


def test_first_direction_is_the_sign_of_the_gradient():
    params = {"w": jnp.zeros((2, 2))}
    optimizer = make_optimizer(weight_decay=0.0)
    updates, _ = optimizer.update({"w": jnp.asarray([[1e-3, -1e-3], [1e-2, -1e-2]])}, optimizer.init(params), params)
    np.testing.assert_allclose(updates["w"], [[1, -1], [1, -1]], rtol=1e-3)


def test_unknown_optimizer_and_clip_are_refused():
    with pytest.raises(ValueError, match=r"optimizer.name is 'sgd'"):
        make_optimizer(name="sgd")
    with pytest.raises(ValueError, match=r"optimizer.clip_norm is -1"):
        make_optimizer(clip_norm=-1)


def test_muon_orthogonalizes_the_kernels_of_every_layer_by_itself_and_leaves_the_rest_to_adam():
    config = ModelConfig(
        vocab_size=64, d_model=16, d_ff=32, num_layers=3, num_heads=2, num_kv_heads=1, head_dim=8, max_seq_len=8
    )
    params = decoder.init(config, jax.random.key(0))
    gradients = jax.tree.map(lambda p: jax.random.normal(jax.random.key(p.size), p.shape), params)
    make = functools.partial(make_optimizer, axes=decoder.logical_axes(config), clip_norm=0, weight_decay=0.0)
    muon, adam = (make(name=name) for name in ("muon", "adamw"))
    step, _ = muon.update(gradients, muon.init(params), params)
    for kernel, fan_in in (("query", 16), ("key", 16), ("output", 16)):
        for layer in step["layers"]["attention"][kernel]:
            matrix = layer.reshape(fan_in, -1)
            singular = jnp.linalg.svd(matrix, compute_uv=False) / (0.2 * max(matrix.shape) ** 0.5)
            assert 0.6 < singular.min() and singular.max() < 1.3, kernel  # Newton and Schulz's five steps
    assert jax.tree.all(jax.tree.map(lambda s, g: (s * g).sum() > 0, step, gradients))  # parameters -= rate * step
    states = [muon.init(params), adam.init(params)]
    for scale in (1.0, -0.3, 0.01):  # from the second step on Nesterov's Adam takes another one
        scaled = jax.tree.map(lambda g, scale=scale: scale * g, gradients)
        step, states[0] = muon.update(scaled, states[0], params)
        expected, states[1] = adam.update(scaled, states[1], params)
        for found, wanted in ((step, expected), (step["layers"], expected["layers"])):
            for name in {"embedder", "final_norm", "attention_norm", "mlp_norm"} & found.keys():
                jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), found[name], wanted[name])


def test_muon_trains_a_sharded_model_as_an_unsharded_one_and_its_state_lives_with_the_parameters():
    config = ModelConfig(
        vocab_size=64, d_model=16, d_ff=32, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=8, max_seq_len=8
    )
    optimizer = make_optimizer(name="muon", axes=decoder.logical_axes(config))
    tokens_BT = jax.random.randint(jax.random.key(1), (8, 8), 0, 64)
    positions_BT, segment_ids_BT = jnp.arange(8)[None].repeat(8, 0), jnp.ones((8, 8), jnp.int32)
    loss_weight_BT, source_ids_B = jnp.ones((8, 8)), jnp.zeros(8, jnp.int32)
    batch = Batch(tokens_BT, tokens_BT, positions_BT, segment_ids_BT, loss_weight_BT, source_ids_B, {})
    losses = []
    for shape in ({"fsdp": 1}, {"fsdp": 4, "tensor": 2}):
        mesh = sharding.make_mesh({"data": 1, "tensor": 1} | shape, jax.devices()[: math.prod(shape.values())])
        with jax.set_mesh(mesh):
            program = make_program(config, optimizer, mesh, batch_size=8, grad_accum_steps=1)
            state = program.start(program.init_params(jax.random.key(0)))
            momenta = [leaf for leaf in jax.tree.leaves(program.abstract_state.opt_state) if leaf.ndim == 4]
            assert momenta and all("fsdp" in leaf.sharding.spec for leaf in momenta)
            for _ in range(3):
                state, told = program.step(state, batch, Controls(np.float32(0.02)))
            losses.append(float(told.loss.mean_cross_entropy()))
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
    assert losses[0] < math.log(64) - 0.3
