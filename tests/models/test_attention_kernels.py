"""The fused attention kernels against the plain one, which kernel is chosen for which devices, and TPU programs."""

import dataclasses
import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs
from jax.sharding import Mesh

from safelm.models import attention, attention_kernels, sharding
from safelm.models import decoder as model
from safelm.models.causal_attention import attend_causally
from safelm.models.config import query_blocks
from safelm.models.decoder import ModelConfig
from safelm.train import run as train

LENGTH = 256  # two blocks of 128
CONFIG = ModelConfig(vocab_size=64, num_layers=2, d_model=12, d_ff=16, num_heads=6, num_kv_heads=2, head_dim=8)


def segments(rows: int) -> jax.Array:
    """Documents of 50, 1, 150 and 20 tokens and 35 of padding: one ends inside a block, one reaches over both."""
    return jnp.asarray(np.repeat([[1, 2, 3, 4, 0]] * rows, [50, 1, 150, 20, 35], axis=1), jnp.int32)


def inputs(rows: int, heads: int, kv_heads: int, head_dim: int) -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(0)
    shapes = [(rows, LENGTH, count, head_dim) for count in (heads, kv_heads, kv_heads, heads)]
    return tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)


def outputs_and_gradients(attend, q, k, v, weights):
    """Output, and the gradients by q, k and v of the output weighted with arbitrary numbers."""

    def weighted(q, k, v):
        out = attend(q, k, v)
        return (out * weights).sum(), out

    (_, out), gradients = jax.jit(jax.value_and_grad(weighted, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    return out, *gradients


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(attention_kernels, "MAX_BLOCK", 128)


@pytest.mark.parametrize(
    "segment_ids", [segments(1), pytest.param(None, marks=pytest.mark.slow)], ids=["packed", "one document"]
)
def test_splash_is_the_plain_attention(small_blocks, segment_ids):
    arrays = inputs(1, heads=9, kv_heads=3, head_dim=64)
    given = attention_kernels.what_is_visible("splash", LENGTH, segment_ids)
    splash = outputs_and_gradients(lambda *qkv: attention_kernels.splash(*qkv, given, interpret=True), *arrays)
    mask = attention.causal_mask(LENGTH, segment_ids)
    plain = outputs_and_gradients(lambda *qkv: attention.attend(*qkv, mask), *arrays)
    for ours, theirs in zip(splash, plain, strict=True):
        assert np.isfinite(ours).all()  # rows of padding too
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


@pytest.mark.parametrize(
    "dtype, tolerance", [("float32", 2e-5), pytest.param("bfloat16", 3e-2, marks=pytest.mark.slow)]
)
def test_blocks_of_queries_with_a_backward_by_hand_are_the_plain_attention(dtype, tolerance):
    arrays = tuple(array.astype(dtype) for array in inputs(2, heads=6, kv_heads=2, head_dim=8))
    mask = attention.windowed(attention.causal_mask(LENGTH, segments(2)), 70)
    plain = outputs_and_gradients(lambda *qkv: attention.attend(*qkv, mask), *arrays)
    for blocks in (1, query_blocks(LENGTH)):
        ours = outputs_and_gradients(lambda *qkv, n=blocks: attend_causally(*qkv, mask, n), *arrays)
        for one, other in zip(ours, plain, strict=True):
            assert one.dtype == dtype
            np.testing.assert_allclose(np.float32(one), np.float32(other), atol=tolerance, rtol=tolerance)
    assert query_blocks(LENGTH) == 4 and query_blocks(LENGTH + 2) == 1


@pytest.fixture
def cudnn_by_xla(monkeypatch):
    """What cuDNN is asked for, computed by XLA: there is no GPU here. Gives the list of implementations asked for."""
    asked, real = [], jax.nn.dot_product_attention

    def on_xla(*args, implementation, **kwargs):
        asked.append(implementation)
        return real(*args, implementation="xla", **kwargs)

    monkeypatch.setattr(jax.nn, "dot_product_attention", on_xla)
    return asked


@pytest.mark.parametrize("kernel", ["splash", pytest.param("cudnn", marks=pytest.mark.slow)])
def test_over_a_mesh_every_device_has_its_rows_and_heads(small_blocks, cudnn_by_xla, monkeypatch, kernel):
    monkeypatch.setattr(attention_kernels, "splash", functools.partial(attention_kernels.splash, interpret=True))
    arrays = inputs(4, heads=4, kv_heads=2, head_dim=8)
    mask = attention.causal_mask(LENGTH, segments(4))
    plain = outputs_and_gradients(lambda *qkv: attention.attend(*qkv, mask), *arrays)
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    visible = attention_kernels.what_is_visible(kernel, LENGTH, segments(4))
    with jax.set_mesh(mesh):
        fused = outputs_and_gradients(lambda *qkv: attention_kernels.attend(kernel, *qkv, visible), *arrays)
    assert fused[0].addressable_shards[0].data.shape == (1, LENGTH, 2, 8)
    for ours, theirs in zip(fused, plain, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def loss_and_gradients(config: ModelConfig):
    """Of the parameters, on a row of 128 packed tokens."""
    tokens_BT = jnp.asarray(np.random.default_rng(0).integers(0, 64, (1, 128)), jnp.int32)

    def loss(params):
        x_BTD = model.hidden_states(config, params, tokens_BT, segment_ids_BT=segments(1)[:, :128])
        return jnp.square(x_BTD - 1.0).mean()

    return jax.value_and_grad(loss)


def test_the_model_with_splash_is_the_model_without(monkeypatch):
    calls, splash = [], attention_kernels.splash
    monkeypatch.setattr(attention_kernels, "splash", lambda *a: calls.append(a) or splash(*a, interpret=True))
    config = dataclasses.replace(CONFIG, num_layers=1, dtype="float32", init_std=0.3)
    params = jax.jit(functools.partial(model.init, config))(jax.random.key(0))
    ours, theirs = (
        jax.tree.leaves(jax.jit(loss_and_gradients(dataclasses.replace(config, attention=kernel)))(params))
        for kernel in ("splash", "xla")
    )
    assert calls
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("remat, kernels", [("none", 3), ("dots", 3), ("full", 4)])
def test_the_kernels_forward_runs_once_unless_all_is_recomputed(remat, kernels):
    config = dataclasses.replace(CONFIG, attention="splash", remat=remat)
    traced = jax.jit(loss_and_gradients(config)).trace(model.abstract_params(config))
    assert traced.lower(lowering_platforms=("tpu",)).as_text().count("@tpu_custom_call") == kernels


def test_logits_for_inference_need_no_kernel():
    config, tokens_BT = dataclasses.replace(CONFIG, attention="splash"), jnp.arange(5)[None]
    params = model.abstract_params(config)
    assert jax.eval_shape(functools.partial(model.apply, config), params, tokens_BT).shape == (1, 5, 128)
    with pytest.raises(ValueError):
        jax.eval_shape(functools.partial(model.hidden_states, config), params, tokens_BT)


def test_cudnn_is_asked_for_the_plain_attention(cudnn_by_xla):
    q, k, v, _ = inputs(2, heads=6, kv_heads=2, head_dim=8)
    visible = attention_kernels.what_is_visible("cudnn", LENGTH, segments(2))
    ours = attention_kernels.attend("cudnn", q, k, v, visible)
    plain = attention.attend(q, k, v, attention.causal_mask(LENGTH, segments(2)))
    np.testing.assert_allclose(ours, plain, atol=1e-5)
    assert cudnn_by_xla == ["cudnn"]


def mesh_of(platform: str) -> Mesh:
    """A mesh over one device of this platform that can do nothing."""
    device = mock.Mock(platform=platform, process_index=0)
    return Mesh(np.array(device, dtype=object).reshape(1, 1, 1), sharding.MESH_AXES)


@pytest.mark.parametrize(
    "platform, seq_len, fields, kernel, reason",
    [
        ("cpu", 256, {}, "xla", "auto: cpu devices have no fused kernel"),
        ("tpu", 256, {}, "splash", "auto: tpu devices"),
        ("tpu", 200, {}, "xla", "auto: not splash, it needs rows of a multiple of 128 tokens, seq_len is 200"),
        ("tpu", 256, {"windows": (4, 0)}, "xla", "auto: not splash, its mask is the same in all layers, model.windows"),
        ("tpu", 256, {"windows": (0, 0)}, "splash", "auto: tpu devices"),
        ("tpu", 256, {"dtype": "float16"}, "xla", "auto: not splash, it computes in bfloat16 or float32, model.dtype"),
        ("tpu", 256, {"attention": "xla"}, "xla", "model.attention is xla"),
        ("tpu", 256, {"attention": "splash"}, "splash", "model.attention is splash"),
        ("gpu", 256, {"dtype": "float32"}, "xla", "auto: not cudnn, it computes in bfloat16 or float16, model.dtype"),
    ],
)
def test_choice(platform, seq_len, fields, kernel, reason):
    choice = attention_kernels.choose(dataclasses.replace(CONFIG, **fields), seq_len, mesh_of(platform))
    assert choice.kernel == kernel and choice.reason.startswith(reason)


@pytest.mark.parametrize(
    "platform, seq_len, fields, reason",
    [
        ("cpu", 256, {"attention": "splash"}, "'splash' can't run: it needs TPU devices, these are cpu"),
        (
            "tpu",
            256,
            {"attention": "splash", "windows": (4, 0)},
            "'splash' can't run: its mask is the same in all layers",
        ),
        ("tpu", 130, {"attention": "splash"}, "'splash' can't run: .*seq_len is 130"),
        ("tpu", 256, {"attention": "cudnn"}, "'cudnn' can't run: it needs NVIDIA GPUs, these are tpu devices"),
        ("gpu", 256, {"attention": "cudnn", "dtype": "float32"}, "'cudnn' can't run: .*model.dtype is float32"),
    ],
)
def test_refusal(platform, seq_len, fields, reason):
    with pytest.raises(ValueError, match=f"model.attention={reason}"):
        attention_kernels.choose(dataclasses.replace(CONFIG, **fields), seq_len, mesh_of(platform))


def test_where_cudnn_itself_refuses_its_words_are_the_reason():
    refusal = attention_kernels._refused_by_cudnn(CONFIG, 128, jax.devices()[0])
    assert refusal == "cuDNN says: cuDNN is not detected."


def test_training_refuses_a_kernel_that_can_not_run(tmp_path):
    config = tiny_runs.tiny_config(tiny_runs.write_inputs(tmp_path))
    config.model.attention = "splash"
    with pytest.raises(ValueError, match=r"model.attention='splash' can't run: it needs TPU devices, these are cpu"):
        train.train(config, str(tmp_path / "run"), dry_run=True)


TPU_PROGRAM = """
import json, re
import jax, jax.numpy as jnp
from jax.experimental import topologies
from safelm.models import attention_kernels, sharding
mesh = sharding.make_mesh({"fsdp": 2, "tensor": 2}, topologies.get_topology_desc("v5e:2x2", "tpu").devices)
spec = lambda *names: jax.sharding.NamedSharding(mesh, sharding.partition_spec(names))
def array(heads, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct((4, 1024, heads, 64), dtype, sharding=spec("batch", None, "heads", None))
segment_ids = jax.ShapeDtypeStruct((4, 1024), jnp.int32, sharding=spec("batch", None))
def texts(kernel):
    def loss(q, k, v, segment_ids):
        visible = attention_kernels.what_is_visible(kernel, 1024, segment_ids)
        return attention_kernels.attend(kernel, q, k, v, visible).astype(jnp.float32).sum()
    with jax.set_mesh(mesh):
        step = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
        return step.lower(array(6), array(2), array(2), segment_ids).compile().as_text()
print(json.dumps({kernel: texts(kernel) for kernel in ("splash", "xla")}))
"""


@pytest.mark.slow  # by default test_aot.py compiles a whole step, which has the kernel, for a TPU
def test_tpu_program_has_the_kernel_and_no_square_of_scores():
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu (extra `tpu`) is not installed")
    environment = {
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }
    done = subprocess.run(
        [sys.executable, "-c", TPU_PROGRAM], capture_output=True, text=True, env=os.environ | environment, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    texts = json.loads(done.stdout.splitlines()[-1])
    kernels = {kernel: text.count('custom_call_target="tpu_custom_call"') for kernel, text in texts.items()}
    squares = {kernel: "1024,1024]" in text for kernel, text in texts.items()}
    assert kernels == {"splash": 3, "xla": 0}  # forward, and two backward: of queries, of keys and values
    assert squares == {"splash": False, "xla": True}
