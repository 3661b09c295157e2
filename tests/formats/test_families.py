"""Every family on random weights: what `transformers` computes is computed here, and folders go both ways."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import safetensors.numpy
import tiny_runs
from published_models import PUBLISHED, RELATED, VOCAB_SIZE

from safelm import inference
from safelm.checkpoints import checkpoint
from safelm.formats import decoder_tensors, families, huggingface
from safelm.formats.family import PLAIN
from safelm.inference import forward, placement, weights
from safelm.models import decoder as model
from safelm.models import sharding
from safelm.models.config import ModelConfig, RopeScaling
from safelm.train.run import train

LENGTH = 80  # behind the original context
SCALING = RopeScaling(8.0, 1.0, 4.0, 16)
# Options that a family's models have, on the tiny model of two layers.
OPTIONS_OF = {
    "llama": {"rope_scaling": SCALING},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True, "rope_scaling": SCALING},
    "olmo2": {"norms": "after", "qk_norm": True, "qk_norm_width": True},
    "smollm3": {"rope_thetas": (10_000.0, 0.0)},
    "gemma3_text": {
        "qk_norm": True,
        "norms": "around",
        "norm_offset": True,
        "activation": "gelu",
        "scale_embeddings": True,
        "windows": (4, 0),
        "rope_thetas": (500.0, 10_000.0),
        "query_pre_attn_scalar": 100.0,
    },
}


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
        ("qwen3", {"model_type": "qwen3_moe"}, "model_type = 'qwen3_moe' .*'llama' or .*'qwen3'"),
        ("qwen2", {"use_mrope": True}, "config.json: use_mrope = True is not supported"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window = True is not supported"),
        ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types = .*sliding_attention"),
        ("olmo2", {"attention_bias": True}, "attention_bias = True is not supported"),
        ("olmo2", {"clip_qkv": 8.0}, "clip_qkv = 8.0 is not supported"),
        ("smollm3", {"no_rope_layers": [1, 1]}, r"no_rope_layers = \[1, 1\]: want 0 or 1 for each layer"),
        ("smollm3", {"no_rope_layers": [1, 1, 2, 0]}, "no_rope_layers = .*: want 0 or 1"),
        ("smollm3", {"use_sliding_window": True}, "use_sliding_window = True is not supported"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0 is not supported"),
        ("gemma3_text", {"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0 is not supported"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
        ("gemma3_text", {"hidden_activation": "gelu"}, "hidden_activation = 'gelu' is not .* 'gelu_pytorch_tanh'"),
        ("gemma3_text", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}, "rope_scaling = .*linear"),
        ("gemma3_text", {"layer_types": ["full_attention"] * 5}, "layer_types = .* for each of 6 layers"),
        ("gemma3_text", {"query_pre_attn_scalar": -1}, "query_pre_attn_scalar = -1: want a finite number"),
        ("gemma3_text", {"model_type": "gemma3"}, "model_type = 'gemma3' is not supported"),
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
    smollm3 = read("smollm3", "no_rope_layers", "no_rope_layer_interval", "tie_word_embeddings", "rope_theta")
    assert smollm3.rope_thetas == (2e6, 2e6, 2e6, 0.0) and smollm3.tie_embeddings
    gemma = read("gemma3_text", "sliding_window_pattern", "rope_local_base_freq", "query_pre_attn_scalar")
    assert gemma == dataclasses.replace(read("gemma3_text"), query_pre_attn_scalar=256.0) and gemma.tie_embeddings
    assert gemma.windows == (8, 8, 8, 8, 8, 0) and gemma.rope_thetas == (1e4,) * 5 + (1e6,)
    kinds = ["full_attention", "sliding_attention"] * 3
    bases = {"full_attention": {"rope_type": "default", "rope_theta": 7.0}, "sliding_attention": {"rope_theta": 5.0}}
    newer = read("gemma3_text", "rope_theta", "rope_local_base_freq", layer_types=kinds, rope_parameters=bases)
    assert newer.windows == (0, 8) * 3 and newer.rope_thetas == (7.0, 5.0) * 3 and newer.rope_theta == 7.0


@pytest.mark.parametrize("name", OPTIONS_OF)
def test_every_option_is_kept_by_an_export_and_by_a_checkpoint(tmp_path, name):
    config, folder = ours_of("hf", tmp_path, **OPTIONS_OF[name])
    assert families.family_of(config).model_type == name
    again, params = huggingface.read_folder(folder)
    assert all(getattr(again, option) == getattr(config, option) for option in PLAIN)
    shapes = jax.tree.map(lambda leaf: leaf.shape[1:], model.abstract_params(config)["layers"])
    assert shapes == config.block_shapes
    huggingface.write_folder(tmp_path / "back", again, params, tiny_runs.tokenizer())
    for file in ("model.safetensors", "config.json"):
        assert (folder / file).read_bytes() == (tmp_path / "back" / file).read_bytes()
    meta = json.loads(json.dumps(checkpoint.model_meta(again, tiny_runs.tokenizer())))  # as a checkpoint has it
    assert checkpoint.model_config_from_meta(meta, where="here") == again
    checkpoint.check_model(meta, again, where="here")
    for option, value in PLAIN.items():
        if getattr(again, option) != value and option != "qk_norm_width":
            other = dataclasses.replace(again, **{option: value})
            with pytest.raises(ValueError, match=f"here is of another model: {option} is"):
                checkpoint.check_model(meta, other, where="here")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"qkv_bias": True, "qk_norm": True},
            r"no family of gemma3_text, .* has .* {'qk_norm': True, 'qkv_bias': True}",
        ),
        (OPTIONS_OF["gemma3_text"] | {"windows": (4, 8)}, r"model.windows=\(4, 8\), .*Gemma 3 has one window"),
        ({"rope_thetas": (0.0, 5.0)}, "model.rope_thetas has 5.0: SmolLM3 has one base, 10000.0, and layers without"),
    ],
)
def test_a_model_that_no_family_holds_is_not_exported(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        ours_of("hf", tmp_path, **options)


def test_a_tensor_of_another_family_has_no_place(tmp_path):
    _, folder = ours_of("hf", tmp_path, qk_norm=True)
    values = json.loads((folder / "config.json").read_text()) | {"model_type": "llama"}
    write_config(folder, values)
    name = "model.layers.0.self_attn.k_norm.weight"
    with pytest.raises(ValueError, match=f"tensor {name} has no place in the llama family"):
        huggingface.read_folder(folder)


def their_model(folder):
    """A model of `transformers` with random weights, the norms' too, saved in the folder of its config."""
    torch = parity.module("torch")
    transformers = parity.module("transformers")
    torch.manual_seed(0)
    reference = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder))
    one = 0.0 if reference.config.model_type == "gemma3_text" else 1.0  # Gemma's norms add it to their weight
    for name, parameter in reference.named_parameters():
        torch.nn.init.uniform_(parameter, *((one - 0.5, one + 0.5) if "norm" in name else (-0.4, 0.4)))
    reference.save_pretrained(folder)
    tiny_runs.tokenizer().save(str(folder))
    return reference.eval(), folder


