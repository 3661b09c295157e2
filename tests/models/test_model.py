"""Properties of the decoder: causal, blind across documents, the same however it is computed."""

import collections
import dataclasses
import functools
import math
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_decoders import TINY, UNTIED, random_params, random_tokens

from safelm.models import decoder as model
from safelm.models import sharding
from safelm.models.config import RopeScaling

apply = jax.jit(model.apply, static_argnums=0)
SIZES = {
    "1.7B": (model.ModelConfig(49152, 24, 2048, 8192, 32, 32, 64), 1_711_376_384),
    "360M": (model.ModelConfig(49152, 32, 960, 2560, 15, 5, 64), 361_821_120),
    "135M": (model.ModelConfig(49152, 30, 576, 1536, 9, 3, 64), 134_515_008),
}


def loss(config, params, tokens_BT, **kwargs):
    log_probs = jax.nn.log_softmax(model.apply(config, params, tokens_BT[:, :-1], **kwargs))
    return -jnp.take_along_axis(log_probs, tokens_BT[:, 1:, None], axis=-1).mean()


@functools.cache
def value_and_grad(config):
    return jax.jit(jax.value_and_grad(functools.partial(loss, config)))


def assert_trees_close(a, b, atol):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol), a, b)


@pytest.mark.parametrize("size", SIZES)
def test_published_parameter_counts(size):
    config, count = SIZES[size]
    assert config.num_params == count
    assert sum(leaf.size for leaf in jax.tree.leaves(model.abstract_params(config))) == count


@pytest.mark.parametrize("config", [TINY, UNTIED], ids=["tied", "untied"])
def test_num_params_leaves_out_padding(config):
    rows = (config.padded_vocab_size - config.vocab_size) * config.d_model * (1 if config.tie_embeddings else 2)
    assert sum(leaf.size for leaf in jax.tree.leaves(model.abstract_params(config))) == config.num_params + rows


@pytest.mark.parametrize("config", [TINY, UNTIED], ids=["tied", "untied"])
def test_logical_axes_fit_the_parameters(config):
    params = model.abstract_params(config)
    axes = model.logical_axes(config)
    assert jax.tree.structure(params) == jax.tree.structure(axes, is_leaf=sharding.is_names)
    sizes = {"layers": 3, "vocab": 384, "embed": 32, "norm": 32, "mlp": 64, "heads": 4, "kv_heads": 2, "head_dim": 8}
    jax.tree.map(lambda names, leaf: _check_names(sizes, names, leaf), axes, params, is_leaf=sharding.is_names)


def _check_names(sizes, names, leaf):
    assert tuple(sizes[name] for name in names) == leaf.shape


def initialized(config):
    """Fresh parameters, compiled as outside the tests: without fusion emitters two programs differ in the last bit."""
    options = {"xla_cpu_use_fusion_emitters": True} if "use_fusion_emitters" in os.environ["SAFELM_TESTS_XLA"] else {}
    init = jax.jit(functools.partial(model.init, config), compiler_options=options)
    return init(jax.random.key(3))


def test_init_is_as_documented():
    config = dataclasses.replace(UNTIED, d_model=128, d_ff=256, init_std=0.05)
    params = initialized(config)
    assert isinstance(params, dict) and all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    assert np.std(params["layers"]["mlp"]["up"]) == pytest.approx(0.05, rel=0.02)
    assert np.std(params["layers"]["mlp"]["down"]) == pytest.approx(0.05 / np.sqrt(6), rel=0.02)
    assert np.std(params["embedder"]["embedding"][:300]) == pytest.approx(0.05, rel=0.02)
    assert not params["embedder"]["embedding"][300:].any() and not params["unembed"]["kernel"][:, 300:].any()
    unrolled = initialized(dataclasses.replace(config, scan_layers=False, remat="full"))
    assert_trees_close(params, unrolled, atol=0)
    layers = np.asarray(params["layers"]["mlp"]["up"])
    assert not np.array_equal(layers[0], layers[1])


def test_causality_by_gradient():
    params = random_params(TINY)
    x_BTD = jnp.take(params["embedder"]["embedding"], random_tokens(1, 9), axis=0)

    def logits_from_embeddings(x_BTD):  # token t's embedding is row t of the table
        table = jnp.zeros_like(params["embedder"]["embedding"]).at[:9].set(x_BTD[0])
        swapped = {**params, "embedder": {"embedding": table}}
        return model.hidden_states(TINY, swapped, jnp.arange(9)[None])

    jacobian = jax.jacobian(logits_from_embeddings)(x_BTD)  # [1, T, D, 1, T, D]
    influence = np.abs(np.asarray(jacobian)).sum(axis=(0, 2, 3, 5))
    assert not np.triu(influence, k=1).any()
    assert (influence[np.tril_indices(9)] > 1e-6).all()


