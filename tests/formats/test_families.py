"""Qwen3 and Llama 3.1 on random weights: what `transformers` computes is computed here, and folders go both ways."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import safetensors.numpy
import tiny_runs

from safelm import convert, inference
from safelm.checkpoints import checkpoint
from safelm.formats import decoder_tensors, families, huggingface
from safelm.inference import forward, placement, weights
from safelm.models import decoder as model
from safelm.models import sharding
from safelm.models.config import ModelConfig, RopeScaling
from safelm.train.run import train

VOCAB_SIZE = tiny_runs.tokenizer().vocab_size
# config.json as published, but for sizes: of the original context 8192 in 131,072 here 32 in 512.
PUBLISHED = {
    "qwen3": {  # Qwen3-0.6B
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "head_dim": 12,
        "hidden_act": "silu",
        "hidden_size": 16,
        "initializer_range": 0.02,
        "intermediate_size": 32,
        "max_position_embeddings": 512,
        "max_window_layers": 2,
        "model_type": "qwen3",
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": VOCAB_SIZE,
    },
    "llama": {  # Llama-3.1-8B
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "hidden_act": "silu",
        "hidden_size": 32,
        "initializer_range": 0.02,
        "intermediate_size": 48,
        "max_position_embeddings": 512,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "rope_scaling": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
            "rope_type": "llama3",
        },
        "use_cache": True,
        "vocab_size": VOCAB_SIZE,
    },
}
LENGTH = 80  # behind the original context
OPTIONS = ("qk_norm", "rope_scaling")


def write_config(folder, values):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def ours_of(folder, tmp_path, **changes):
    """A tiny model of ours and its export."""
    config = ModelConfig(**tiny_runs.model_fields(**changes))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.2, leaf.shape).astype("f"), model.abstract_params(config))
    huggingface.write_folder(tmp_path / folder, config, params, tiny_runs.tokenizer())
    return config, tmp_path / folder


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("qwen3", {"attention_bias": True}, "config.json: attention_bias = True is not supported"),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 64}, "use_sliding_window = True"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types = .*sliding_attention"),
        ("qwen3", {"layer_types": "full_attention"}, "layer_types = full_attention is not supported"),
        ("qwen3", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling: rope_type = 'yarn'"),
        ("qwen3", {"model_type": "qwen3_moe"}, "model_type = 'qwen3_moe' .*'llama' or 'qwen3'"),
        ("qwen3", {"model_type": ["qwen3"]}, r"model_type = \['qwen3'\] is not supported"),
        ("llama", {"sliding_window": 64}, "sliding_window = 64"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ("llama", {"rope_scaling": "llama3"}, "rope_scaling = 'llama3': want an object"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling: type = 'dynamic'"),
        ("llama", {"rope_scaling": {"rope_type": "default", "factor": 2.0}}, "rope_scaling: factor = 2.0 is not"),
        ("llama", {"original_max_position_embeddings": 8}, "original_max_position_embeddings = 8 is not supported"),
    ],
)
def test_what_a_family_of_ours_lacks_is_refused_by_name(tmp_path, name, changes, message):
    write_config(tmp_path, PUBLISHED[name] | changes)
    with pytest.raises(ValueError, match=message):
        huggingface.read_config(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"low_freq_factor": None}, "rope_scaling: low_freq_factor is missing"),
        ({"low_freq_factor": 5.0}, r"config.json: model.rope_scaling=.*low_freq_factor': 5.0.*0 < low < high"),
        ({"factor": 0.5}, r"model.rope_scaling=.*factor and context >= 1"),
        ({"factor": float("nan")}, "rope_scaling: factor = nan: want a finite number above 0"),
        ({"original_max_position_embeddings": "x"}, "rope_scaling: original_max_position_embeddings = 'x'"),
        ({"partial_rotary_factor": 0.5}, "rope_scaling: partial_rotary_factor = 0.5"),
        ({"beta_fast": 32}, "rope_scaling: beta_fast = 32 is not supported"),
    ],
)
def test_every_value_of_a_rope_scaling_is_checked(tmp_path, changes, message):
    scaling = PUBLISHED["llama"]["rope_scaling"] | changes
    write_config(tmp_path, PUBLISHED["llama"] | {"rope_scaling": scaling})
    with pytest.raises(ValueError, match=message):
        huggingface.read_config(tmp_path)


def test_absent_keys_mean_what_they_mean_in_the_family(tmp_path):
    def read(name, *absent, **changes):
        values = {key: value for key, value in PUBLISHED[name].items() if key not in absent} | changes
        return huggingface.read_config(write_config(tmp_path, values))

    assert read("qwen3", "head_dim").head_dim == 128 and read("qwen3", "max_position_embeddings").max_seq_len == 32_768
    assert read("llama").head_dim == 8
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    newer = {"rope_parameters": scaling | {"rope_theta": 700.0}}
    config = read("llama", "rope_scaling", "rope_theta", **newer)
    assert config.rope_theta == 700.0 and config.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 512)
    assert read("qwen3", use_sliding_window=False, sliding_window=4096) == read("qwen3")


def test_every_option_is_kept_by_an_export_and_by_a_checkpoint(tmp_path):
    scaling = RopeScaling(8.0, 1.0, 4.0, 16)
    config, folder = ours_of("hf", tmp_path, qk_norm=True, rope_scaling=scaling)
    again = huggingface.read_config(folder)
    assert [getattr(again, name) for name in OPTIONS] == [True, scaling]
    convert.convert(str(folder), str(tmp_path / "ours"), dtype="float32")
    kept, params, _ = checkpoint.load_for_inference(str(tmp_path / "ours"))
    assert kept == again and jax.tree.structure(params) == jax.tree.structure(model.abstract_params(config))
    _, _, meta = checkpoint.open_checkpoint(str(tmp_path / "ours"))
    checkpoint.check_model(meta, again, where="here")
    for name, other in {"qk_norm": False, "rope_scaling": RopeScaling(2.0, 1.0, 4.0, 16)}.items():
        with pytest.raises(ValueError, match=f"here is of another model: {name} is"):
            checkpoint.check_model(meta, dataclasses.replace(again, **{name: other}), where="here")


def test_a_tensor_of_another_family_has_no_place(tmp_path):
    _, folder = ours_of("hf", tmp_path, qk_norm=True)
    values = json.loads((folder / "config.json").read_text()) | {"model_type": "llama"}
    write_config(folder, values)
    name = "model.layers.0.self_attn.k_norm.weight"
    with pytest.raises(ValueError, match=f"tensor {name} has no place in the llama family"):
        huggingface.read_folder(folder)


def test_a_family_holds_every_parameter_of_a_block():
    for qk_norm in (False, True):
        config = ModelConfig(**tiny_runs.model_fields(qk_norm=qk_norm))
        shapes = jax.tree.map(lambda leaf: leaf.shape[1:], model.abstract_params(config)["layers"])
        assert shapes == config.block_shapes
        assert families.family_of(config).holds(config)
        assert sum(family.holds(config) for family in families.FAMILIES.values()) == 1


@pytest.fixture(scope="module", params=PUBLISHED)
def theirs(request, tmp_path_factory):
    """A model of `transformers` with random weights, the norms' too, and its folder."""
    torch = parity.module("torch")
    transformers = parity.module("transformers")
    folder = write_config(tmp_path_factory.mktemp("theirs"), PUBLISHED[request.param])
    torch.manual_seed(0)
    reference = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder))
    assert type(reference).__name__ == PUBLISHED[request.param]["architectures"][0]
    for name, parameter in reference.named_parameters():
        torch.nn.init.uniform_(parameter, *((0.5, 1.5) if "norm" in name else (-0.4, 0.4)))
    reference.save_pretrained(folder)
    tiny_runs.tokenizer().save(str(folder))
    return reference.eval(), folder


