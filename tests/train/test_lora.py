"""Adapters: what they compute and learn against dense kernels, runs that train nothing else, and PEFT's folders."""

import dataclasses
import functools
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_decoders
import safetensors.numpy
import tiny_runs

from safelm import convert
from safelm.checkpoints import checkpoint
from safelm.data.batch import Batch
from safelm.formats import huggingface, peft, sources
from safelm.inference.weights import prepare
from safelm.models import decoder, lora, sharding
from safelm.models.config import PROJECTIONS, Lora, ModelConfig
from safelm.train import plan
from safelm.train import step as train_step
from safelm.train.optimizer import make_optimizer
from safelm.train.run import train

TINY = ModelConfig(**tiny_runs.model_fields(num_kv_heads=2, max_seq_len=32), lora=Lora(3, 7.0, PROJECTIONS))
GEMMA = dataclasses.replace(
    TINY, norms="around", norm_offset=True, activation="gelu", qk_norm=True, windows=(4, 0), scale_embeddings=True
)
TOKENS = np.random.default_rng(0).integers(1, 200, (8, 16)).astype(np.int32)
apply = jax.jit(decoder.apply, static_argnums=0)
CHANGE_THEIR_BASE = ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga")
LORA = {"lora.rank": 4, "lora.alpha": 8.0, "optimizer.peak_lr": 1e-2, "optimizer.decay_fraction": 0.0}


def params_of(config):
    return jax.tree.map(np.array, random_decoders.random_params(config))


def batch(weights=1.0):
    positions_BT, ones = np.arange(16, dtype=np.int32)[None].repeat(8, 0), np.ones((8, 16), np.int32)
    weight_BT = np.float32(weights) * np.random.default_rng(1).random((8, 16), np.float32)
    return Batch(TOKENS, np.roll(TOKENS, -1, 1), positions_BT, ones, weight_BT, np.zeros(8, np.int32), {})


@pytest.mark.parametrize("config", [TINY, GEMMA], ids=["llama", "gemma"])
@pytest.mark.parametrize(
    "targets", [PROJECTIONS, pytest.param(("value", "down"), marks=pytest.mark.slow)], ids=["all", "two"]
)
def test_merged_computes_what_base_and_adapters_do(config, targets):
    config = dataclasses.replace(config, lora=Lora(3, 7.0, targets))
    params = params_of(config)
    merged_config, merged = lora.merged(config, params)
    assert merged_config.lora is None and jax.tree.structure(merged) == jax.tree.structure(params_of(merged_config))
    with_adapters, without = (apply(c, p, TOKENS) for c, p in ((config, params), (merged_config, merged)))
    np.testing.assert_allclose(with_adapters, without, rtol=1e-4, atol=1e-4)
    base = apply(merged_config, lora.split(config, params)[1], TOKENS)
    assert np.abs(with_adapters - base).max() > 0.1
    prepared = (jax.tree.leaves(prepare(c, p)) for c, p in ((config, params), (merged_config, merged)))
    for ours, theirs in zip(*prepared, strict=True):
        np.testing.assert_array_equal(ours, theirs)  # the engine merges by itself


def test_new_adapters_change_nothing():
    params = jax.jit(decoder.init, static_argnums=0)(TINY, jax.random.key(0))
    base_config = dataclasses.replace(TINY, lora=None)
    base = lora.split(TINY, params)[1]
    np.testing.assert_array_equal(apply(TINY, params, TOKENS), apply(base_config, base, TOKENS))
    drawn = params["layers"]["lora"]["query_a"]
    assert np.std(drawn) == pytest.approx(lora.init_std(drawn.shape[1:]), rel=0.3)


def summed_loss(config, trained, frozen):
    on_device = jax.tree.map(jnp.asarray, batch())
    return train_step._loss(config, lora.joined(trained, frozen), on_device, z_loss=0.0, vocab_chunks=0)[0]


