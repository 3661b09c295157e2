"""Conversion between our checkpoints, Hugging Face folders and GGUF files, on tiny models."""

import dataclasses
import json
import logging
import shutil

import gguf as gguf_package
import jax
import numpy as np
import parity
import pytest
import random_decoders
import safetensors.numpy
import side_files

from safelm import cli, convert
from safelm.checkpoints import checkpoint
from safelm.formats import decoder_tensors, gguf, huggingface, sources
from safelm.models import decoder as model
from safelm.tags import HARM_TAG
from safelm.text.tokenizer import Tokenizer

CONFIG = model.ModelConfig(
    vocab_size=270,
    num_layers=2,
    d_model=32,
    d_ff=48,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_seq_len=64,
    rope_theta=5_000.0,
    init_std=0.2,
    dtype="float32",
)
apply = jax.jit(model.apply, static_argnums=0)


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = Tokenizer.train(["a tiny corpus of words, words and more words"] * 4, 270)
    assert tokenizer.vocab_size == 270
    return tokenizer


def params_of(config):
    """Random parameters; rows that pad the vocabulary are zero."""
    params = jax.tree.map(np.array, random_decoders.random_params(config))
    params["embedder"]["embedding"][config.vocab_size :] = 0.0
    if not config.tie_embeddings:
        params["unembed"]["kernel"][:, config.vocab_size :] = 0.0
    return params


def token_ids():
    return np.random.default_rng(1).integers(0, 270, (2, 17)).astype(np.int32)


def assert_trees_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def tie(request_param):
    return dataclasses.replace(CONFIG, tie_embeddings=request_param)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_ours_to_huggingface_and_back_is_the_same(tmp_path, tokenizer, tied):
    config, params = tie(tied), params_of(tie(tied))
    checkpoint.save_params(str(tmp_path / "ours"), config, params, tokenizer)
    convert.convert(str(tmp_path / "ours"), str(tmp_path / "hf"))
    convert.convert(str(tmp_path / "hf"), str(tmp_path / "again"))
    again_config, again_params, again_tokenizer = checkpoint.load_for_inference(str(tmp_path / "again"))
    assert again_config == config and again_tokenizer.hash == tokenizer.hash
    assert_trees_equal(jax.tree.map(np.asarray, again_params), params)
    files = {path.name for path in (tmp_path / "hf").iterdir()}
    expected = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert files == expected
    assert {path.name for path in tmp_path.iterdir()} == {"ours", "hf", "again"}  # nothing temporary is left
    side_files.assert_only_documents("convert", tmp_path)


@pytest.mark.parametrize("saw_tag", [True, False, None])
def test_whether_a_model_saw_the_tag_goes_with_it(tmp_path, tokenizer, saw_tag):
    checkpoint.save_params(str(tmp_path / "ours"), CONFIG, params_of(CONFIG), tokenizer, saw_tag=saw_tag)
    for source, target, to in (("ours", "copy", "safelm"), ("copy", "hf", "huggingface"), ("hf", "back", "safelm")):
        convert.convert(str(tmp_path / source), str(tmp_path / target), to=to)
        assert sources.saw_tag(str(tmp_path / target)) is saw_tag, target
    config = tmp_path / "hf" / "config.json"
    assert ("safelm_saw_tag" in json.loads(config.read_text())) is (saw_tag is not None)
    config.write_text(json.dumps(json.loads(config.read_text()) | {"safelm_saw_tag": "yes"}))
    with pytest.raises(ValueError, match=r"config.json: safelm_saw_tag = 'yes': want true or false"):
        sources.saw_tag(str(tmp_path / "hf"))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_transformers_loads_our_export_with_the_same_logits(tmp_path, tokenizer, tied):
    torch = parity.module("torch")
    transformers = parity.module("transformers")
    config, params = tie(tied), params_of(tie(tied))
    huggingface.write_folder(tmp_path, config, params, tokenizer)
    theirs, report = transformers.LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    with torch.no_grad():
        expected = theirs(torch.tensor(token_ids(), dtype=torch.long)).logits.numpy()
    np.testing.assert_allclose(apply(config, params, token_ids())[..., :270], expected, atol=1e-4)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.convert_tokens_to_ids(HARM_TAG) == tokenizer.harm_tag_id
    assert loaded("more words")["input_ids"] == tokenizer.encode("more words")
    assert theirs.generation_config.eos_token_id == [tokenizer.eos_id, tokenizer.chat_end_id]