@pytest.fixture(scope="module", params=PUBLISHED)
def theirs(request, tmp_path_factory):
    reference, folder = their_model(write_config(tmp_path_factory.mktemp("theirs"), PUBLISHED[request.param]))
    assert type(reference).__name__ == PUBLISHED[request.param]["architectures"][0]
    return reference, folder


@pytest.fixture(scope="module")
def ours(theirs):
    return huggingface.read_folder(theirs[1])


def by_default(*names):
    """All published models, those not named being slow."""
    return [name if name in names else pytest.param(name, marks=pytest.mark.slow) for name in PUBLISHED]


def tokens(rows=2, length=LENGTH):
    return np.random.default_rng(0).integers(0, VOCAB_SIZE, (rows, length)).astype(np.int32)


def their_logits(reference, tokens_BT):
    import torch

    with torch.no_grad():
        return reference(torch.tensor(tokens_BT, dtype=torch.long)).logits.numpy()


@pytest.mark.parity
def test_logits_are_those_of_transformers(theirs, ours):
    config, params = ours
    apply = jax.jit(model.apply, static_argnums=0)
    expected = their_logits(theirs[0], tokens())
    np.testing.assert_allclose(apply(config, params, tokens())[..., :VOCAB_SIZE], expected, rtol=0, atol=1e-4)
    assert config.num_params == theirs[0].num_parameters()
    without = dataclasses.replace(config, **PLAIN)
    assert without != config and np.abs(apply(without, params, tokens())[..., :VOCAB_SIZE] - expected).max() > 0.01