def test_gradients_are_those_of_the_dense_kernels_through_the_chain_rule():
    params = params_of(TINY)
    trained, frozen = lora.split(TINY, params)
    found = jax.jit(jax.grad(functools.partial(summed_loss, TINY)))(trained, frozen)["layers"]["lora"]
    dense_config, dense = lora.merged(TINY, params)
    kernels = jax.jit(jax.grad(functools.partial(summed_loss, dense_config)))(dense, {})["layers"]
    of_kernel = kernels["attention"] | kernels["mlp"]
    for name in PROJECTIONS:
        a, b = (trained["layers"]["lora"][f"{name}_{side}"] for side in "ab")
        flat_a, flat_b = a.reshape(2, -1, 3), b.reshape(2, 3, -1)
        grad = np.asarray(of_kernel[name]).reshape(2, flat_a.shape[1], flat_b.shape[2]) * (7.0 / 3)
        for wanted, got in (
            (grad @ flat_b.swapaxes(1, 2), found[f"{name}_a"].reshape(flat_a.shape)),
            (flat_a.swapaxes(1, 2) @ grad, found[f"{name}_b"].reshape(flat_b.shape)),
        ):
            np.testing.assert_allclose(got, wanted, rtol=2e-3, atol=1e-4 * np.abs(wanted).max())


def update(mesh_shape, *, grad_accum_steps=1, name="adamw"):
    """Two updates of adapters on a mesh; returns the parameters before and the state after, on the host."""
    axes = lora.split(TINY, decoder.logical_axes(TINY))[0]
    optimizer = make_optimizer(name=name, eps=1e-4, axes=axes)
    mesh = sharding.make_mesh(mesh_shape, jax.devices()[: math.prod(mesh_shape.values())])
    with jax.set_mesh(mesh):
        program = train_step.make_program(TINY, optimizer, mesh, batch_size=8, grad_accum_steps=grad_accum_steps)
        before = jax.device_get(program.init_params(jax.random.key(0)))
        state = program.start(
            jax.device_put(before, jax.tree.map(lambda leaf: leaf.sharding, program.abstract_state.params))
        )
        for _ in range(2):
            controls = train_step.Controls(np.float32(1e-2))
            state, _ = program.step(state, jax.device_put(batch(), program.batch_sharding), controls)
    for leaf, target in zip(jax.tree.leaves(state), jax.tree.leaves(program.abstract_state), strict=True):
        assert leaf.sharding == target.sharding and leaf.shape == target.shape
    return before, jax.device_get(state)


@pytest.fixture(scope="module")
def whole():
    return update({"data": 1})