@pytest.mark.parametrize(
    "tied, kv_heads, dtype",
    [(True, 2, "float32"), (False, 1, "bfloat16"), pytest.param(False, 4, "float16", marks=pytest.mark.slow)],
)
def test_a_transformers_llama_has_the_same_logits_here(tmp_path, tokenizer, tied, kv_heads, dtype):
    torch = parity.module("torch")
    transformers = parity.module("transformers")
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=270,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=kv_heads,
            head_dim=16,
            max_position_embeddings=64,
            tie_word_embeddings=tied,
            rope_parameters={"rope_type": "default", "rope_theta": 700.0},
            rms_norm_eps=1e-3,
            initializer_range=0.2,
        )
    )
    for name, parameter in theirs.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    theirs = theirs.to(getattr(torch, dtype))
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")  # several shards and an index
    assert (tmp_path / "model.safetensors.index.json").exists()
    tokenizer.save(str(tmp_path))
    config, params, _ = convert.read_model(str(tmp_path))
    assert (config.head_dim, config.num_kv_heads, config.rope_theta, config.rms_norm_eps) == (16, kv_heads, 700.0, 1e-3)
    # reloaded, not `.float()`: that would leave rotary frequencies rounded to the half type
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(torch.tensor(token_ids(), dtype=torch.long)).logits.numpy()
    np.testing.assert_allclose(apply(config, params, token_ids())[..., :270], expected, atol=1e-4)


def huggingface_folder(folder, tokenizer, **changes):
    huggingface.write_folder(folder, CONFIG, params_of(CONFIG), tokenizer)
    values = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        if value is KeyError:
            del values[key]
        else:
            values[key] = value
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def change_tensors(folder, change):
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")


YARN = {"rope_type": "yarn", "factor": 8.0, "rope_theta": 5e5}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"attention_bias": True}, "config.json: attention_bias = True is not supported"),
        ({"mlp_bias": True}, "mlp_bias = True"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported; it must be 'silu'"),
        ({"model_type": "mixtral"}, "model_type = 'mixtral'"),
        ({"model_type": KeyError}, "model_type is missing"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling: type = 'linear'"),
        ({"rope_parameters": YARN}, "rope_parameters: rope_type = 'yarn'"),
        ({"rope_interleaved": True}, "rope_interleaved = True"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"quantization_config": {"bits": 4}}, "quantization_config = "),
        ({"hidden_size": KeyError}, "hidden_size is missing"),
        ({"num_hidden_layers": "two"}, "num_hidden_layers = 'two'"),
        ({"num_hidden_layers": 3}, "tensor model.layers.2.input_layernorm.weight is missing"),
        ({"num_hidden_layers": 1}, "tensor model.layers.1.input_layernorm.weight has no place"),
        ({"intermediate_size": 64}, r"mlp.gate_proj.weight has shape \(48, 32\), the config asks for \(64, 32\)"),
        ({"tie_word_embeddings": False}, "tensor lm_head.weight is missing"),
    ],
)
def test_what_the_decoder_lacks_is_refused_by_name(tmp_path, tokenizer, changes, message):
    folder = huggingface_folder(tmp_path / "hf", tokenizer, **changes)
    with pytest.raises(ValueError, match=message):
        convert.convert(str(folder), str(tmp_path / "out"))
    assert {path.name for path in tmp_path.iterdir()} == {"hf"}


def test_older_configs_are_read(tmp_path, tokenizer):
    older = {"rope_parameters": KeyError, "rope_scaling": {"type": "default"}, "head_dim": KeyError}
    folder = huggingface_folder(tmp_path / "hf", tokenizer, **older)
    assert huggingface.read_config(folder) == CONFIG


