"""Fractional loss weights against slow references in float64: chunked and blocked losses, packed rows, accumulation."""

import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_runs
from hypothesis import given, settings
from hypothesis import strategies as st
from token_stores import EOS_ID, write_store

from safelm.data.batch import abstract_batch
from safelm.data.channels import CHANNELS, Channel
from safelm.data.loader import eval_batches
from safelm.models import blocked_loss, sharding
from safelm.models import decoder as model
from safelm.models.chunked_loss import next_token_loss
from safelm.models.decoder import ModelConfig
from safelm.train import step as train_step
from safelm.train.data import TrainData

pytestmark = pytest.mark.usefixtures("quick_compilation")

ROWS, LENGTH, Z_LOSS = 16, 12, 1e-2
CONFIG = ModelConfig(**tiny_runs.model_fields())
WAYS = {"whole": 1, "chunked": 3, "blocked": 0}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """What is not asked for in chunks is computed in blocks of at most 16 tokens."""
    monkeypatch.setattr(blocked_loss, "MIN_BLOCK_TOKENS", 4)
    monkeypatch.setattr(blocked_loss, "BLOCK_BYTES", 4 * 16 * CONFIG.padded_vocab_size)


@functools.cache
def params():
    """Parameters with spread-out logits."""
    return jax.tree.map(lambda p: np.asarray(p) * 10, jax.jit(functools.partial(model.init, CONFIG))(jax.random.key(0)))


@functools.cache
def loss_and_gradients(vocab_chunks):
    def loss(kernel_VD, x_BTD, targets_BT, weight_BT):
        tied = {"embedder": {"embedding": kernel_VD}}
        settings = {"z_loss": Z_LOSS, "vocab_chunks": vocab_chunks}
        return next_token_loss(CONFIG, tied, x_BTD, targets_BT, weight_BT, **settings)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


def slow_loss_and_gradients(kernel_VD, x_BTD, targets_BT, weight_BT):
    """Sums and gradients position by position, in float64."""
    kernel_VD, x_BTD, weight_BT = (np.asarray(a, np.float64) for a in (kernel_VD, x_BTD, weight_BT))
    kernel_VD = kernel_VD[: CONFIG.vocab_size]
    total, cross_entropy, kernel_grad, x_grad = 0.0, 0.0, np.zeros_like(kernel_VD), np.zeros_like(x_BTD)
    for at in np.ndindex(*weight_BT.shape):
        logits = kernel_VD @ x_BTD[at]
        log_z = logits.max() + np.log(np.exp(logits - logits.max()).sum())
        nats = log_z - logits[targets_BT[at]]
        cross_entropy += weight_BT[at] * nats
        total += weight_BT[at] * (nats + Z_LOSS * log_z**2)
        grad = np.exp(logits - log_z) * (1 + 2 * Z_LOSS * log_z)
        grad[targets_BT[at]] -= 1
        kernel_grad += weight_BT[at] * np.outer(grad, x_BTD[at])
        x_grad[at] = weight_BT[at] * (grad @ kernel_VD)
    return total, cross_entropy, kernel_grad, x_grad


def assert_close(ours, theirs, tolerance=1e-5):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * max(np.abs(theirs).max(), 1e-30))


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1), scale=st.sampled_from([1e-4, 0.3, 50.0]), zeros=st.sampled_from([0.0, 0.5, 0.97])
)
@pytest.mark.parametrize("way", WAYS)
def test_weighted_sums_and_their_gradients_are_those_in_float64(way, seed, scale, zeros):
    rng = np.random.default_rng(seed)
    kernel_VD = params()["embedder"]["embedding"]
    x_BTD = rng.normal(size=(4, LENGTH, CONFIG.d_model)).astype(np.float32)
    targets_BT = rng.integers(0, CONFIG.vocab_size, (4, LENGTH)).astype(np.int32)
    weight_BT = (scale * rng.random((4, LENGTH)) * (rng.random((4, LENGTH)) >= zeros)).astype(np.float32)
    inputs = (kernel_VD, x_BTD, targets_BT, weight_BT)
    (total, sums), (kernel_grad, x_grad) = jax.device_get(loss_and_gradients(WAYS[way])(*inputs))
    slow_total, slow_cross_entropy, slow_kernel_grad, slow_x_grad = slow_loss_and_gradients(*inputs)
    assert_close(total, slow_total)
    assert_close(sums.cross_entropy, slow_cross_entropy)
    assert_close(kernel_grad[: CONFIG.vocab_size], slow_kernel_grad)
    assert_close(x_grad, slow_x_grad)
    assert sums.tokens == np.count_nonzero(weight_BT)
    weight = weight_BT.astype(np.float64).sum()
    assert_close(sums.mean_cross_entropy(), slow_cross_entropy / weight if weight else 0.0)


# ---- a whole update


def weighted_documents(seed):
    """Documents no longer than a row, and weights of all sizes, many of them 0, whole documents among them."""
    rng, documents, weights = np.random.default_rng(seed), [], []
    for index in range(16):
        length = rng.integers(2, LENGTH)
        documents.append(np.append(rng.integers(4, CONFIG.vocab_size, length - 1), EOS_ID))
        weight = rng.random(length) * 10.0 ** rng.integers(-3, 1) * (rng.random(length) < index / 16)
        weights.append(weight.astype(np.float32))
    return documents, weights