@pytest.mark.parametrize(
    ("mesh_shape", "grad_accum_steps"),
    [pytest.param({"data": 2, "fsdp": 2}, 2, marks=pytest.mark.slow), ({"fsdp": 2, "tensor": 2}, 2)],
    ids=str,
)
def test_sharded_and_accumulated_is_single_device(whole, mesh_shape, grad_accum_steps):
    parted = update(mesh_shape, grad_accum_steps=grad_accum_steps)
    for x, y in zip(jax.tree.leaves(whole), jax.tree.leaves(parted), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_only_adapters_move_and_have_optimizer_state(whole, name):
    before, state = whole if name == "adamw" else update({"data": 1}, name=name)
    (moved, frozen), (moved_before, frozen_before) = lora.split(TINY, state.params), lora.split(TINY, before)
    jax.tree.map(np.testing.assert_array_equal, frozen, frozen_before)
    assert all((x != y).any() for x, y in zip(jax.tree.leaves(moved), jax.tree.leaves(moved_before), strict=True))
    shapes = {leaf.shape for leaf in jax.tree.leaves(moved)}
    assert {leaf.shape for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim > 1} <= shapes


def test_the_plan_counts_adapters():
    base = dataclasses.replace(TINY, lora=None)
    trained, _ = lora.split(TINY, decoder.abstract_params(TINY))
    count = sum(leaf.size for leaf in jax.tree.leaves(trained))
    assert TINY.num_trained_params == count == TINY.num_params - base.num_params
    embeddings_and_kernels = base.flops_per_token(16) - 12 * 2 * 8 * 16 * 2
    assert TINY.flops_per_token(16) == base.flops_per_token(16) - embeddings_and_kernels // 3 + 6 * count
    memory, whole = (plan.memory_estimate(config, {}, 8, 1, 16) for config in (TINY, base))
    assert memory.gradients == 4 * count and memory.optimizer == 8 * count + 4
    assert memory.params == whole.params + 4 * count and memory.total < whole.total


@pytest.fixture(scope="module")
def base_run(inputs, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("base")
    train(tiny_runs.tiny_config(inputs), str(workdir))
    return workdir


def adapt(inputs, base_run, workdir, **overrides):
    settings = LORA | {"init_checkpoint": str(base_run)} | overrides
    train(tiny_runs.tiny_config(inputs, **settings), str(workdir))
    return workdir


@pytest.fixture(scope="module")
def adapted(inputs, base_run, tmp_path_factory):
    return adapt(inputs, base_run, tmp_path_factory.mktemp("adapted"), **{"export.at_steps": (6,)})


def test_a_run_keeps_its_base_and_resumes_bit_for_bit(inputs, base_run, adapted, tmp_path, capsys):
    config, params, _ = checkpoint.load(str(adapted))
    assert config.lora == Lora(4, 8.0, PROJECTIONS)
    jax.tree.map(np.testing.assert_array_equal, lora.split(config, params)[1], checkpoint.load(str(base_run))[1])
    stopped = adapt(inputs, base_run, tmp_path / "stopped", total_steps=3)
    adapt(inputs, base_run, stopped)
    tiny_runs.assert_same_checkpoint(stopped, adapted, 6)
    assert f"of which {config.num_trained_params:,} of adapters are trained" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"is of another run: lora.rank is 4 there, 2 here"):
        adapt(inputs, base_run, stopped, **{"lora.rank": 2})
    with pytest.raises(ValueError, match=r"is of another run: lora.rank is 4 there, 0 here"):
        adapt(inputs, base_run, stopped, **{"lora.rank": 0})


def test_a_base_in_bfloat16_has_adapters_in_float32(inputs, base_run, tmp_path):
    run, small = tmp_path / "run", {"optimizer.peak_lr": 1e-6, "optimizer.weight_decay": 0.0, "total_steps": 3}
    adapt(inputs, base_run, run, **small, **{"model.param_dtype": "bfloat16"})
    config, params, _ = checkpoint.load(str(run))
    trained, frozen = lora.split(config, params)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(trained)} == {"float32"}
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), checkpoint.load(str(base_run))[1])
    jax.tree.map(np.testing.assert_array_equal, frozen, rounded)
    moments = jax.tree.leaves(checkpoint.Checkpoints(str(run), read_only=True)._manager.item_metadata(3).optimizer)
    assert all(leaf.dtype != jnp.bfloat16 for leaf in moments)
    first = np.asarray(trained["layers"]["lora"]["query_b"])  # which began as zeros
    assert (np.abs(first) > 0).all() and np.abs(first).max() < 1e-5
    convert.convert(str(run), str(tmp_path / "ours"), to="safelm")
    config, converted, _ = checkpoint.load_for_inference(str(tmp_path / "ours"))
    assert config.param_dtype == "float32" and {leaf.dtype.name for leaf in jax.tree.leaves(converted)} == {"float32"}
    convert.convert(str(run), str(tmp_path / "peft"), to="peft")
    base = tmp_path / "base"
    convert.convert(str(base_run), str(base), to="safelm")
    convert.convert(str(base), str(tmp_path / "merged"), to="safelm", adapter=str(tmp_path / "peft"))