def test_broken_tensors_are_refused_by_name(tmp_path, tokenizer):
    folder = huggingface_folder(tmp_path / "hf", tokenizer)
    bias = "model.layers.0.self_attn.q_proj.bias"
    change_tensors(folder, lambda tensors: tensors.update({bias: np.zeros(32, np.float32)}))
    with pytest.raises(ValueError, match=f"tensor {bias} has no place"):
        convert.read_model(str(folder))
    head = np.ones((270, 32), np.float32)
    change_tensors(folder, lambda tensors: (tensors.pop(bias), tensors.update({"lm_head.weight": head})))
    with pytest.raises(ValueError, match=r"tie_word_embeddings is true, but lm_head.weight is not"):
        convert.read_model(str(folder))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model.safetensors: not a whole safetensors file"):
        convert.read_model(str(folder))
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"has neither model.safetensors nor"):
        convert.read_model(str(folder))
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"x": "model-1.safetensors"}}')
    with pytest.raises(FileNotFoundError, match=r"model-1.safetensors: no such file"):
        convert.read_model(str(folder))
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json: not JSON"):
        convert.read_model(str(folder))


def test_sources_and_targets_are_checked(tmp_path, tokenizer, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"--source=.*nowhere: no such"):
        convert.convert(str(tmp_path / "nowhere"), str(tmp_path / "out"))
    (tmp_path / "file").write_text("hello")
    with pytest.raises(ValueError, match="not a GGUF file"):
        convert.source_kind(str(tmp_path / "file"))
    with pytest.raises(ValueError, match="holds neither"):
        convert.source_kind(str(tmp_path))
    folder = huggingface_folder(tmp_path / "hf", tokenizer)
    with pytest.raises(FileExistsError, match=r"--target=.*exists already"):
        convert.convert(str(folder), str(tmp_path / "file"))
    with pytest.raises(ValueError, match="--step=3"):
        convert.convert(str(folder), str(tmp_path / "out"), step=3)
    with pytest.raises(ValueError, match="--target=gs://bucket/x"):
        convert.convert(str(folder), "gs://bucket/x")

    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_params", full_disk)
    with pytest.raises(OSError, match="No space left"):
        convert.convert(str(folder), str(tmp_path / "out"))
    assert {path.name for path in tmp_path.iterdir()} == {"file", "hf"}


def test_a_vocabulary_without_the_tag_gets_it_as_the_mean(tmp_path, tokenizer, caplog):
    for tied in (True, False):
        folder = tmp_path / f"tied-{tied}"
        config = dataclasses.replace(tie(tied), vocab_size=269)
        huggingface.write_folder(folder, config, params_of(config), tokenizer)
        remove_tag(folder / "tokenizer.json")
        with caplog.at_level(logging.INFO):
            read_config, params, read_tokenizer = convert.read_model(str(folder))
        assert read_config.vocab_size == read_tokenizer.vocab_size == 270 and read_tokenizer.harm_tag_id == 269
        assert "ids from 269 to 269" in caplog.text and "mean of the 269 others" in caplog.text
        before = params_of(config)["embedder"]["embedding"][:269]
        table = params["embedder"]["embedding"]
        np.testing.assert_array_equal(table[:269], before)
        np.testing.assert_allclose(table[269], before.mean(axis=0), atol=1e-6)
        assert table.shape == (384, 32) and not table[270:].any()
        if not tied:
            kernel, before = params["unembed"]["kernel"], params_of(config)["unembed"]["kernel"][:, :269]
            np.testing.assert_allclose(kernel[:, 269], before.mean(axis=1), atol=1e-6)
            assert kernel.shape == (32, 384) and not kernel[:, 270:].any()


def remove_tag(path):
    """Makes the last id an ordinary token's and leaves the tag out, as a vocabulary that never heard of it."""
    values = json.loads(path.read_text())
    tag = next(token for token in values["added_tokens"] if token["content"] == HARM_TAG)
    values["added_tokens"].remove(tag)
    vocab = values["model"]["vocab"]
    vocab.pop(HARM_TAG, None)
    last = max(vocab, key=vocab.get)
    values["model"]["merges"] = [m for m in values["model"]["merges"] if "".join(m) != last]
    vocab[last] = tag["id"]
    path.write_text(json.dumps(values))


def test_rows_without_a_token_are_dropped(tmp_path, tokenizer, caplog):
    config = dataclasses.replace(CONFIG, vocab_size=300)
    huggingface.write_folder(tmp_path / "hf", config, params_of(config), tokenizer)
    with caplog.at_level(logging.INFO):
        read_config, params, _ = convert.read_model(str(tmp_path / "hf"))
    assert read_config.vocab_size == 270 and "ids 270 to 299 have no token: dropped" in caplog.text
    assert not params["embedder"]["embedding"][270:].any()