@pytest.fixture(scope="module")
def ours(theirs):
    return huggingface.read_folder(theirs[1])


def tokens(rows=2, length=LENGTH):
    return np.random.default_rng(0).integers(0, VOCAB_SIZE, (rows, length)).astype(np.int32)


def their_logits(reference, tokens_BT):
    import torch

    with torch.no_grad():
        return reference(torch.tensor(tokens_BT, dtype=torch.long)).logits.numpy()


@pytest.mark.parity
def test_logits_are_those_of_transformers(theirs, ours):
    config, params = ours
    assert config.qk_norm == (config.head_dim == 12) and bool(config.rope_scaling) == (not config.qk_norm)
    apply = jax.jit(model.apply, static_argnums=0)
    expected = their_logits(theirs[0], tokens())
    np.testing.assert_allclose(apply(config, params, tokens())[..., :VOCAB_SIZE], expected, rtol=0, atol=1e-4)
    without = dataclasses.replace(config, qk_norm=False, rope_scaling=None)
    assert np.abs(apply(without, params, tokens())[..., :VOCAB_SIZE] - expected).max() > 0.01


@pytest.mark.parity
def test_an_export_has_the_same_tensors_and_is_read_by_both_versions_of_transformers(theirs, ours, tmp_path):
    import transformers

    config, params = ours
    huggingface.write_folder(tmp_path, config, params, tiny_runs.tokenizer())
    before, after = (safetensors.numpy.load_file(path / "model.safetensors") for path in (theirs[1], tmp_path))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and tensor.tobytes() == after[name].tobytes(), name
    assert huggingface.read_config(tmp_path) == config
    expected = their_logits(theirs[0], tokens())
    values = json.loads((tmp_path / "config.json").read_text())
    for newer in ("rope_parameters", "dtype"), ("rope_scaling", "rope_theta", "torch_dtype"):
        write_config(tmp_path, {key: value for key, value in values.items() if key not in newer})
        loaded, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        assert type(loaded) is type(theirs[0])
        assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
        np.testing.assert_array_equal(their_logits(loaded, tokens()), expected)
        assert huggingface.read_config(tmp_path) == config