@pytest.mark.parametrize("config", [TINY, UNTIED], ids=["tied", "untied"])
def test_packed_documents_equal_unpacked(config):
    lengths = (5, 1, 7)
    documents = [random_tokens(1, length, seed=10 + length) for length in lengths]
    packed = jnp.concatenate([*documents, jnp.zeros((1, 3), jnp.int32)], axis=1)
    segment_ids = np.repeat([1, 2, 3, 0], [*lengths, 3])[None]
    positions = np.concatenate([np.arange(n) for n in (*lengths, 3)])[None]
    logits = apply(config, random_params(config), packed, positions_BT=positions, segment_ids_BT=segment_ids)
    start = 0
    for document in documents:
        alone = apply(config, random_params(config), document)
        np.testing.assert_allclose(logits[:, start : start + document.shape[1]], alone, atol=2e-5)
        start += document.shape[1]
    assert np.isfinite(logits).all()


@pytest.mark.parametrize("config, remat", [(TINY, "none"), (UNTIED, "full")], ids=["tied", "untied-remat"])
def test_loop_equals_scan(config, remat):
    scanned = dataclasses.replace(config, remat=remat)
    unrolled = dataclasses.replace(scanned, scan_layers=False)
    assert jax.tree.map(jnp.shape, model.abstract_params(scanned)) == jax.tree.map(
        jnp.shape, model.abstract_params(unrolled)
    )
    (loss_scan, grads_scan), (loss_loop, grads_loop) = (
        value_and_grad(c)(random_params(config), random_tokens(2, 12)) for c in (scanned, unrolled)
    )
    np.testing.assert_allclose(loss_scan, loss_loop, atol=1e-6)
    assert_trees_close(grads_scan, grads_loop, atol=1e-6)


def test_remat_gives_the_same_loss_and_gradients_by_another_program():
    programs, results = {}, {}
    names = ("keep:attention,gate", "keep:query;offload:up")
    for remat in ("none", "dots", "full", *names):
        step = value_and_grad(dataclasses.replace(TINY, remat=remat))
        inputs = random_params(TINY), random_tokens(4, 33)
        compiled = step.lower(*inputs).compile()
        programs[remat] = compiled.as_text()
        results[remat] = (compiled(*inputs), compiled.memory_analysis().temp_size_in_bytes)
    for remat in ("dots", "full", *names):
        assert programs[remat] != programs["none"]
        assert_trees_close(results[remat][0], results["none"][0], atol=1e-6)
    dots = {remat: text.count(" dot(") for remat, text in programs.items()}
    assert dots["full"] > dots["dots"] >= dots["none"], dots  # recomputed matmuls
    assert results["full"][1] < results["none"][1]  # bytes


def test_padded_logits_are_masked_and_get_no_gradient():
    for config in (TINY, UNTIED):
        logits = apply(config, random_params(config), random_tokens(2, 6))
        assert logits.dtype == jnp.float32 and logits.shape == (2, 6, 384)
        assert (logits[..., 300:] == model.MASKED_LOGIT).all() and (np.abs(logits[..., :300]) < 1e3).all()
        assert not jax.nn.softmax(logits)[..., 300:].any()
        grads = value_and_grad(config)(random_params(config), random_tokens(2, 12))[1]
        assert not grads["embedder"]["embedding"][300:].any()
        assert config.tie_embeddings or not grads["unembed"]["kernel"][:, 300:].any()


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_parameters_and_logits():
    config = dataclasses.replace(TINY, dtype="bfloat16")
    x_BTD = model.hidden_states(config, random_params(TINY), random_tokens(2, 6))
    logits = model.unembed(config, random_params(TINY), x_BTD)
    assert x_BTD.dtype == jnp.bfloat16 and logits.dtype == jnp.float32
    exact = apply(TINY, random_params(TINY), random_tokens(2, 6))
    np.testing.assert_allclose(logits[..., :300], exact[..., :300], atol=0.5)
    grads = value_and_grad(config)(random_params(TINY), random_tokens(2, 12))[1]
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(grads))


