"""The fused update of AdamW against optax's, by itself and in a training step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from random_decoders import TINY

from safelm.data.batch import Batch
from safelm.models import cpu_kernels, sharding
from safelm.train import fused_adamw
from safelm.train import step as train_step
from safelm.train.defaults import default_config
from safelm.train.fused_adamw import FusedAdamW
from safelm.train.optimizer import make_optimizer
from safelm.train.program import configured_optimizer


@pytest.fixture(autouse=True)
def native():
    if refusal := cpu_kernels.refusal():
        pytest.skip(f"no CPU kernels: {refusal}")


def random_tree(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    shapes = {"a": (300, 257), "b": {"c": (7,), "d": (2, 3, 40_000)}, "e": ()}
    draw = lambda shape: jnp.asarray(scale * rng.standard_normal(shape), jnp.float32)  # noqa: E731
    return jax.tree.map(draw, shapes, is_leaf=lambda node: isinstance(node, tuple))


@pytest.mark.parametrize("clip_norm", [0.0, 1.0, 1e6])
def test_updates_are_those_of_optax_and_none_changes_nothing(clip_norm):
    params, axes = random_tree(0), {"a": ("vocab", "embed"), "b": {"c": ("norm",), "d": ("embed",) * 3}, "e": ()}
    optimizer = make_optimizer(b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, clip_norm=clip_norm, axes=axes)
    fused = FusedAdamW(0.9, 0.95, 1e-8, 0.1, clip_norm, (True, False, True, False))
    theirs, ours = (params, optimizer.init(params)), (params, optimizer.init(params))
    update = jax.jit(lambda params, state, gradients, **how: fused.update(params, state, gradients, **how))
    for step in range(3):
        summed, divisor = random_tree(step + 1, scale=0.3), jnp.float32(7)
        mean = jax.tree.map(lambda g: g / 7, summed)
        norm = jax.jit(fused.norm)(summed, divisor)
        assert norm == pytest.approx(float(optax.tree.norm(mean)), rel=1e-5)
        direction, state = optimizer.update(mean, theirs[1], theirs[0])
        theirs = jax.tree.map(lambda p, u: p - 0.01 * u, theirs[0], direction), state
        how = {"norm": norm, "divisor": divisor, "learning_rate": jnp.float32(0.01)}
        for is_applied in (False, True):
            before, ours = ours, update(*ours, summed, is_applied=jnp.asarray(is_applied), **how)
            if not is_applied:
                jax.tree.map(np.testing.assert_array_equal, ours, before)
        assert jax.tree.structure(ours) == jax.tree.structure(theirs)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), ours, theirs)


def test_norm_of_what_is_no_number_is_none():
    gradients = {"a": jnp.ones(100_000).at[77_777].set(jnp.nan), "b": jnp.ones(3)}
    norm = jax.jit(FusedAdamW(0.9, 0.95, 1e-8, 0.1, 1.0, (True, True)).norm)
    assert np.isnan(norm(gradients, jnp.float32(1)))
    assert norm(jax.tree.map(jnp.ones_like, gradients), jnp.float32(2)) == pytest.approx(np.sqrt(100_003) / 2)


def steps_of(monkeypatch, least, **controls):
    """Losses and the state after three steps, fused from `least` parameters on."""
    monkeypatch.setattr(fused_adamw, "LEAST_PARAMETERS", least)
    fields, mesh = (
        default_config().optimizer,
        sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1]),
    )
    fused = fused_adamw.choose(fields, TINY, mesh)
    assert (fused is None) == (least > 0)
    program = train_step.make_program(
        TINY, configured_optimizer(fields, TINY), mesh, batch_size=2, grad_accum_steps=1, fused=fused
    )
    rows_BT = np.random.default_rng(0).integers(0, TINY.vocab_size, (2, 17), dtype=np.int32)
    batch = Batch(
        inputs_BT=rows_BT[:, :-1],
        targets_BT=rows_BT[:, 1:],
        positions_BT=np.tile(np.arange(16, dtype=np.int32), (2, 1)),
        segment_ids_BT=np.ones((2, 16), np.int32),
        loss_weight_BT=np.ones((2, 16), np.float32),
        source_ids_B=np.zeros(2, np.int32),
        channels={},
    )
    losses = []
    with jax.set_mesh(mesh):
        state = program.start(program.init_params(jax.random.key(0)))
        for _ in range(3):
            state, metrics = program.step(state, batch, train_step.Controls(np.float32(1e-2), **controls))
            losses.append((float(metrics.loss.mean_cross_entropy()), float(metrics.grad_norm), bool(metrics.applied)))
    return losses, state


def test_training_is_the_same(monkeypatch):
    (ours, state), (theirs, expected) = (steps_of(monkeypatch, least) for least in (0, 2**62))
    assert ours[-1][0] < ours[0][0]
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-4), state, expected)


def test_a_step_that_is_not_applied_leaves_everything(monkeypatch):
    losses, state = steps_of(monkeypatch, 0, max_loss=np.float32(0))
    assert [applied for _, _, applied in losses] == [False] * 3 and len({loss for loss, _, _ in losses}) == 1
    adam = next(each for each in state.opt_state if isinstance(each, optax.ScaleByAdamState))
    assert adam.count == 0 and not any(leaf.any() for leaf in jax.tree.leaves((adam.mu, adam.nu)))


@pytest.mark.parametrize(
    ("change", "devices"),
    [({"products": "xla"}, 1), ({"param_dtype": "bfloat16"}, 1), ({}, 2), ({"name": "muon"}, 1)],
    ids=str,
)
def test_elsewhere_the_update_is_optaxs(monkeypatch, change, devices):
    monkeypatch.setattr(fused_adamw, "LEAST_PARAMETERS", 0)
    fields = default_config().optimizer
    fields.name = change.pop("name", "adamw")
    mesh = sharding.make_mesh({"data": devices, "fsdp": 1, "tensor": 1}, jax.devices()[:devices])
    assert fused_adamw.choose(fields, dataclasses.replace(TINY, **change), mesh) is None
