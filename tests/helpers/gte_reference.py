"""GTE v1.5 as published, written plainly in float64, with nothing of ours and none of the code that comes with it."""

import math

import numpy as np


def _tensors(tensors):
    return {name.removeprefix("new."): tensor.astype(np.float64) for name, tensor in tensors.items()}


def _frequencies(config, H):
    frequencies = np.array([config["rope_theta"] ** (-2 * i / H) for i in range(H // 2)])
    if scaling := config.get("rope_scaling"):
        factor = scaling["factor"]
        if (b := scaling.get("mixed_b")) is None:
            base = config["rope_theta"] * factor
            return np.array([base ** (-2 * i / H) for i in range(H // 2)]) / factor ** (2 / H)
        a = math.log(factor) / (H / 2) ** b
        return frequencies / np.exp(a * np.arange(1, H // 2 + 1) ** b)
    return frequencies


def states(config, tensors, ids):
    """The states of one text's tokens behind the last layer [tokens, D]."""
    t = _tensors(tensors)
    D, N = config["hidden_size"], config["num_attention_heads"]
    H, F = D // N, config["intermediate_size"]
    frequencies = _frequencies(config, H)

    def norm(x, name):
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + config["layer_norm_eps"])
        return scaled * t[f"{name}.weight"] + t[f"{name}.bias"]

    def rotate(x):  # [tokens, heads, H]: pairs (i, i + H/2) as complex numbers
        turns = np.exp(1j * np.arange(len(x))[:, None] * frequencies)[:, None]
        turned = (x[..., : H // 2] + 1j * x[..., H // 2 :]) * turns
        return np.concatenate([turned.real, turned.imag], axis=-1)

    x = t["embeddings.word_embeddings.weight"][ids]
    if config["type_vocab_size"]:
        x = x + t["embeddings.token_type_embeddings.weight"][0]
    x = norm(x, "embeddings.LayerNorm")
    for i in range(config["num_hidden_layers"]):
        p = f"encoder.layer.{i}."
        qkv = x @ t[p + "attention.qkv_proj.weight"].T + t[p + "attention.qkv_proj.bias"]
        q, k, v = (part.reshape(-1, N, H) for part in np.split(qkv, 3, axis=-1))
        q, k = rotate(q), rotate(k)
        heads = []
        for n in range(N):
            scores = q[:, n] @ k[:, n].T / math.sqrt(H)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            heads.append(weights / weights.sum(-1, keepdims=True) @ v[:, n])
        attended = np.concatenate(heads, axis=-1) @ t[p + "attention.o_proj.weight"].T + t[p + "attention.o_proj.bias"]
        x = norm(x + attended, p + "attn_ln")
        up_gate = x @ t[p + "mlp.up_gate_proj.weight"].T
        up, gate = up_gate[:, :F], up_gate[:, F:]
        gelu = gate * 0.5 * (1 + np.vectorize(math.erf)(gate / math.sqrt(2)))
        x = norm(x + (gelu * up) @ t[p + "mlp.down_proj.weight"].T + t[p + "mlp.down_proj.bias"], p + "mlp_ln")
    return x


def logits(config, tensors, ids):
    """The logits of one text: the first token's state through the pooler (dense, tanh) and the classifier."""
    t = _tensors(tensors)
    pooled = np.tanh(states(config, tensors, ids)[0] @ t["pooler.dense.weight"].T + t["pooler.dense.bias"])
    return pooled @ t["classifier.weight"].T + t["classifier.bias"]