def test_settings_that_cannot_be_are_named(inputs, base_run, tmp_path):
    for settings, line in (
        ({"init_checkpoint": ""}, "lora.rank is 4: adapters need the model of an init_checkpoint"),
        ({"lora.rank": -1}, "lora.rank is -1"),
        ({"lora.targets": ("query", "gates")}, "lora.targets names 'gates'"),
        ({"lora.alpha": 0.0}, "lora.alpha is 0.0"),
    ):
        with pytest.raises(ValueError, match=line):
            adapt(inputs, base_run, tmp_path / "run", **settings)


def test_the_next_stage_begins_with_the_merged_model(inputs, adapted, tmp_path):
    _, merged, _ = checkpoint.load_for_inference(str(adapted))
    still = {"optimizer.peak_lr": 0.0, "init_checkpoint": str(adapted), "total_steps": 1, "lora.rank": 2}
    train(tiny_runs.tiny_config(inputs, **still), str(tmp_path / "again"))
    found = checkpoint.load_for_inference(str(tmp_path / "again"))[1]
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7), found, merged)
    config, exported = huggingface.read_folder(adapted / "exports" / "6")
    np.testing.assert_allclose(exported["layers"]["mlp"]["up"], merged["layers"]["mlp"]["up"], rtol=1e-2)
    assert config.lora is None


