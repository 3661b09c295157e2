"""A Llama in plain PyTorch, for `scripts/bench/train_torch.py` on machines that have no more than PyTorch.

Parameters carry Hugging Face's names, so that its files load as they are. Attention is PyTorch's fused one; embeddings
are tied. `compile_parts` compiles one block, which all layers share, and the loss: PyTorch's "regional compilation",
whose first step takes seconds where the whole model's takes a minute.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, sizes: dict[str, Any]):
        super().__init__()
        width, head_dim = sizes["hidden_size"], sizes["head_dim"]
        self.head_dim = head_dim
        self.q_proj = nn.Linear(width, sizes["num_attention_heads"] * head_dim, bias=False)
        self.k_proj = nn.Linear(width, sizes["num_key_value_heads"] * head_dim, bias=False)
        self.v_proj = nn.Linear(width, sizes["num_key_value_heads"] * head_dim, bias=False)
        self.o_proj = nn.Linear(sizes["num_attention_heads"] * head_dim, width, bias=False)

    def forward(self, x_BTD: torch.Tensor, cos_TH: torch.Tensor, sin_TH: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x_BTD.shape
        query, key, value = (
            projection(x_BTD).view(batch, length, -1, self.head_dim).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = (rotated(x, cos_TH, sin_TH).to(value.dtype) for x in (query, key))
        out = functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, sizes: dict[str, Any]):
        super().__init__()
        width, inner = sizes["hidden_size"], sizes["intermediate_size"]
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))


class Layer(nn.Module):
    """One block."""

    def __init__(self, sizes: dict[str, Any]):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(sizes["hidden_size"], eps=sizes["rms_norm_eps"])
        self.self_attn = Attention(sizes)
        self.post_attention_layernorm = nn.RMSNorm(sizes["hidden_size"], eps=sizes["rms_norm_eps"])
        self.mlp = FeedForward(sizes)

    def forward(self, x_BTD: torch.Tensor, cos_TH: torch.Tensor, sin_TH: torch.Tensor) -> torch.Tensor:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), cos_TH, sin_TH)
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))


class Llama(nn.Module):
    """The decoder under transformers' parameter names."""

    def __init__(self, sizes: dict[str, Any]):
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(sizes["vocab_size"], sizes["hidden_size"])
        self.model.layers = nn.ModuleList(Layer(sizes) for _ in range(sizes["num_hidden_layers"]))
        self.model.norm = nn.RMSNorm(sizes["hidden_size"], eps=sizes["rms_norm_eps"])
        inverse_H = sizes["rope_theta"] ** -(torch.arange(0, sizes["head_dim"], 2).double() / sizes["head_dim"])
        angles_TH = torch.arange(sizes["max_position_embeddings"]).double()[:, None] * inverse_H.repeat(2)
        self.register_buffer("cos_TH", angles_TH.cos().float(), persistent=False)
        self.register_buffer("sin_TH", angles_TH.sin().float(), persistent=False)
        self._head = _head_loss

    def hidden(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        length = tokens_BT.shape[1]
        x_BTD = self.model.embed_tokens(tokens_BT)
        for layer in self.model.layers:
            x_BTD = layer(x_BTD, self.cos_TH[:length], self.sin_TH[:length])
        return self.model.norm(x_BTD)

    def forward(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        """Logits [B, T, V]."""
        return functional.linear(self.hidden(tokens_BT), self.model.embed_tokens.weight)

    def loss(self, tokens_BT: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy in nats."""
        return self._head(self.hidden(tokens_BT), self.model.embed_tokens.weight, targets_BT)

    def compile_parts(self) -> None:
        """Compiles the block and the loss."""
        for layer in self.model.layers:
            layer.compile()
        self._head = torch.compile(_head_loss)


def _head_loss(x_BTD: torch.Tensor, table_VD: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
    logits_BTV = functional.linear(x_BTD, table_VD).float()
    return functional.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())


def rotated(x_BNTH: torch.Tensor, cos_TH: torch.Tensor, sin_TH: torch.Tensor) -> torch.Tensor:
    """Rotary positions as Llama has them: pairs are half a head apart."""
    first, second = x_BNTH.chunk(2, dim=-1)
    return x_BNTH * cos_TH + torch.cat((-second, first), dim=-1) * sin_TH


def model(sizes: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Llama:
    """The model with weights under their Hugging Face names; ValueError for tied weights that are not there."""
    if not sizes["tie_word_embeddings"]:
        raise ValueError("the plain PyTorch model ties its embeddings")
    made = Llama(sizes)
    made.load_state_dict({name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"})
    return made
