"""The sizes and numerics of a decoder, and what follows from them: parameters, FLOPs and bytes."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

VOCAB_MULTIPLE = 128
ATTENTIONS = ("auto", "xla", "splash", "cudnn")
ATTENTION_OUTPUT = "attention_output"  # of a fused kernel: its result and what its backward pass needs
REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(ATTENTION_OUTPUT),
    ),
}


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3's rotary frequencies for contexts longer than those of its pretraining (Hugging Face's "llama3").

    Attributes:
      factor: by which frequencies with wavelengths beyond `low_freq_factor`'s are divided.
      low_freq_factor, high_freq_factor: full turns within the original context between which the division fades.
      original_max_seq_len: the context of pretraining.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_seq_len: int

    def __post_init__(self) -> None:
        values = dataclasses.asdict(self)
        is_right = all(isinstance(value, int | float) and math.isfinite(value) for value in values.values())
        is_right = is_right and 0 < self.low_freq_factor < self.high_freq_factor and self.factor >= 1
        if not is_right or self.original_max_seq_len < 1:
            raise ValueError(f"model.rope_scaling={values}: wants numbers, factor and context >= 1 and 0 < low < high")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> "RopeScaling":
        """From its fields by name; ValueError unless they are these."""
        names = [field.name for field in dataclasses.fields(cls)]
        if sorted(values) != sorted(names):
            raise ValueError(f"model.rope_scaling={dict(values)}: wants {', '.join(names)}")
        return cls(**values)

    def scaled(self, frequencies_P: Float[Array, " P"]) -> Float[Array, " P"]:
        """The frequencies, radians a position, as this scaling has them."""
        turns_P = self.original_max_seq_len * frequencies_P / (2 * jnp.pi)
        kept_P = (turns_P - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept_P = jnp.clip(kept_P, 0.0, 1.0)
        return frequencies_P * (kept_P + (1 - kept_P) / self.factor)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes and numerics of a decoder; the fields of `config.model` in `configs/`.

    Attributes:
      vocab_size: real ids, the harm tag included; `padded_vocab_size` is what arrays hold.
      rope_scaling: None for plain rotary positions; a mapping of its fields is taken too.
      qk_norm: an RMSNorm over every head of queries and keys (Qwen3).
      init_std: of a normal; output projections are divided by sqrt(2 * num_layers), as SmolLM2 was initialised.
      dtype: of the computation; norms, softmax and logits are float32 anyway.
      remat: "none" saves every activation, "dots" those of matmuls with parameters and a fused attention kernel's
        output, "full" only each layer's input.
      attention: of training: "xla", "splash" (TPU), "cudnn" (GPU), or "auto" = the fused one of the platform where it
        can run, else xla; settled by `attention_kernels.choose` for a mesh, until when "auto" computes with xla.
    """

    vocab_size: int
    num_layers: int
    d_model: int
    d_ff: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_seq_len: int = 2048
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | Mapping[str, float | int] | None = None
    qk_norm: bool = False
    rms_norm_eps: float = 1e-5
    tie_embeddings: bool = True
    init_std: float = 0.02
    dtype: str = "bfloat16"
    param_dtype: str = "float32"
    scan_layers: bool = True
    remat: str = "none"
    attention: str = "auto"

    def __post_init__(self) -> None:
        if isinstance(self.rope_scaling, Mapping):
            object.__setattr__(self, "rope_scaling", RopeScaling.from_mapping(self.rope_scaling))
        sizes = ("vocab_size", "num_layers", "d_model", "d_ff", "num_heads", "num_kv_heads", "head_dim", "max_seq_len")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name}={getattr(self, name)}: must be at least 1")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"model.num_kv_heads={self.num_kv_heads} does not divide num_heads={self.num_heads}")
        if self.head_dim % 2:
            raise ValueError(f"model.head_dim={self.head_dim}: rotary positions need an even number")
        if self.remat != "none" and self.remat not in REMAT_POLICIES:
            raise ValueError(f"model.remat={self.remat!r}: one of none, {', '.join(REMAT_POLICIES)}")
        if self.attention not in ATTENTIONS:
            raise ValueError(f"model.attention={self.attention!r}: one of {', '.join(ATTENTIONS)}")
        for name in ("dtype", "param_dtype"):
            if getattr(self, name) not in ("float32", "bfloat16", "float16"):
                raise ValueError(f"model.{name}={getattr(self, name)!r}: one of float32, bfloat16, float16")

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def block_shapes(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """The shape of every parameter of a block, by part and name; a norm is a part with a `scale` alone."""
        heads, kv_heads = (self.num_heads, self.head_dim), (self.num_kv_heads, self.head_dim)
        norms = {"attention_norm": self.d_model, "mlp_norm": self.d_model}
        if self.qk_norm:
            norms |= {"query_norm": self.head_dim, "key_norm": self.head_dim}
        return {
            "attention": {
                "query": (self.d_model, *heads),
                "key": (self.d_model, *kv_heads),
                "value": (self.d_model, *kv_heads),
                "output": (*heads, self.d_model),
            },
            "mlp": {
                "gate": (self.d_model, self.d_ff),
                "up": (self.d_model, self.d_ff),
                "down": (self.d_ff, self.d_model),
            },
            **{name: {"scale": (size,)} for name, size in norms.items()},
        }

    @property
    def num_params(self) -> int:
        """Real parameters: the rows that only pad the vocabulary are not counted."""
        tables = self.vocab_size * (1 if self.tie_embeddings else 2)
        return self.num_layers * self._block_params() + self.d_model * (tables + 1)

    @property
    def param_bytes(self) -> int:
        """Of all parameters in `param_dtype`, rows that pad the vocabulary included."""
        padding = (self.padded_vocab_size - self.vocab_size) * self.d_model * (1 if self.tie_embeddings else 2)
        return (self.num_params + padding) * jnp.dtype(self.param_dtype).itemsize

    def flops_per_token(self, seq_len: int) -> int:
        """Model FLOPs to train on one token of a row of `seq_len`: the formula of `safelm.train.metrics`."""
        matmul_params = self.num_layers * self._block_params(norms=False) + self.vocab_size * self.d_model
        return 6 * matmul_params + 12 * self.num_layers * self.num_heads * self.head_dim * seq_len

    def kept_bytes_per_token(self, seq_len: int, *, remat: str = "", tensor: int = 1) -> int:
        """Bytes that a block keeps of a token for its backward pass: the formulas of `safelm.train.plan`.

        Args:
          remat: that of the config where not given.
          tensor: devices that share heads and the MLP's width.
        """
        remat, width = remat or self.remat, jnp.dtype(self.dtype).itemsize
        heads, kv_heads = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        is_fused = self.attention in ("splash", "cudnn")
        if remat == "full":
            return width * self.d_model
        if remat == "dots":
            fused = (width * self.head_dim + 4) * self.num_heads if is_fused else 0
            return width * 2 * self.d_model + (width * (heads + 2 * kv_heads + 2 * self.d_ff) + fused) // tensor
        if is_fused:
            attention = 3 * width * heads + 4 * self.num_heads
        else:
            attention = (2 * width + 4) * heads + (8 + seq_len * (4 + width)) * self.num_heads
        norms = self.qk_norm * (12 * (heads + kv_heads) + 8 * (self.num_heads + self.num_kv_heads))
        split = width * (2 * kv_heads + 6 * self.d_ff) + attention + norms
        return (24 + 2 * width) * self.d_model + 16 + split // tensor

    def _block_params(self, *, norms: bool = True) -> int:
        parts = [part for part in self.block_shapes.values() if norms or "scale" not in part]
        return sum(math.prod(shape) for part in parts for shape in part.values())