@functools.cache
def token_gradients():
    """(document, length) -> nats and the gradients of every token's objective, of one document in a row of its own."""

    def objectives(params, inputs_T, targets_T, segment_ids_T):
        x_BTD = model.hidden_states(CONFIG, params, inputs_T[None], segment_ids_BT=segment_ids_T[None])
        log_probs_TV = jax.nn.log_softmax(model.unembed(CONFIG, params, x_BTD)[0], axis=-1)
        log_z_T = jax.nn.logsumexp(model.unembed(CONFIG, params, x_BTD)[0], axis=-1)
        nats_T = -jnp.take_along_axis(log_probs_TV, targets_T[:, None], axis=-1)[:, 0]
        return nats_T + Z_LOSS * log_z_T**2, nats_T

    jacobian = jax.jit(jax.jacrev(objectives, has_aux=True))

    def of(document):
        padding = (0, LENGTH - len(document))
        inputs_T, targets_T = (np.pad(a, padding).astype(np.int32) for a in ([EOS_ID, *document[:-1]], document))
        return jax.device_get(
            jacobian(params(), inputs_T, targets_T, (np.arange(LENGTH) < len(document)).astype(np.int32))
        )

    return of


@functools.cache
def slow_update(seed):
    """Mean loss and gradient over the documents one by one, summed in float64."""
    weight, loss, gradient = 0.0, 0.0, jax.tree.map(lambda p: np.zeros(p.shape), params())
    for document, weights in zip(*weighted_documents(seed), strict=True):
        gradients, nats_T = token_gradients()(document)
        wide_T = np.pad(weights, (0, LENGTH - len(weights))).astype(np.float64)
        weight, loss = weight + wide_T.sum(), loss + wide_T @ nats_T
        gradient = jax.tree.map(lambda sum_, g, w=wide_T: sum_ + np.tensordot(w, g, axes=1), gradient, gradients)
    return loss / weight, jax.tree.map(lambda g: g / weight, gradient)


@pytest.mark.parametrize(
    "way, grad_accum_steps, data",
    [
        ("chunked", 4, 1),
        pytest.param("blocked", 2, 1, marks=pytest.mark.slow),
        pytest.param("whole", 2, 2, marks=pytest.mark.slow),
    ],
)
def test_an_update_of_packed_rows_is_the_weighted_mean_over_documents(tmp_path, way, grad_accum_steps, data):
    mesh = sharding.make_mesh({"data": data}, devices=jax.devices()[:data])
    options = {"batch_size": ROWS, "grad_accum_steps": grad_accum_steps, "vocab_chunks": WAYS[way]}
    keeper = optax.trace(decay=0.0)  # its state is the gradient
    program = train_step.make_program(CONFIG, keeper, mesh, z_loss=Z_LOSS, **options)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, program.abstract_state.params)
    for seed in range(2):
        documents, weights = weighted_documents(seed)
        numbers = [{"loss_weight": weight} for weight in weights]
        store = write_store(tmp_path / str(seed), documents, numbers=numbers)
        (batch,) = eval_batches(store, batch_size=ROWS, seq_len=LENGTH, packing="fit")
        assert batch.segment_ids_BT.max() > 1  # documents share rows
        parts = batch.loss_weight_BT.reshape(ROWS // grad_accum_steps, grad_accum_steps, LENGTH).sum((0, 2))
        assert len(set(parts)) == grad_accum_steps  # the micro-batches' weights are unequal, or this would prove little
        with jax.set_mesh(mesh):
            state = program.start(jax.device_put(params(), shardings))
            batch = jax.device_put(batch, program.batch_sharding)
            state, metrics = program.step(state, batch, train_step.Controls(np.float32(0.0)))
        loss, gradient = slow_update(seed)
        assert_close(metrics.loss.mean_cross_entropy(), loss)
        assert metrics.loss.tokens == sum(np.count_nonzero(weight) for weight in weights)
        jax.tree.map(lambda ours, theirs: assert_close(ours, theirs, 3e-5), state.opt_state.trace, gradient)


def test_every_batch_of_a_run_has_the_channels_of_all_its_stores(inputs, tmp_path):
    """Else it would not be what the programs were compiled for, before the first step."""
    shutil.copytree(inputs, tmp_path / "inputs")
    label, origin = Channel("label", "int8", "token", -1), Channel("origin", "int32", "document", 7)
    for source, split, channel in (("raw_web", "train", label), ("safeweb", "validation", origin)):
        tiny_runs.write_store(tmp_path / "inputs" / "tokens", source, split, channels=(*CHANNELS, channel))
    options = {"eval.every_steps": 3, "eval.sources": ("raw_web", "safeweb")}
    config = tiny_runs.tiny_config(tmp_path / "inputs", **options)
    data = TrainData(config, tiny_runs.tokenizer())
    where = sharding.batch_sharding(sharding.make_mesh({"data": 1}, devices=jax.devices()[:1]))
    compiled_for = abstract_batch(config.batch_size, config.seq_len, data.channels, sharding=where)
    for batch in (next(data.batches(0, where)), *(next(data.eval_batches(name, where)) for name in data.eval_stores)):
        assert jax.tree.structure(batch) == jax.tree.structure(compiled_for)
        for array, shape in zip(jax.tree.leaves(batch), jax.tree.leaves(compiled_for), strict=True):
            assert (array.shape, array.dtype, array.sharding) == (shape.shape, shape.dtype, shape.sharding)
        real = np.asarray(batch.segment_ids_BT) > 0
        assert set(np.asarray(batch.channels["label"])[real]) == {-1}
        assert set(np.asarray(batch.channels["origin"])[real]) == {7}
