"""Small embedding models of random weights in Hugging Face folders, written under the published tensor names."""

import json

import numpy as np
import safetensors.numpy
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, processors

WORDS = [f"w{i}" for i in range(40)]
VOCABULARY = {token: i for i, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b", "query", ":", *WORDS])}
SIZES = {
    "vocab_size": len(VOCABULARY),
    "num_hidden_layers": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
GTE = {
    "model_type": "new",
    "position_embedding_type": "rope",
    "layer_norm_type": "layer_norm",
    "pack_qkv": True,
    "rope_theta": 500.0,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "logn_attention_scale": False,
}
BERT = {"model_type": "bert", "type_vocab_size": 2, "hidden_act": "gelu", "layer_norm_eps": 1e-12}


def tokenizer():
    backend = tokenizers.Tokenizer(models.WordPiece(VOCABULARY, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = [("[CLS]", 2), ("[SEP]", 3)]
    backend.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=special)
    backend.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    backend.enable_truncation(8)  # as published ones have it: must not shorten our texts
    backend.enable_padding(length=8)
    return backend


def tensors_of(config):
    """Random tensors under the names of the published checkpoints of this model type."""
    D, F, V = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    rng, types = np.random.default_rng(0), config.get("type_vocab_size", 2)
    shapes = {"embeddings.word_embeddings.weight": (V, D), "embeddings.LayerNorm": (D,)}
    if types:
        shapes["embeddings.token_type_embeddings.weight"] = (types, D)
    is_gte = config["model_type"] in ("new", "gte")
    if not is_gte:
        shapes["embeddings.position_embeddings.weight"] = (config["max_position_embeddings"], D)
    for i in range(config["num_hidden_layers"]):
        layer = _gte_shapes(D, F) if is_gte else _bert_shapes(D, F)
        shapes |= {f"encoder.layer.{i}.{name}": shape for name, shape in layer.items()}
    tensors = {}
    for name, shape in shapes.items():
        if len(shape) == 1 and not name.endswith("bias"):
            tensors[f"{name}.weight"] = 1 + 0.1 * rng.normal(size=shape)
            tensors[f"{name}.bias"] = 0.1 * rng.normal(size=shape)
        else:
            tensors[name] = rng.normal(size=shape) * 0.3
    return {name: tensor.astype(np.float32) for name, tensor in tensors.items()}


def _gte_shapes(D, F):
    return {
        "attention.qkv_proj.weight": (3 * D, D),
        "attention.qkv_proj.bias": (3 * D,),
        "attention.o_proj.weight": (D, D),
        "attention.o_proj.bias": (D,),
        "mlp.up_gate_proj.weight": (2 * F, D),
        "mlp.down_proj.weight": (D, F),
        "mlp.down_proj.bias": (D,),
        "attn_ln": (D,),
        "mlp_ln": (D,),
    }


def _bert_shapes(D, F):
    shapes = {"attention.output.LayerNorm": (D,), "output.LayerNorm": (D,)}
    linear = {f"attention.self.{name}": (D, D) for name in ("query", "key", "value")}
    linear |= {"attention.output.dense": (D, D), "intermediate.dense": (F, D), "output.dense": (D, F)}
    for name, (rows, columns) in linear.items():
        shapes |= {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}
    return shapes


def write(folder, *, prefix="", pooling=None, normalize=None, shards=1, **changes):
    """Writes config.json, weights (in `shards` files), tokenizer.json and sentence-transformers' files."""
    config = SIZES | (GTE if changes.get("model_type") in ("new", "gte") else BERT) | changes
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer().save(str(folder / "tokenizer.json"))
    tensors = {prefix + name: tensor for name, tensor in tensors_of(config).items()}
    if shards == 1:
        safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    else:
        files = {name: f"model-{i % shards}.safetensors" for i, name in enumerate(tensors)}
        for file in set(files.values()):
            safetensors.numpy.save_file({n: t for n, t in tensors.items() if files[n] == file}, folder / file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    if pooling:
        (folder / "1_Pooling").mkdir(exist_ok=True)
        modes = {f"pooling_mode_{mode}": mode == pooling for mode in ("cls_token", "mean_tokens", "max_tokens")}
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(modes))
    if normalize is not None:
        kinds = ["Transformer", "Pooling"] + ["Normalize"] * normalize
        paths = ["", "1_Pooling", "2_Normalize"]
        modules = [{"type": f"sentence_transformers.models.{k}", "path": p} for k, p in zip(kinds, paths, strict=False)]
        (folder / "modules.json").write_text(json.dumps(modules))
    return config