def test_peft_folder_in_the_words_of_torch(adapted, base_run, tmp_path):
    """Base and adapter as written are, in `transformers` with PEFT's arithmetic by hand, the merged model."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    convert.convert(str(adapted), str(tmp_path / "peft"), to="peft")
    convert.convert(str(base_run), str(tmp_path / "base"))
    fields = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert fields["peft_type"] == "LORA" and fields["r"] == 4 and fields["lora_alpha"] == 8.0
    assert fields["target_modules"] == "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
    tensors = safetensors.numpy.load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 7 * 2
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    modules = dict(theirs.named_modules())
    with torch.no_grad():
        for name in (name for name in tensors if name.endswith(".lora_A.weight")):
            a, b = (torch.tensor(tensors[name.replace("lora_A", f"lora_{side}")]) for side in "AB")
            module = modules[name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")]
            module.weight += fields["lora_alpha"] / fields["r"] * (b @ a)
        logits = theirs(torch.tensor(TOKENS.astype(np.int64))).logits.numpy()
    config, merged, _ = checkpoint.load_for_inference(str(adapted))
    ours = apply(config, merged, TOKENS)[..., : config.vocab_size]
    np.testing.assert_allclose(ours, logits, rtol=1e-3, atol=1e-3)


def test_a_peft_folder_comes_back_and_fits_no_other_model(inputs, adapted, base_run, tmp_path):
    config, merged, _ = checkpoint.load_for_inference(str(adapted))
    convert.convert(str(adapted), str(tmp_path / "peft"), to="peft")
    convert.convert(str(base_run), str(tmp_path / "exported"), dtype="bfloat16")
    for number, (source, adapter) in enumerate(
        [(base_run, tmp_path / "peft"), (base_run, adapted), (tmp_path / "exported", tmp_path / "peft")]
    ):
        target = tmp_path / f"merged{number}"
        convert.convert(str(source), str(target), to="safelm", adapter=str(adapter))
        found = checkpoint.load_for_inference(str(target))[1]
        close = {"rtol": 1e-6, "atol": 1e-7} if source == base_run else {"rtol": 1e-2, "atol": 1e-3}
        jax.tree.map(functools.partial(np.testing.assert_allclose, **close), found, merged)
    with pytest.raises(ValueError, match=r"--adapter=.* another model: it was trained beside other values of layers"):
        convert.convert(str(adapted), str(tmp_path / "no"), to="safelm", adapter=str(tmp_path / "peft"))
    # Base and adapters never saw the tag (the tiny stores have none); what says nothing leaves it open.
    assert sources.saw_tag(str(adapted)) is peft.saw_tag(str(adapted)) is peft.saw_tag(str(tmp_path / "peft")) is False
    assert sources.saw_tag(str(tmp_path / "exported")) is sources.saw_tag(str(tmp_path / "merged0")) is False
    unsaid = safetensors.numpy.load_file(tmp_path / "peft" / "adapter_model.safetensors")
    shutil.copytree(tmp_path / "peft", tmp_path / "unsaid")
    safetensors.numpy.save_file(unsaid, tmp_path / "unsaid" / "adapter_model.safetensors")
    convert.convert(str(base_run), str(tmp_path / "open"), to="safelm", adapter=str(tmp_path / "unsaid"))
    assert peft.saw_tag(str(tmp_path / "unsaid")) is sources.saw_tag(str(tmp_path / "open")) is None
    with pytest.raises(ValueError, match=r"has no adapters for --to=peft"):
        convert.convert(str(base_run), str(tmp_path / "no"), to="peft")
    with pytest.raises(ValueError, match=r"its checkpoint has no adapters"):
        convert.convert(str(base_run), str(tmp_path / "no"), to="safelm", adapter=str(base_run))
    assert not (tmp_path / "no").exists() and config.lora is None


def test_peft_folders_of_other_kinds_are_refused(adapted, tmp_path):
    config, params, _ = checkpoint.load(str(adapted))
    base = lora.split(config, params)[1]
    plain = dataclasses.replace(config, lora=None)
    read = functools.partial(peft.read_folder, tmp_path, plain, base, where="BASE")
    peft.write_folder(tmp_path, config, params, base="hf:org/name@abc")
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (fields["base_model_name_or_path"], fields["revision"]) == ("org/name", "abc")
    found = read()[1]
    jax.tree.map(np.testing.assert_array_equal, found, params)

    def rewrite(**changed):
        (tmp_path / "adapter_config.json").write_text(json.dumps(fields | changed))

    for changed, line in (
        ({"peft_type": "IA3"}, "peft_type = 'IA3'"),
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        *(({"init_lora_weights": name}, rf"init_lora_weights = '{name}'") for name in CHANGE_THEIR_BASE),
        ({"use_qalora": True}, "use_qalora = True"),
        ({"alora_invocation_tokens": [5, 6]}, r"alora_invocation_tokens = \[5, 6\]"),
        ({"use_something_new": {"a": 1}}, r"use_something_new = \{'a': 1\} is not supported"),
        ({"r": 5}, r"another model: tensor .*q_proj.lora_A.weight has shape \(4, 16\), BASE asks for \(5, 16\)"),
    ):
        rewrite(**changed)
        with pytest.raises(ValueError, match=line):
            read()
    # What the library writes for plain adapters, keys of other versions without effect among it.
    for init in (True, False, "gaussian", "eva", None):
        rewrite(init_lora_weights=init, lora_dropout=0.1, qalora_group_size=16, loftq_config={}, use_something_new=None)
        jax.tree.map(np.testing.assert_array_equal, read()[1], params)
    rewrite(use_rslora=True)
    assert read()[0].lora.scale == pytest.approx(8.0 / math.sqrt(4))
    rewrite()
    tensors = safetensors.numpy.load_file(tmp_path / "adapter_model.safetensors")
    for name in [name for name in tensors if ".layers.1." in name]:
        tensors[name.replace(".layers.1.", ".layers.2.")] = tensors.pop(name)
    safetensors.numpy.save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"layers.1.self_attn.q_proj.lora_A.weight, which BASE needs, is missing"):
        read()


def test_jax_and_numpy_parameters_merge_alike():
    params = params_of(TINY)
    ours = lora.merged(TINY, params)[1]
    on_device = lora.merged(TINY, jax.tree.map(jnp.asarray, params))[1]
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), ours, on_device)
