"""Small sequence classifiers of random weights in Hugging Face folders, under the published tensor names."""

import json

import embedding_folders
import numpy as np
import parity
import safetensors.numpy

IN_ORDER = [f"LABEL_{i}" for i in range(6)]
HARM = [f"w{i}" for i in range(20, 40)]  # words of the tests' vocabulary

_SMALL = {
    "vocab_size": embedding_folders.SIZES["vocab_size"],
    "hidden_size": 16,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
# As published, but for the sizes.
_CONFIGS = {
    "bert": ("BertConfig", {"num_hidden_layers": 2}),
    "roberta": (
        "RobertaConfig",
        {"num_hidden_layers": 2, "type_vocab_size": 1, "pad_token_id": 1, "max_position_embeddings": 66},
    ),
    "xlm-roberta": (
        "XLMRobertaConfig",
        {"num_hidden_layers": 2, "type_vocab_size": 1, "pad_token_id": 1, "max_position_embeddings": 66},
    ),
    "deberta-v2": (
        "DebertaV2Config",
        {
            "num_hidden_layers": 2,
            "relative_attention": True,
            "position_buckets": 8,
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
            "pos_att_type": ["p2c", "c2p"],
            "layer_norm_eps": 1e-7,
            "max_relative_positions": -1,
            "position_biased_input": False,
            "type_vocab_size": 0,
        },
    ),
    "modernbert": ("ModernBertConfig", {"num_hidden_layers": 5, "local_attention": 8, "global_attn_every_n_layers": 3}),
}
KINDS = tuple(_CONFIGS)


def write(folder, labels=IN_ORDER, *, seed=1, **changes):
    """A GTE v1.5 classifier as released: its config, and its tensors by their name in the file."""
    changes = {"type_vocab_size": 2, "rope_scaling": {"type": "ntk", "factor": 2.0}} | changes
    changes |= {"id2label": {str(i): name for i, name in enumerate(labels)}} if labels else {}
    config = embedding_folders.write(
        folder, prefix="new.", model_type="new", architectures=["NewForSequenceClassification"], **changes
    )
    D, rng = config["hidden_size"], np.random.default_rng(seed)
    shapes = {"new.pooler.dense": (D, D), "classifier": (len(labels) or 6, D)}
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    for name, (rows, columns) in shapes.items():
        tensors[f"{name}.weight"] = rng.normal(size=(rows, columns)).astype(np.float32)
        tensors[f"{name}.bias"] = rng.normal(size=rows).astype(np.float32)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return config, tensors


def change_config(folder, **changes):
    """Changes keys of config.json; None takes one out."""
    path = folder / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def write_by_transformers(folder, kind, labels=6, **changes):
    """A classifier made and saved by transformers; the model."""
    torch, transformers = parity.module("torch"), parity.module("transformers")
    name, own = _CONFIGS[kind]
    config = getattr(transformers, name)(**_SMALL | own | changes, num_labels=labels)
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(parameter + 0.1 * noise if parameter.ndim == 1 else 0.3 * noise)
    model.save_pretrained(folder)
    embedding_folders.tokenizer().save(str(folder / "tokenizer.json"))
    return model
