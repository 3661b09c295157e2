"""Loss and gradients of the real step on eight devices are those of one device, whatever the mesh and the settings.

The settings: layers scanned or not, remat none, full or dots, one micro-batch or four of very unequal masks, embeddings
tied or not. Of all 8 x 24 combinations 16 are run: every mesh twice, with opposite choices of the three settings that
have two values and two kinds of remat. Over the meshes, all 8 combinations of the three come twice, and each kind of
remat meets both values of each (a test checks this). So what goes wrong in one setting, in two together, or in a
setting on one mesh shows; a fault that needs a mesh and two settings at once may not.

The gradients are those the step hands to its optimizer: here one that does nothing but keep them.
"""

import functools
import itertools

import jax
import numpy as np
import optax
import pytest

from safelm.data.batch import Batch
from safelm.models import sharding
from safelm.models.decoder import ModelConfig
from safelm.train import step as train_step

ROWS, LENGTH, VOCAB = 32, 12, 300
MESHES = ((8, 1, 1), (1, 8, 1), (2, 4, 1), (4, 2, 1), (4, 1, 2), (1, 4, 2), (2, 2, 2), (1, 1, 8))
REMATS = ("none", "full", "dots")


def _design():
    """(mesh, scan_layers, micro-batches, tie_embeddings, remat) of every case."""
    choices = list(itertools.product((True, False), (1, 4), (True, False)))
    for index, mesh in enumerate(MESHES):
        for turn, (scan, micro_batches, tied) in enumerate((choices[index], choices[-1 - index])):
            yield mesh, scan, micro_batches, tied, REMATS[(index + turn) % 3]


CASES = list(_design())
FIRST = (CASES[3], CASES[6], CASES[8], CASES[13])  # every setting and every axis at least once; the others are slow


def _batch():
    """Rows of two documents each; the loss counts about r of the positions of row r of 32, so micro-batches differ."""
    rng = np.random.default_rng(0)
    tokens_BT = rng.integers(0, VOCAB, (ROWS, LENGTH + 1)).astype(np.int32)
    return Batch(
        inputs_BT=tokens_BT[:, :-1],
        targets_BT=tokens_BT[:, 1:],
        positions_BT=np.tile(np.r_[np.arange(5), np.arange(LENGTH - 5)], (ROWS, 1)).astype(np.int32),
        segment_ids_BT=np.tile(np.r_[np.full(5, 1), np.full(LENGTH - 5, 2)], (ROWS, 1)).astype(np.int32),
        loss_weight_BT=(rng.random((ROWS, LENGTH)) < np.arange(ROWS)[:, None] / ROWS).astype(np.float32),
        source_ids_B=np.zeros(ROWS, np.int32),
        channels={},
    )


def _loss_and_gradients(mesh_shape, scan, micro_batches, tied, remat, num_kv_heads):
    """The sums of the loss, the gradients' norm and the gradients, from one step of the real program."""
    config = ModelConfig(
        VOCAB,
        num_layers=2,
        d_model=16,
        d_ff=32,
        num_heads=8,
        num_kv_heads=num_kv_heads,
        head_dim=4,
        dtype="float32",
        scan_layers=scan,
        remat=remat,
        tie_embeddings=tied,
    )
    devices = jax.devices()[: int(np.prod(mesh_shape))]
    mesh = sharding.make_mesh(dict(zip(sharding.MESH_AXES, mesh_shape, strict=True)), devices=devices)
    keeper = optax.trace(decay=0.0)  # its state is the gradients
    program = train_step.make_program(
        config, keeper, mesh, batch_size=ROWS, grad_accum_steps=micro_batches, z_loss=1e-3
    )
    with jax.set_mesh(mesh):
        state = program.start(program.init_params(jax.random.key(0)))
        batch = jax.device_put(_batch(), program.batch_sharding)
        state, metrics = program.step(state, batch, train_step.Controls(np.float32(0.0)))
    return jax.device_get((metrics.loss, metrics.grad_norm, state.opt_state.trace))


@functools.cache
def _on_one_device(tied, num_kv_heads):
    return _loss_and_gradients((1, 1, 1), True, 1, tied, "none", num_kv_heads)


@pytest.mark.parametrize(
    "case", [case if case in FIRST else pytest.param(case, marks=pytest.mark.slow) for case in CASES], ids=str
)
def test_eight_devices_are_one(case):
    mesh_shape, *_, tied, _ = case
    num_kv_heads = max(2, mesh_shape[2])
    (sums, norm, gradients), (ref_sums, ref_norm, ref_gradients) = (
        _loss_and_gradients(*case, num_kv_heads),
        _on_one_device(tied, num_kv_heads),
    )
    assert sums.tokens == ref_sums.tokens == _batch().loss_weight_BT.sum()
    np.testing.assert_allclose((sums.cross_entropy, sums.z_square), (ref_sums.cross_entropy, ref_sums.z_square), 1e-5)
    np.testing.assert_allclose(norm, ref_norm, rtol=1e-5)
    assert jax.tree.structure(gradients) == jax.tree.structure(ref_gradients)
    for gradient, reference in zip(jax.tree.leaves(gradients), jax.tree.leaves(ref_gradients), strict=True):
        assert np.abs(reference).max() > 1e-5
        np.testing.assert_allclose(gradient, reference, rtol=0, atol=1e-5 * np.abs(reference).max())


def test_the_cases_cover_what_they_say():
    masks = _batch().loss_weight_BT
    assert len(set(masks.reshape(ROWS // 4, 4, LENGTH).sum((0, 2)))) == 4  # the four micro-batches' masks are unequal
    mesh, scan, micro_batches, tied, remat = range(5)
    for setting in (scan, micro_batches, tied):
        for other, number in ((mesh, 8), (remat, 3)):
            assert len({(case[setting], case[other]) for case in CASES}) == 2 * number
    assert all(len({case[setting] for case in FIRST}) == 2 for setting in (scan, micro_batches, tied))
    assert {case[remat] for case in FIRST} == set(REMATS)
    assert all(max(sizes) > 1 for sizes in zip(*(case[mesh] for case in FIRST), strict=True))
    triples = [(case[scan], case[micro_batches], case[tied]) for case in CASES]
    assert all(triples.count(triple) == 2 for triple in itertools.product((True, False), (1, 4), (True, False)))
    assert all(len({case[remat] for case in CASES if case[mesh] == shape}) == 2 for shape in MESHES)
