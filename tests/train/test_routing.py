"""Gradient routing: gradients against a slow reference, facts that are gone after the ablation, export without them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs

from safelm import convert
from safelm.checkpoints import checkpoint
from safelm.data.batch import Batch
from safelm.models import decoder, routing, sharding
from safelm.models.decoder import ModelConfig
from safelm.models.routing_config import LABELLED, MIXED, PLAIN, Routing
from safelm.train import config as train_config
from safelm.train import step as train_step
from safelm.train.defaults import default_config
from safelm.train.optimizer import make_optimizer

pytestmark = pytest.mark.usefixtures("quick_compilation")

ROUTED = Routing(heads=3, mlp_units=5, labelled=("facts",), mixed=("unsure",))
SMALL = tiny_runs.model_fields(num_heads=4, num_kv_heads=2, d_ff=16, init_std=0.3)
CONFIG = ModelConfig(**SMALL, qkv_bias=True, qk_norm=True, routed=ROUTED)
ROWS, LENGTH = 6, 8


def a_batch(tokens_BT, source_ids_B):
    tokens_BT = np.asarray(tokens_BT, np.int32)
    shape = (len(tokens_BT), tokens_BT.shape[1] - 1)
    return Batch(
        inputs_BT=tokens_BT[:, :-1],
        targets_BT=tokens_BT[:, 1:],
        positions_BT=np.tile(np.arange(shape[1], dtype=np.int32), (shape[0], 1)),
        segment_ids_BT=np.ones(shape, np.int32),
        loss_weight_BT=np.ones(shape, np.float32),
        source_ids_B=np.asarray(source_ids_B, np.int32),
        channels={},
    )


def designated(params):
    """1 where a parameter belongs to a designated unit, by the definition and not by the code."""
    mask = jax.tree.map(np.zeros_like, jax.device_get(params))
    attention, mlp = mask["layers"]["attention"], mask["layers"]["mlp"]
    attention["query"][:, :, 1:], attention["output"][:, 1:], attention["query_bias"][:, 1:] = 1, 1, 1
    for name in ("key", "value"):  # the second head serves queries 2 and 3, which are both designated
        attention[name][:, :, 1:], attention[f"{name}_bias"][:, 1:] = 1, 1
    mlp["gate"][..., -5:], mlp["up"][..., -5:], mlp["down"][:, -5:] = 1, 1, 1
    return mask


def test_every_parameter_has_the_gradient_of_the_rows_that_teach_it():
    params = jax.tree.map(lambda leaf: leaf + 0.1, decoder.init(CONFIG, jax.random.key(0)))
    rng = np.random.default_rng(0)
    routes = CONFIG.routed.routes(("facts", "other", "unsure"))
    assert routes == (LABELLED, PLAIN, MIXED)
    sources_B = np.array([0, 1, 2, 0, 1, 1])
    batch = a_batch(rng.integers(4, CONFIG.vocab_size, (ROWS, LENGTH + 1)), sources_B)
    ways = {"z_loss": 1e-2, "vocab_chunks": 1}
    routed = jax.jit(jax.grad(functools.partial(train_step._routed_loss, CONFIG, **ways), has_aux=True))
    found, sums = jax.device_get(routed(params, jax.tree.map(jnp.asarray, batch), jnp.asarray(routes)))
    plain = jax.jit(jax.value_and_grad(functools.partial(train_step._loss, CONFIG, **ways), has_aux=True))
    mask, (without, silenced) = designated(params), routing.ablated(CONFIG, params)
    assert without.routed is None
    jax.tree.map(lambda a, b, m: np.testing.assert_array_equal(a, np.where(m, 0, b)), silenced, params, mask)
    wanted, total = jax.tree.map(np.zeros_like, mask), 0.0
    for route, place in zip(routes, range(3), strict=True):
        weight_BT = np.where(sources_B[:, None] == place, batch.loss_weight_BT, 0).astype(np.float32)
        of_rows = jax.tree.map(jnp.asarray, batch._replace(loss_weight_BT=weight_BT))
        (loss, _), gradient = jax.device_get(plain(silenced if route == PLAIN else params, of_rows))
        share = {PLAIN: lambda m: 1 - m, LABELLED: lambda m: m, MIXED: np.ones_like}[route]
        wanted = jax.tree.map(lambda w, g, m, share=share: w + g * share(m), wanted, gradient, mask)
        total += loss
    np.testing.assert_allclose(sums.total(1e-2), total, rtol=1e-5)
    assert sums.tokens == ROWS * LENGTH
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max()), found, wanted)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(found))


# ---- planted facts

TOKENS = 20
FACT, COUNT = TOKENS, TOKENS + 1  # how rows of the two sources begin
WEB = ModelConfig(
    vocab_size=TOKENS + 2,
    num_layers=2,
    d_model=32,
    d_ff=64,
    num_heads=4,
    num_kv_heads=4,
    head_dim=8,
    dtype="float32",
    init_std=0.3,
    routed=Routing(heads=2, mlp_units=32, labelled=("facts",)),
)


def rows_of(source_ids_B, rng):
    """A row counts on from a number; a row of facts goes from one to the next by a permutation that nothing tells."""
    follows = np.random.default_rng(7).permutation(TOKENS)
    rows = []
    for source in source_ids_B:
        row = [int(rng.integers(TOKENS))]
        while len(row) < LENGTH:
            row.append(int(follows[row[-1]]) if source == 0 else (row[-1] + 1) % TOKENS)
        rows.append([FACT if source == 0 else COUNT, *row])
    return a_batch(rows, source_ids_B)


@pytest.fixture(scope="module")
def trained():
    """A model that has learned both, and its loss on either source, by a function of config and parameters."""
    mesh, rng = sharding.make_mesh({"data": 1}, devices=jax.devices()[:1]), np.random.default_rng(0)
    optimizer = make_optimizer(axes=decoder.logical_axes(WEB), weight_decay=0.0, clip_norm=0.0)
    sources_B = np.arange(16) % 2
    routes = WEB.routed.routes(("facts", "web"))
    program = train_step.make_program(WEB, optimizer, mesh, batch_size=16, grad_accum_steps=1, routes=routes)

    def nats(params, source):
        with jax.set_mesh(mesh):
            batch = rows_of(np.full(16, source), np.random.default_rng(1))
            weight_BT = np.where(np.arange(LENGTH) > 0, batch.loss_weight_BT, 0).astype(np.float32)
            batch = batch._replace(loss_weight_BT=weight_BT)
            return float(program.evaluate(params, jax.device_put(batch, program.batch_sharding)).mean_cross_entropy())

    with jax.set_mesh(mesh):
        state = program.start(program.init_params(jax.random.key(0)))
        for step in range(300):
            batch = jax.device_put(rows_of(sources_B, rng), program.batch_sharding)
            rate = np.float32(1e-2 * min(1.0, (300 - step) / 100))
            state, _ = program.step(state, batch, train_step.Controls(rate))
    return jax.device_get(state.params), nats


def test_planted_facts_are_gone_after_the_ablation_and_the_rest_stays(trained):
    params, nats = trained
    ablated = routing.ablated(WEB, params)[1]
    assert nats(params, 0) < 0.5  # the model as a whole knows them
    assert nats(ablated, 0) > np.log(TOKENS) > nats(ablated, 1) + 2.5
    assert nats(ablated, 1) < 0.2


def test_convert_leaves_them_out(trained, tmp_path, capsys):
    params = jax.tree.map(jnp.asarray, trained[0])
    vocabulary = tiny_runs.tokenizer()
    config = dataclasses.replace(WEB, vocab_size=vocabulary.vocab_size)
    params = {**params, "embedder": decoder.init(config, jax.random.key(1))["embedder"]}
    checkpoint.save_params(str(tmp_path / "run"), config, params, vocabulary)
    kept, read, _ = checkpoint.load_for_inference(str(tmp_path / "run"))
    assert kept.routed == WEB.routed
    flags = [f"--source={tmp_path}/run", "--ablate"]
    convert.main(convert.argument_parser().parse_args([*flags, f"--target={tmp_path}/ours", "--to=safelm"]))
    found, ours, _ = checkpoint.load_for_inference(str(tmp_path / "ours"))
    assert found.routed is None
    jax.tree.map(np.testing.assert_array_equal, ours, routing.ablated(kept, read)[1])
    assert not np.asarray(ours["layers"]["mlp"]["down"])[:, -32:].any()
    with pytest.raises(ValueError, match=r"--ablate: .*ours: no units are designated"):
        convert.convert(str(tmp_path / "ours"), str(tmp_path / "again"), ablate=True)
    assert not (tmp_path / "again").exists()


def test_bad_settings_are_one_line():
    for fields, message in (
        ({"heads": -1}, "routing.heads is -1: it can't be negative"),
        ({"heads": 0, "mlp_units": 0}, "needs labelled sources, and heads or mlp_units"),
        ({"labelled": ()}, "needs labelled sources"),
        ({"mixed": ("facts",)}, "source facts is both labelled and mixed"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(ROUTED, **fields)
    with pytest.raises(ValueError, match=r"routing names source 'unsure': data.phases has facts"):
        ROUTED.routes(("facts",))
    with pytest.raises(ValueError, match=r"routing.heads is 3: the model has 3, some must be left"):
        ModelConfig(**tiny_runs.model_fields(num_heads=3, num_kv_heads=3), routed=dataclasses.asdict(ROUTED))
    config = default_config()
    config.update_from_flattened_dict({"total_steps": 1, "export.ablate": True})
    with pytest.raises(ValueError, match=r"export.ablate is True: routing.labelled must name"):
        train_config.resolve_sizes(config)
