"""The loss by kind of token: against a slow reference, without any effect on the loss, sharded, in the log."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_runs

from safelm.data.batch import Batch
from safelm.data.channels import KIND, UNLIKELIHOOD
from safelm.data.token_kinds import KINDS, MASKED, NOTE, TAG, TEXT, UNLIKELY
from safelm.models import blocked_loss, sharding
from safelm.models.chunked_loss import next_token_loss
from safelm.models.decoder import ModelConfig
from safelm.models.loss import TokenKinds
from safelm.train import metrics as train_metrics
from safelm.train import step as train_step

pytestmark = pytest.mark.usefixtures("quick_compilation")

CONFIG = ModelConfig(**tiny_runs.model_fields(num_kv_heads=2))
ROWS, LENGTH = 8, 12
TAG_ID = tiny_runs.tokenizer().harm_tag_id


@pytest.mark.parametrize("vocab_chunks", [1, 3, 0])
def test_the_sums_are_those_of_a_slow_reference_and_the_loss_stays_as_it_is(vocab_chunks, monkeypatch):
    monkeypatch.setattr(blocked_loss, "MIN_BLOCK_TOKENS", 4)
    monkeypatch.setattr(blocked_loss, "BLOCK_BYTES", 4 * 16 * CONFIG.padded_vocab_size)
    rng = np.random.default_rng(0)
    kernel_VD = np.zeros((CONFIG.padded_vocab_size, CONFIG.d_model), np.float32)
    kernel_VD[: CONFIG.vocab_size] = rng.normal(size=(CONFIG.vocab_size, CONFIG.d_model))
    x_BTD = rng.normal(size=(ROWS, LENGTH, CONFIG.d_model)).astype(np.float32)
    targets_BT = rng.integers(0, CONFIG.vocab_size, (ROWS, LENGTH)).astype(np.int32)
    weight_BT = rng.choice([0.0, 0.5, 1.0], (ROWS, LENGTH)).astype(np.float32)
    ids_BT = rng.integers(-1, len(KINDS) - 1, (ROWS, LENGTH)).astype(np.int32)

    def loss(kernel_VD, x_BTD, kinds):
        params, weights = {"embedder": {"embedding": kernel_VD}}, (weight_BT, 0.3 * (weight_BT == 0))
        given = map(jnp.float32, weights)
        ways = {"kinds": kinds, "z_loss": 1e-2, "vocab_chunks": vocab_chunks}
        return next_token_loss(CONFIG, params, x_BTD, jnp.asarray(targets_BT), *given, **ways)

    of_both = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (total, sums), gradients = jax.device_get(of_both(kernel_VD, x_BTD, TokenKinds(ids_BT, len(KINDS))))
    (plain, plain_sums), plain_gradients = jax.device_get(of_both(kernel_VD, x_BTD, None))
    assert plain_sums.by_kind_KS is None and sums.replace(by_kind_KS=None) == plain_sums and total == plain
    jax.tree.map(np.testing.assert_array_equal, gradients, plain_gradients)
    logits_BTV = x_BTD.astype(np.float64) @ kernel_VD[: CONFIG.vocab_size].T
    log_z_BT = np.log(np.exp(logits_BTV).sum(-1))
    loss_BT = weight_BT * (log_z_BT - np.take_along_axis(logits_BTV, targets_BT[..., None], -1)[..., 0])
    slow = [[array_BT[ids_BT == k].sum() for array_BT in (loss_BT, weight_BT, weight_BT >= 0)] for k in range(7)]
    np.testing.assert_allclose(sums.by_kind_KS, slow, rtol=1e-5)
    assert sums.by_kind_KS[-1].tolist() == [0, 0, 0] and sums.by_kind_KS[:, 2].sum() == (ids_BT >= 0).sum()


def a_batch():
    """Rows whose stores say of some tokens that they are notes; others are tags, masked, unlikely or padding."""
    rng = np.random.default_rng(1)
    shape = (ROWS, LENGTH)
    targets_BT = rng.integers(4, CONFIG.vocab_size, shape).astype(np.int32)
    wanted_BT = rng.choice([TEXT, TAG, MASKED, UNLIKELY, NOTE, -1], shape)
    targets_BT[wanted_BT == TAG] = TAG_ID
    targets_BT[np.isin(wanted_BT, (MASKED, -1))] = 0
    said_BT = np.where(np.isin(wanted_BT, (NOTE, UNLIKELY)), wanted_BT, TEXT).astype(np.int32)
    batch = Batch(
        inputs_BT=np.roll(targets_BT, 1, axis=1),
        targets_BT=targets_BT,
        positions_BT=np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1)),
        segment_ids_BT=(wanted_BT >= 0).astype(np.int32),
        loss_weight_BT=np.isin(wanted_BT, (TEXT, TAG, NOTE)).astype(np.float32),
        source_ids_B=np.zeros(ROWS, np.int32),
        channels={KIND.name: said_BT, UNLIKELIHOOD.name: (wanted_BT == UNLIKELY).astype(np.float32)},
    )
    return batch, wanted_BT


def updated(mesh_shape, grad_accum_steps, harm_tag_id):
    batch, _ = a_batch()
    num_devices = int(np.prod(list(mesh_shape.values())))
    mesh = sharding.make_mesh(mesh_shape, devices=jax.devices()[:num_devices])
    sizes = {"batch_size": ROWS, "grad_accum_steps": grad_accum_steps}
    program = train_step.make_program(CONFIG, optax.identity(), mesh, **sizes, harm_tag_id=harm_tag_id)
    params = program.init_params(jax.random.key(0))
    with jax.set_mesh(mesh):
        placed = jax.device_put(batch, program.batch_sharding)
        state, metrics = program.step(program.start(params), placed, train_step.Controls(np.float32(0.1)))
    return jax.device_get((state.params, metrics.loss))


def test_an_update_is_the_same_with_kinds_and_tells_them_apart_on_any_mesh():
    plain, plain_sums = updated({"data": 1}, 1, None)
    params, sums = updated({"data": 1}, 1, TAG_ID)
    assert train_step.with_kinds(a_batch()[0], None).channels.keys() == {UNLIKELIHOOD.name}
    assert plain_sums.by_kind_KS is None
    np.testing.assert_allclose(plain_sums.total(0), sums.total(0), rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), params, plain)  # float32's rounding
    _, wanted_BT = a_batch()
    assert sums.by_kind_KS[:, 2].tolist() == [(wanted_BT == kind).sum() for kind in range(len(KINDS))]
    assert np.flatnonzero(sums.by_kind_KS[:, 0]).tolist() == [TEXT, TAG, NOTE]
    np.testing.assert_allclose(sums.by_kind_KS[:, 0].sum(), sums.cross_entropy, rtol=1e-6)
    sharded, sharded_sums = updated({"data": 2, "fsdp": 2}, 2, TAG_ID)
    np.testing.assert_allclose(sharded_sums.by_kind_KS, sums.by_kind_KS, rtol=2e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), sharded, params)


def test_the_log_has_loss_and_share_of_every_kind_that_occurs(capsys):
    by_kind_KS = np.zeros((len(KINDS), 3), np.float32)
    by_kind_KS[[TEXT, NOTE, MASKED]] = [[6, 3, 3], [1, 0.5, 1], [0, 0, 4]]
    zero = jnp.float32(0)
    sums = train_step.LossSums(jnp.float32(7), zero, jnp.float32(3.5), jnp.float32(4), by_kind_KS=by_kind_KS)
    window = train_metrics.LossWindow()
    window.add(train_step.StepMetrics(sums, jnp.float32(1), jnp.bool(True)))
    resumed = train_metrics.LossWindow()
    resumed.load(json.loads(json.dumps(window.record())))
    for each in (window, resumed):
        values = each.take()
        assert train_metrics.loss_by_kind(values) == {"text": 2.0, "note": 2.0}
        assert {name: value for name, value in values.items() if name.startswith("share/")} == {
            "share/text": 3 / 8,
            "share/note": 1 / 8,
            "share/masked": 4 / 8,
        }
        each.add(train_step.StepMetrics(sums.replace(by_kind_KS=None), jnp.float32(1), jnp.bool(True)))
        assert not [name for name in each.take() if "/" in name]
    progress = train_metrics.Progress(total_steps=9, tokens_per_step=1, flops_per_token=1, peak_flops=None)
    progress.show(3, 2.0, {"text": 2.0, "note": 1.5})
    progress.show(4, 2.0)
    first, second = capsys.readouterr().err.splitlines()
    assert "loss 2.0000 (text 2.0000, note 1.5000)  " in first and "loss 2.0000  " in second
