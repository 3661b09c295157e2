"""The plan of a run: what is kept for the backward pass, memory by device, times, and dry runs without the devices."""

import dataclasses
import importlib
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import tiny_runs

from safelm.models import decoder as model
from safelm.models import lora
from safelm.models import remat as remat_lib
from safelm.models.config import PROJECTIONS, Lora, ModelConfig
from safelm.train import plan as train_plan
from safelm.train.run import train

ROOT = Path(__file__).parents[2]
ODD = ModelConfig(
    vocab_size=384, num_layers=7, d_model=48, d_ff=80, num_heads=6, num_kv_heads=3, head_dim=64, dtype="bfloat16"
)
SMOLLM2 = ModelConfig(
    vocab_size=49_153,
    num_layers=24,
    d_model=2048,
    d_ff=8192,
    num_heads=32,
    num_kv_heads=32,
    head_dim=64,
    attention="splash",
    remat="full",
)
POD = {"data": 1, "fsdp": 16, "tensor": 1}


def kept_by_jax(config, rows, length):
    """Bytes by layer of what the forward pass hands to the backward pass, without parameters, from JAX itself."""
    tokens_BT = jax.ShapeDtypeStruct((rows, length), jnp.int32)

    def forward(params, tokens_BT):
        trained, frozen = lora.split(config, params)

        def states(trained):
            return model.hidden_states(config, lora.joined(trained, frozen), tokens_BT, segment_ids_BT=tokens_BT)

        return jax.vjp(states, trained)[1]

    saved = jax.tree.leaves(jax.eval_shape(forward, model.abstract_params(config), tokens_BT))
    stacked = [leaf for leaf in saved if leaf.shape[:2] == (config.num_layers, rows)]
    return sum(math.prod(leaf.shape[1:]) * leaf.dtype.itemsize for leaf in stacked)


@pytest.mark.parametrize("remat", ["full", "dots", "none"])
@pytest.mark.parametrize(
    "options",
    [
        {"attention": "xla"},
        {"attention": "splash"},
        {"attention": "splash", "qk_norm": True},
        {"attention": "splash", "qk_norm": True, "qk_norm_width": True, "norms": "after", "qkv_bias": True},
        {"attention": "xla", "norms": "around", "norm_offset": True, "activation": "gelu", "scale_embeddings": True}
        | {"windows": (8, 0, 8, 8, 8, 8, 0), "rope_thetas": (10.0, 0.0, 10.0, 10.0, 10.0, 10.0, 0.0)},
    ],
    ids=lambda options: " ".join(options),
)
def test_what_is_kept_is_what_jax_keeps(remat, options):
    config, rows = dataclasses.replace(ODD, remat=remat, **options), 2
    length = 256 if config.attention == "xla" else 128  # cut into blocks of queries
    assert config.kept_bytes_per_token(length) * rows * length == kept_by_jax(config, rows, length)


@pytest.mark.parametrize("attention", ["xla", "splash"])
@pytest.mark.parametrize("norms", ["before", "around"])
def test_what_is_kept_by_name_is_what_jax_keeps(attention, norms):
    rows, length = 2, 128
    sets = ("", "attention", "query,key,value", "output,gate,down", ",".join(remat_lib.NAMES))
    kept = [dataclasses.replace(ODD, remat=f"keep:{names}", attention=attention, norms=norms) for names in sets]
    for config in kept:
        assert config.kept_bytes_per_token(length) * rows * length == kept_by_jax(config, rows, length), config.remat
    offloads, without = (dataclasses.replace(ODD, remat=form) for form in ("keep:query;offload:gate,up", "keep:query"))
    assert offloads.kept_bytes_per_token(length) == without.kept_bytes_per_token(length)


@pytest.mark.parametrize("targets", [PROJECTIONS, ("value", "down")], ids=["all", "two"])
@pytest.mark.parametrize("options", [{"attention": "xla"}, {"attention": "splash", "norms": "around"}], ids=str)
def test_what_is_kept_with_adapters(options, targets):
    rows, length = 2, 128
    for remat in ("full", "dots", "none"):
        config = dataclasses.replace(ODD, remat=remat, lora=Lora(5, 8.0, targets), **options)
        planned, kept = config.kept_bytes_per_token(length) * rows * length, kept_by_jax(config, rows, length)
        assert 0.75 * planned < kept <= planned if remat == "none" else kept == planned, remat