CHANGE_THE_ARITHMETIC = (
    ("rope.scaling.factor", 4.0),  # without a type llama.cpp scales linearly
    ("rope.scale_linear", 4.0),
    ("rope.scaling.attn_factor", 0.5),
    ("attention.scale", 0.5),
    ("attention.clamp_kqv", 1.0),
    ("attention.causal", False),
    ("attention.sliding_window", 8),
    ("attention.sliding_window_pattern", [True, False]),
    ("final_logit_softcapping", 30.0),
    ("logit_scale", 0.5),
    ("something.new", "x"),
)
CHANGE_NOTHING = (
    ("rope.scaling.factor", 1.0),
    ("rope.scaling.original_context_length", 64),
    ("attention.causal", True),
    ("vocab_size", 256),
    ("expert_count", 0),
    ("expert_used_count", 0),
    ("tensor_data_layout", "Meta AI original pth"),
)


def write_gguf(path, config, params, *, extra_fields=(), extra_tensors=(), leave_out=()):
    """A float32 GGUF file with llama.cpp's order of query and key rows."""
    writer = gguf_package.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.d_model)
    writer.add_feed_forward_length(config.d_ff)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    adders = {str: writer.add_string, float: writer.add_float32, bool: writer.add_bool, int: writer.add_uint32}
    for key, value in extra_fields:
        (writer.add_array if isinstance(value, list) else adders[type(value)])(key, value)
    names = {theirs: ours for ours, theirs in gguf._TENSORS.items()}
    names |= {
        decoder_tensors.tensor_name(i, theirs): f"blk.{i}.{ours}"
        for ours, theirs in gguf._LAYER_TENSORS.items()
        for i in range(config.num_layers)
    }
    for name, tensor in decoder_tensors.tensors_from_params(config, params).items():
        for kind, heads in (("q_proj", config.num_heads), ("k_proj", config.num_kv_heads)):
            if kind in name:  # as llama.cpp's converter does it
                split = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, tensor.shape[1])
                tensor = split.swapaxes(1, 2).reshape(tensor.shape)
        if names[name] not in leave_out:
            writer.add_tensor(names[name], np.ascontiguousarray(tensor))
    for name, tensor in extra_tensors:
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_gguf_is_read_exactly(tmp_path, tied):
    config, params = tie(tied), params_of(tie(tied))
    read_config, read_params = gguf.read_file(write_gguf(tmp_path / "model.gguf", config, params))
    assert read_config == dataclasses.replace(config, init_std=0.02)  # a GGUF file does not say
    assert_trees_equal(read_params, params)


def test_gguf_that_the_decoder_lacks_is_refused_by_name(tmp_path):
    params = params_of(CONFIG)

    def read(**changes):
        gguf.read_file(write_gguf(tmp_path / "model.gguf", CONFIG, params, **changes))

    with pytest.raises(ValueError, match=r"llama.rope.scaling.type = 'yarn' is not supported"):
        read(extra_fields=[("llama.rope.scaling.type", "yarn")])
    for key, value in CHANGE_THE_ARITHMETIC:
        with pytest.raises(ValueError, match=rf"model.gguf: llama.{key} = .* is not supported"):
            read(extra_fields=[(f"llama.{key}", value)])
    read(extra_fields=[(f"llama.{key}", value) for key, value in CHANGE_NOTHING])
    with pytest.raises(ValueError, match=r"tensor blk.0.attn_q.bias has no place"):
        read(extra_tensors=[("blk.0.attn_q.bias", np.zeros(32, np.float32))])
    with pytest.raises(ValueError, match=r"tensor rope_freqs.weight has no place"):
        read(extra_tensors=[("rope_freqs.weight", np.zeros(4, np.float32))])
    with pytest.raises(ValueError, match=r"tensor model.layers.1.mlp.up_proj.weight is missing"):
        read(leave_out=["blk.1.ffn_up.weight"])
    shutil.copy(write_gguf(tmp_path / "model.gguf", CONFIG, params), tmp_path / "cut.gguf")
    whole = (tmp_path / "cut.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cut.gguf: not a readable GGUF file"):
        gguf.read_file(tmp_path / "cut.gguf")


def test_the_command_line_says_what_is_wrong_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.run(convert.main, convert.argument_parser(), [f"--source={tmp_path}/none", f"--target={tmp_path}/out"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].endswith("none: no such file or folder")