@pytest.mark.parity
@pytest.mark.parametrize("theirs", by_default("llama", "gemma3_text"), indirect=True)
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
    for newer in ("rope_parameters", "dtype"), ("rope_scaling", "rope_theta", "rope_local_base_freq", "torch_dtype"):
        write_config(tmp_path, {key: value for key, value in values.items() if key not in newer})
        loaded, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        assert type(loaded) is type(theirs[0])
        assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
        np.testing.assert_array_equal(their_logits(loaded, tokens()), expected)
        assert huggingface.read_config(tmp_path) == config


@pytest.mark.parity
@pytest.mark.parametrize("theirs", by_default("llama", "gemma3_text"), indirect=True)
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
@pytest.mark.parametrize("theirs", by_default("gemma3_text"), indirect=True)
def test_a_mesh_of_eight_computes_the_logits_and_gradients_of_transformers(theirs, ours):
    import torch

    config, params = ours
    reference, tokens_BT = theirs[0], tokens(rows=4, length=24)
    labels = torch.tensor(tokens_BT, dtype=torch.long)
    reference.zero_grad()
    out = reference(labels, labels=labels)
    out.loss.backward()
    expected = {name: parameter.grad.numpy() for name, parameter in reference.named_parameters()}

    def mean_loss(params, tokens_BT):
        log_probs_BTV = jax.nn.log_softmax(model.apply(config, params, tokens_BT)[:, :-1])
        return -jnp.take_along_axis(log_probs_BTV, tokens_BT[:, 1:, None], axis=-1).mean()

    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
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
    ours, folder = ours_of("hf", tmp_path, **OPTIONS_OF["gemma3_text"])
    inputs = tiny_runs.write_inputs(tmp_path / "inputs")
    train(tiny_runs.tiny_config(inputs, init_checkpoint=str(folder), total_steps=1), str(tmp_path / "run"))
    config, params, _ = checkpoint.load_for_inference(str(tmp_path / "run"))
    assert all(getattr(config, option) == getattr(ours, option) for option in PLAIN)
    before = huggingface.read_folder(folder)[1]["layers"]["mlp_post_norm"]["scale"]
    assert 0 < np.abs(params["layers"]["mlp_post_norm"]["scale"] - before).max() < 0.1


@pytest.mark.parity
@pytest.mark.parametrize(
    "name",
    ["SmolLM2-135M", *(pytest.param(name, marks=pytest.mark.slow) for name in RELATED if name != "SmolLM2-135M")],
)
def test_more_models_of_these_families_give_the_logits_of_transformers(tmp_path, name):
    reference, folder = their_model(write_config(tmp_path, RELATED[name]))
    config, params = huggingface.read_folder(folder)
    found = jax.jit(model.apply, static_argnums=0)(config, params, tokens(1))
    np.testing.assert_allclose(found[..., :VOCAB_SIZE], their_logits(reference, tokens(1)), rtol=0, atol=1e-4)