def test_hidden_states_of_a_layer():
    params, tokens_BT = random_params(TINY), random_tokens(2, 6)
    embedded = model.hidden_states(TINY, params, tokens_BT, layer=0)
    np.testing.assert_array_equal(embedded, params["embedder"]["embedding"][tokens_BT])
    shallow = dataclasses.replace(TINY, num_layers=2)
    cut = {**params, "layers": jax.tree.map(lambda p: p[:2], params["layers"])}
    np.testing.assert_array_equal(
        model.hidden_states(TINY, params, tokens_BT, layer=2), model.hidden_states(shallow, cut, tokens_BT, layer=2)
    )
    last = model.hidden_states(TINY, params, tokens_BT, layer=3)
    normed = last / np.sqrt(np.mean(np.square(last), axis=-1, keepdims=True) + TINY.rms_norm_eps)
    normed *= params["final_norm"]["scale"]
    np.testing.assert_allclose(normed, model.hidden_states(TINY, params, tokens_BT), atol=1e-5)
    several = model.layer_states(TINY, params, tokens_BT, (3, 0, 2, 2))
    for layer, states in zip((3, 0, 2, 2), several, strict=True):
        np.testing.assert_allclose(states, model.hidden_states(TINY, params, tokens_BT, layer=layer), atol=1e-6)
    unrolled = dataclasses.replace(TINY, scan_layers=False)  # costs of a scan's body are counted once
    flops = [
        jax.jit(run).lower().cost_analysis()["flops"]
        for run in (
            lambda: model.layer_states(unrolled, params, tokens_BT, (1, 2, 3)),
            lambda: model.hidden_states(unrolled, params, tokens_BT),
        )
    ]
    assert flops[0] < 1.1 * flops[1]
    with pytest.raises(ValueError, match="layer=4: the model has layers 0 to 3"):
        model.hidden_states(TINY, params, tokens_BT, layer=4)