def test_parameters_and_optimizer_are_counted_on_one_device():
    memory = train_plan.memory_estimate(SMOLLM2, POD, 1024, 64, 2048)
    padded = SMOLLM2.num_params + (SMOLLM2.padded_vocab_size - SMOLLM2.vocab_size) * SMOLLM2.d_model
    norms = (2 * 24 + 1) * 2048  # of a scale, every device has its own copy
    assert memory.params == 4 * ((padded - norms) // 16 + norms)
    assert train_plan.memory_estimate(SMOLLM2, {}, 16, 1, 2048).params == SMOLLM2.param_bytes == 4 * padded
    assert memory.optimizer == 2 * memory.params + 4  # and the count of updates
    assert memory.gradients == 2 * memory.params
    assert train_plan.memory_estimate(SMOLLM2, POD, 16, 1, 2048).gradients == memory.params


def test_more_devices_smaller_batches_and_remat_need_less():
    def total(**changes):
        mesh, batch, accumulation, remat = (
            changes.get(name, default)
            for name, default in (("mesh", POD), ("batch", 1024), ("accumulation", 16), ("remat", "full"))
        )
        config = dataclasses.replace(SMOLLM2, remat=remat)
        return train_plan.memory_estimate(config, mesh, batch, accumulation, 2048).total

    assert total(remat="full") < total(remat="dots") < total(remat="none")
    assert total(accumulation=64) < total(accumulation=16) < total(accumulation=4)
    assert total(mesh={"fsdp": 64}) < total(mesh={"fsdp": 16}) < total(mesh={"data": 16})
    tensor = dict(tensor=4, fsdp=4)
    assert total(mesh=tensor, accumulation=64) > total(accumulation=64)  # four times the rows on a device


def test_a_mesh_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"batch_size=1024 / grad_accum_steps=128 .* mesh.data x mesh.fsdp = 16"):
        train_plan.memory_estimate(SMOLLM2, POD, 1024, 128, 2048)
    with pytest.raises(ValueError, match=r"mesh.tensor=3"):
        train_plan.memory_estimate(SMOLLM2, {"tensor": 3}, 1024, 1, 2048)


@pytest.mark.parametrize(
    ("shape", "absent"),
    [
        ({"data": -1, "fsdp": 256, "tensor": 1}, {"data": 1, "fsdp": 256, "tensor": 1}),
        ({"data": 2, "fsdp": 8}, {"data": 2, "fsdp": 8, "tensor": 1}),
        ({"data": -1, "fsdp": 4, "tensor": 2}, None),
        ({"data": 3, "fsdp": 1}, None),
        ({"data": 0, "fsdp": 16}, None),
    ],
)
def test_absent_meshes(shape, absent):
    mesh = train_plan.absent_mesh(shape, 8)
    assert (mesh and dict(mesh.shape)) == absent


def test_dry_run_for_a_pod_that_is_not_here(inputs, tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    config = importlib.import_module("configs.smollm2_1b7").get_config()
    with config.unlocked():
        config.tokenizer, config.data.root = str(inputs / "tokenizer"), str(inputs / "tokens")
        config.mesh.fsdp, config.grad_accum_steps = 256, 4
        config.log.update(peak_flops=197e12, assumed_mfu=0.5)
    train(config, str(tmp_path / "run"), dry_run=True)
    out, tokens = capsys.readouterr().out, 5_245_209 * 1024 * 2048
    assert f"parameters: 1,711,378,432\ntokens:     {tokens:,} (1024 x 2048 a step)\nsteps:      5,245,209\n" in out
    assert "devices:    256 planned for, not here (data 1 x fsdp 256 x tensor 1)\nattention:  splash (assumed" in out
    assert re.search(r"memory:     about [\d.]+ GiB a device \(params [\d.]+ MiB, ", out)
    flops = tokens * SMOLLM2.flops_per_token(2048)
    assert f", {int(flops / (256 * 197e12 * 0.5) / 86400)} d " in out and "at 50% MFU of 256 x 197 TFLOP/s" in out
    assert re.search(r"source:     safeweb: 2,200,000,10\d,\d+ tokens \(20.000% planned, [+-]\d+\)", out)
    assert not (tmp_path / "run").exists()


def test_dry_run_without_tokenizer_data_and_workdir(capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    config = importlib.import_module("configs.smollm2_1b7").get_config()
    with config.unlocked():
        config.tokenizer, config.data.root = "/no/such/tokenizer", "/no/such/tokens"
        config.mesh.fsdp, config.log.peak_flops = 256, 197e12
    train(config, "", dry_run=True)
    out = capsys.readouterr().out
    assert "parameters: 1,711,378,432\n" in out and "GiB a device" in out and "at 40% MFU of 256 x 197 TFLOP/s" in out
    assert re.search(r"source:     safeweb: 2,200,000,10\d,\d+ tokens planned\n", out)
    assert "not there:  tokenizer /no/such/tokenizer" in out and "not there:  data.root /no/such/tokens" in out
    assert "optimizer.peak_lr=0.0005" in out


def test_dry_run_still_checks_what_can_be_checked(inputs, tmp_path):
    overrides = {"mesh.fsdp": 16, "mesh.data": 1}
    with pytest.raises(ValueError, match=r"batch_size=24 .* is not a multiple of mesh.data x mesh.fsdp = 16"):
        train(tiny_runs.tiny_config(inputs, batch_size=24, **overrides), str(tmp_path), dry_run=True)
    config = tiny_runs.tiny_config(inputs, batch_size=16, **overrides)
    with config.unlocked():
        config.data.phases = ({"start": 0.0, "rates": {"unheard_web": 1.0}},)
    with pytest.raises(FileNotFoundError, match="lacks source unheard_web"):
        train(config, str(tmp_path), dry_run=True)
    with pytest.raises(ValueError, match=r"mesh.data=3"):
        train(tiny_runs.tiny_config(inputs, **{"mesh.data": 3}), str(tmp_path), dry_run=True)