@pytest.mark.parity
def test_greedy_tokens_are_those_of_transformers(theirs, ours):
    import torch

    config, params = ours
    prompts = tokens(rows=2, length=40)
    theirs[0].generation_config.eos_token_id = None
    with torch.no_grad():
        expected = (
            theirs[0]
            .generate(
                torch.tensor(prompts, dtype=torch.long),
                attention_mask=torch.ones(2, 40, dtype=torch.long),
                max_new_tokens=12,
                do_sample=False,
                pad_token_id=0,
            )[:, 40:]
            .tolist()
        )
    unused = min(set(range(VOCAB_SIZE)) - {token for row in expected for token in row})  # ends no text
    found = inference.generate(
        config, params, prompts.tolist(), inference.Greedy(), max_new_tokens=12, end_ids=[unused], harm_tag_id=None
    )
    assert [list(generation.tokens) for generation in found] == expected


@pytest.mark.parity
def test_a_mesh_computes_the_logits_and_gradients_of_transformers(theirs, ours):
    import torch

    config, params = ours
    reference, tokens_BT = theirs[0], tokens()
    labels = torch.tensor(tokens_BT, dtype=torch.long)
    reference.zero_grad()
    out = reference(labels, labels=labels)
    out.loss.backward()
    expected = {name: parameter.grad.numpy() for name, parameter in reference.named_parameters()}

    def mean_loss(params, tokens_BT):
        log_probs_BTV = jax.nn.log_softmax(model.apply(config, params, tokens_BT)[:, :-1])
        return -jnp.take_along_axis(log_probs_BTV, tokens_BT[:, 1:, None], axis=-1).mean()

    mesh = sharding.make_mesh({"data": 1, "fsdp": 2, "tensor": 2}, jax.devices()[:4])
    places = sharding.param_shardings(mesh, model.logical_axes(config), model.abstract_params(config))
    prepared = weights.prepare(config, params)
    with jax.set_mesh(mesh):
        value, gradients = jax.jit(jax.value_and_grad(mean_loss))(jax.device_put(params, places), tokens_BT)
        read_all = jax.jit(forward.read_all, static_argnums=0)
        logits_BTV = read_all(config, placement.place(config, prepared, mesh), tokens_BT)
    np.testing.assert_allclose(logits_BTV[..., :VOCAB_SIZE], out.logits.detach().numpy(), rtol=0, atol=1e-4)
    np.testing.assert_allclose(value, out.loss.item(), atol=1e-4)
    for name, gradient in decoder_tensors.tensors_from_params(config, gradients).items():
        np.testing.assert_allclose(gradient, expected[name], rtol=0, atol=1e-4, err_msg=name)


def test_a_run_takes_the_options_over_and_its_checkpoint_keeps_them(tmp_path):
    ours, folder = ours_of("hf", tmp_path, qk_norm=True, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 16))
    convert.convert(str(folder), str(tmp_path / "imported"))
    inputs = tiny_runs.write_inputs(tmp_path / "inputs")
    run = tiny_runs.tiny_config(inputs, init_checkpoint=str(tmp_path / "imported"), total_steps=1)
    train(run, str(tmp_path / "run"))
    config, params, _ = checkpoint.load_for_inference(str(tmp_path / "run"))
    assert [getattr(config, name) for name in OPTIONS] == [getattr(ours, name) for name in OPTIONS]
    before = huggingface.read_folder(folder)[1]["layers"]["key_norm"]["scale"]
    assert 0 < np.abs(params["layers"]["key_norm"]["scale"] - before).max() < 0.1