MESHES = [{"data": 8}, {"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}]


@pytest.mark.parametrize(
    "shape",
    [*(pytest.param(shape, marks=pytest.mark.slow) for shape in MESHES[:2]), MESHES[2]],
    ids=lambda shape: "-".join(f"{k}{v}" for k, v in shape.items()),
)
def test_sharded_equals_single_device(shape):
    config = dataclasses.replace(TINY, remat="dots")
    params, tokens_BT = random_params(TINY), random_tokens(8, 13)
    expected = value_and_grad(config)(params, tokens_BT)
    mesh = sharding.make_mesh(shape)
    shardings = sharding.param_shardings(mesh, model.logical_axes(config), model.abstract_params(config))
    batch = sharding.batch_sharding(mesh, 8)
    with jax.set_mesh(mesh):
        sharded_step = jax.jit(
            jax.value_and_grad(functools.partial(loss, config)),
            in_shardings=(shardings, batch),
            out_shardings=(sharding.replicated(mesh), shardings),
        )
        actual = sharded_step(jax.device_put(params, shardings), jax.device_put(tokens_BT, batch))
    rounding = 8 * np.spacing(np.float32(expected[0]))  # devices add up in another order
    np.testing.assert_allclose(actual[0], expected[0], rtol=0, atol=rounding)
    assert_trees_close(actual[1], expected[1], atol=1e-6)
    if "fsdp" in shape:
        up = actual[1]["layers"]["mlp"]["up"]
        assert up.addressable_shards[0].data.size < up.size


def test_parameters_can_be_made_under_a_mesh():
    shapes, axes = model.abstract_params(TINY), model.logical_axes(TINY)
    with jax.set_mesh(sharding.make_mesh({"data": -1})):
        assert model.logical_axes(TINY) == axes
        assert jax.eval_shape(functools.partial(model.init, TINY), jax.random.key(0)) == shapes


def test_processes_must_not_hold_the_same_rows(monkeypatch):
    mesh = sharding.make_mesh({"data": 1, "tensor": 8})
    sharding.batch_sharding(mesh, 8)
    device = collections.namedtuple("device", "id process_index")
    held = {device(index, index // 4): (slice(None),) for index in range(8)}  # as if the devices were two processes'
    monkeypatch.setattr(jax.sharding.NamedSharding, "devices_indices_map", lambda *_: held)
    with pytest.raises(ValueError, match=r"mesh.tensor=8: a process holds 8 of 8 rows .* one of 2 equal shares"):
        sharding.batch_sharding(mesh, 8)


def test_mesh_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"mesh.data=3 x mesh.fsdp=1 x mesh.tensor=1 needs 3 devices, but there are 8"):
        sharding.make_mesh({"data": 3})
    with pytest.raises(ValueError, match=r"mesh.expert: unknown mesh axis"):
        sharding.make_mesh({"expert": 8})
    with pytest.raises(ValueError, match=r"mesh.fsdp=0"):
        sharding.make_mesh({"fsdp": 0})
    assert dict(sharding.make_mesh({"data": -1, "tensor": 2}).shape) == {"data": 4, "fsdp": 1, "tensor": 2}
    config, _ = SIZES["360M"]
    mesh = sharding.make_mesh({"tensor": 2, "fsdp": 4})
    with pytest.raises(ValueError, match=r"mesh.tensor=2 does not divide model.num_heads=15, model.num_kv_heads=5"):
        sharding.param_shardings(mesh, model.logical_axes(config), model.abstract_params(config))
    with pytest.raises(ValueError, match=r"batch_size=6 is not a multiple of mesh.data x mesh.fsdp = 4"):
        sharding.batch_sharding(mesh, 6)
    with pytest.raises(ValueError, match="unknown logical axis 'colour'"):
        sharding.partition_spec(("colour",))


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("num_kv_heads", 3, "model.num_kv_heads=3 does not divide num_heads=4"),
        ("head_dim", 7, "model.head_dim=7"),
        ("remat", "some", "model.remat='some': one of none, full, dots"),
        ("remat", "keep:gate,gates", "model.remat='keep:gate,gates': unknown name 'gates', there are query, key"),
        ("remat", "keep:gate;offload:gate", "gate is named twice"),
        ("remat", "offload:gate;keep:up", "model.remat='offload:gate;keep:up': one of none, full, dots"),
        ("attention", "flash", "model.attention='flash': one of auto, xla, splash, cudnn"),
        ("dtype", "int8", "model.dtype='int8'"),
        ("norms", "between", "model.norms='between': one of before, after, around"),
        ("activation", "relu", "model.activation='relu': one of silu, gelu"),
        ("query_pre_attn_scalar", 0.0, "model.query_pre_attn_scalar=0.0: must be above 0"),
        ("d_model", 0, "model.d_model=0: must be at least 1"),
    ],
)
def test_config_refuses(field, value, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **{field: value})


def test_layers_that_differ_are_scanned_and_a_window_hides_what_is_behind_it():
    config = dataclasses.replace(TINY, windows=(3, 0, 4), rope_thetas=(0.0, 1e4, 50.0))
    params, tokens_BT = random_params(config), random_tokens(2, 12)
    unrolled = dataclasses.replace(config, scan_layers=False)
    one, other = (model.hidden_states(each, params, tokens_BT) for each in (config, unrolled))
    np.testing.assert_allclose(one, other, atol=1e-5)
    changed_BT = tokens_BT.at[:, 2].add(1)
    first, both = (model.layer_states(config, params, each, (1, 2)) for each in (tokens_BT, changed_BT))
    first_differs, second_differs = (np.abs(a - b).max(axis=(0, 2)) > 1e-6 for a, b in zip(first, both, strict=True))
    assert first_differs.nonzero()[0].tolist() == [2, 3, 4]  # a window of three, itself included
    assert second_differs.nonzero()[0].tolist() == list(range(2, 12))
    assert TINY.flops_per_token(12) - config.flops_per_token(12) == 12 * 4 * 8 * (9 + 8)
    for wrong in ({"windows": (1, 2)}, {"windows": (-1, 0, 0)}, {"rope_thetas": (1.0,) * 4}):
        with pytest.raises(ValueError, match=rf"model.{min(wrong)}=\(.*: want a number of at least 0 for each of 3"):
            dataclasses.replace(TINY, **wrong)


def test_qk_norm_and_rope_scaling_change_the_model_and_are_counted():
    scaling = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=16)
    plain = apply(TINY, random_params(TINY), random_tokens(1, 12))
    scaled = apply(dataclasses.replace(TINY, rope_scaling=scaling), random_params(TINY), random_tokens(1, 12))
    assert np.abs(plain - scaled).max() > 1e-2
    config = dataclasses.replace(TINY, qk_norm=True)
    assert config.num_params == TINY.num_params + 2 * TINY.num_layers * TINY.head_dim
    padding = (TINY.padded_vocab_size - TINY.vocab_size) * TINY.d_model
    assert sum(leaf.size for leaf in jax.tree.leaves(model.abstract_params(config))) == config.num_params + padding
    assert config.flops_per_token(64) == TINY.flops_per_token(64)  # norms are no matrix products
    tenfold = jax.tree.map(jnp.copy, random_params(config))
    for name in ("query", "key"):  # a norm undoes what scales its input
        tenfold["layers"]["attention"][name] *= 10.0
    same = (apply(config, each, random_tokens(1, 12)) for each in (random_params(config), tenfold))
    np.testing.assert_allclose(*same, atol=2e-4)
    for wrong in ({"low_freq_factor": 5.0}, {"factor": math.nan}, {"original_max_seq_len": 0}, {"beta": 1.0}):
        with pytest.raises(ValueError, match=r"model.rope_scaling=\{.*wants"):
            dataclasses.replace(TINY, rope_scaling=dataclasses.asdict(scaling) | wrong)
