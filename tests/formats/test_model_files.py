"""Model files of strangers: every wrong type or value is one line that names the file, and costs no memory or time."""

import copy
import functools
import json
import pathlib
import random
import struct
import time
from collections.abc import Iterator
from typing import Any

import gguf
import jax
import numpy as np
import pytest
import safetensors.numpy

from safelm.formats import decoder_tensors, huggingface
from safelm.formats import gguf as gguf_format
from safelm.formats.sources import read_model
from safelm.io.gguf_file import GGUFFile
from safelm.models import decoder as model
from safelm.text import chat_template, stranger_worker
from safelm.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer.train(["the cat sat on the mat"] * 3, 270)
CONFIG = model.ModelConfig(
    vocab_size=TOKENIZER.vocab_size,
    num_layers=2,
    d_model=8,
    d_ff=8,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    max_seq_len=64,
    dtype="float32",
)
PARAMS = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), model.abstract_params(CONFIG))
WRONG = [None, True, -1, 0, 3, 2**31, 10**9, 10**30, 1.5, float("nan"), float("inf"), "", "x", [], [1], {}, {"a": 1}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("model")
    huggingface.write_folder(path, CONFIG, PARAMS, TOKENIZER)
    return path


def told(path: pathlib.Path, read, *arguments) -> str:
    """The line that a read ends in; "" if it ends well. Anything but one line about the path fails."""
    try:
        read(*arguments)
    except (ValueError, OSError) as error:
        assert str(path) in str(error) and len(str(error)) < 1000, error
        return str(error)
    return ""


def changed(spec: Any, wrong: list[Any]) -> Iterator[Any]:
    """Copies of a JSON value, each with one of its values (at any depth, two of a list) replaced."""
    inside = spec.items() if isinstance(spec, dict) else enumerate(spec[:2]) if isinstance(spec, list) else ()
    for key, value in list(inside)[:40]:
        for other in [*wrong, *changed(value, wrong)]:
            made = copy.copy(spec)
            made[key] = other
            yield made


def test_every_value_of_a_config_is_checked(folder):
    path = folder / "config.json"
    good = path.read_text()
    lines = []
    try:
        for spec in changed(json.loads(good), WRONG):
            path.write_text(json.dumps(spec))
            lines.append(told(folder, huggingface.read_config, folder))
        sizes = ("vocab_size", "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")
        for key in sizes:
            path.write_text(json.dumps(json.loads(good) | {key: 2**31 - 2}))
            assert told(folder, huggingface.read_folder, folder), f"{key} costs nothing"
    finally:
        path.write_text(good)
    assert len(lines) > 300 and sum(map(bool, lines)) > 150
    assert any("rms_norm_eps = inf: want a finite number" in line for line in lines)


def test_a_broken_index_or_kind_of_number_is_one_line(folder, tmp_path):
    index = {"weight_map": dict.fromkeys(safetensors.numpy.load_file(folder / "model.safetensors"), "a.safetensors")}
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_text((folder / file).read_text())
    (tmp_path / "a.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    safetensors.numpy.save_file({"other": np.zeros(1)}, tmp_path / "b.safetensors")
    place = tmp_path / "model.safetensors.index.json"
    place.write_text(json.dumps(index))
    assert told(tmp_path, huggingface.read_folder, tmp_path) == ""
    name = "model.norm.weight"
    for wrong, line in {
        "b.safetensors": "holds no tensor",
        "../x": "want a file of this folder",
        5: "want a file",
        "c.safetensors": "no such file",
    }.items():
        place.write_text(json.dumps({"weight_map": index["weight_map"] | {name: wrong}}))
        found = told(tmp_path, huggingface.read_folder, tmp_path)
        assert line in found and name in found
    place.unlink()
    data = bytearray((folder / "model.safetensors").read_bytes())
    (tmp_path / "model.safetensors").write_bytes(data.replace(b'"F32"', b'"I32"'))
    assert "is of I32: want one of F32" in told(tmp_path, huggingface.read_folder, tmp_path)


def test_every_value_of_a_tokenizer_is_checked(tmp_path):
    TOKENIZER.beginning_with([0]).save(str(tmp_path))
    path = tmp_path / "tokenizer.json"
    spec = json.loads(path.read_text())
    cases = list(changed(spec, [None, -1, 2**31, "x", [], {}]))
    lines = []
    for each in random.Random(0).sample(cases, 200):
        path.write_text(json.dumps(each))
        lines.append(told(path.parent, Tokenizer.from_pretrained, str(tmp_path)))
    assert len(cases) > 500 and sum(map(bool, lines)) > 80
    spec["post_processor"]["special_tokens"] = {}
    path.write_text(json.dumps(spec))
    assert "names '<|endoftext|>' without defining it" in told(path.parent, Tokenizer.from_pretrained, str(tmp_path))
    spec["model"]["vocab"]["a"], spec["post_processor"] = 2**31 - 1, None
    path.write_text(json.dumps(spec))
    assert "has the id 2147483647" in told(path.parent, Tokenizer.from_pretrained, str(tmp_path))


def write_gguf(path: pathlib.Path, changes: dict[str, tuple[Any, Any]] | None = None) -> None:
    """A model of zeros; `changes` are (value, type) by field."""
    types, spec = gguf.GGUFValueType, json.loads(TOKENIZER.to_json())
    ids = spec["model"]["vocab"]
    tokens = sorted(ids, key=ids.__getitem__)
    special = {token["content"] for token in spec["added_tokens"]}
    kinds = [int(gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL) for token in tokens]
    fields: dict[str, tuple[Any, Any]] = {
        "general.architecture": ("llama", types.STRING),
        "llama.block_count": (2, types.UINT32),
        "llama.embedding_length": (8, types.UINT32),
        "llama.feed_forward_length": (8, types.UINT32),
        "llama.attention.head_count": (2, types.UINT32),
        "llama.attention.head_count_kv": (1, types.UINT32),
        "llama.attention.key_length": (4, types.UINT32),
        "llama.context_length": (64, types.UINT32),
        "llama.attention.layer_norm_rms_epsilon": (1e-5, types.FLOAT32),
        "llama.rope.freq_base": (1e4, types.FLOAT32),
        "tokenizer.ggml.model": ("gpt2", types.STRING),
        "tokenizer.ggml.pre": ("smollm", types.STRING),
        "tokenizer.ggml.tokens": (tokens, types.ARRAY),
        "tokenizer.ggml.token_type": (kinds, types.ARRAY),
        "tokenizer.ggml.merges": ([" ".join(merge) for merge in spec["model"]["merges"]], types.ARRAY),
        "tokenizer.ggml.bos_token_id": (0, types.UINT32),
        "tokenizer.ggml.eos_token_id": (0, types.UINT32),
        "tokenizer.ggml.add_bos_token": (True, types.BOOL),
        "tokenizer.chat_template": ("{{ messages }}", types.STRING),
    }
    writer = gguf.GGUFWriter(path, "llama")
    writer.kv_data[0].clear()
    for key, (value, kind) in (fields | (changes or {})).items():
        if kind is not None:
            writer.add_key_value(key, value, kind)
    ours = {hf: own for own, hf in gguf_format._TENSORS.items()}
    layers = {hf: own for own, hf in gguf_format._LAYER_TENSORS.items()}
    for name, tensor in decoder_tensors.tensors_from_params(CONFIG, PARAMS).items():
        _, _, layer, *rest = name.split(".") if name.startswith("model.layers.") else ("", "", "", "")
        own = f"blk.{layer}.{layers['.'.join(rest)]}" if layer else ours[name]
        writer.add_tensor(own, np.ascontiguousarray(tensor))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()


def test_every_field_of_a_gguf_file_is_checked(tmp_path):
    path = tmp_path / "m.gguf"
    write_gguf(path)
    assert told(path, read_model, str(path)) == ""
    types = gguf.GGUFValueType
    wrong = [
        (0, types.UINT32),
        (-1, types.INT64),
        (2**63, types.UINT64),
        (float("nan"), types.FLOAT32),
        ("x", types.STRING),
        (float("inf"), types.FLOAT64),
        ([1], types.ARRAY),
        (["a"], types.ARRAY),
        (True, types.BOOL),
        (None, None),
    ]
    rng, lines = random.Random(0), []
    for key in [key for key in GGUFFile(path)._fields if not key.startswith("GGUF.")]:
        for value in rng.sample(wrong, 2):
            path.unlink()
            write_gguf(path, {key: value})
            lines.append(told(path, read_model, str(path)))
    assert len(lines) > 35 and sum(map(bool, lines)) > 25


def test_a_damaged_gguf_file_is_one_line(tmp_path):
    path = tmp_path / "m.gguf"
    write_gguf(path)
    good, rng = path.read_bytes(), random.Random(0)
    for case in range(30):
        data = bytearray(good[: rng.randrange(len(good))] if case % 3 == 0 else good)
        for _ in range(rng.randint(1, 4) if case % 3 else 0):
            data[rng.randrange(min(len(data), 9000))] = rng.choice([0, 1, 8, 9, 127, 128, 255])
        path.write_bytes(data)
        told(path, read_model, str(path))


@pytest.mark.parametrize("count", [2**60, 10**9])
def test_a_few_bytes_claim_no_memory(tmp_path, count):
    path = tmp_path / "small.gguf"
    field = struct.pack("<Q", 3) + b"a.b" + struct.pack("<IIQ", 9, 0, count)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, count, 1) + field)
    assert "not a readable GGUF file" in told(path, GGUFFile, path)


HOSTILE = {
    "endless": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "doubling": "{% set n = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "long": "{% for i in range(20000) %}{{ 'a' * 1000 }}{% endfor %}",
    "wide": "{{ '%999999999d'|format(1) }}",
    "deep": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "syntax": "{% for",
    "escape": "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "include": "{% include '/etc/passwd' %}",
    "type": "{{ messages + 1 }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_ends_in_a_line(name, monkeypatch):
    monkeypatch.setattr(stranger_worker, "render", functools.partial(stranger_worker.render, seconds=1.0))
    started = time.monotonic()
    with pytest.raises(ValueError, match="chat template can't be rendered"):
        chat_template.render(
            HOSTILE[name], [{"role": "user", "content": "a"}], add_generation_prompt=True, special_tokens={}
        )
    assert time.monotonic() - started < 30
    good = {"template": "{{ messages[0].content }}", "values": {"messages": [{"content": "still there"}]}}
    assert stranger_worker.render(good) == "still there"
