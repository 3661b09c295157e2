"""The sizes and numerics of a decoder, and what follows from them: parameters, FLOPs and bytes."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from safelm.models import remat as remat_lib
from safelm.models.routing_config import Routing

VOCAB_MULTIPLE = 128
ATTENTIONS = ("auto", "xla", "splash", "cudnn")
NORMS = {"before": ("",), "after": ("",), "around": ("", "_post")}  # placement -> suffixes of a sublayer's norms
ACTIVATIONS = ("silu", "gelu")
PRODUCTS = ("auto", "xla", "native")


def query_blocks(length: int) -> int:
    """Into how many blocks of queries "xla" attention cuts a row: 4, or 1 where it is short or does not divide.

    Every block is computed against the keys up to its end: of 4, 5/8 of all scores; 8 would save a sixteenth more, in
    more and smaller products.
    """
    return 4 if length >= 256 and length % 4 == 0 else 1


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


PROJECTIONS = ("query", "key", "value", "output", "gate", "up", "down")  # a block's products with kernels
_INTO_STREAM = ("output", "down")  # those whose kernel has the stream on its last axis, not its first


@dataclasses.dataclass(frozen=True)
class Lora:
    """Low-rank adapters beside a block's projections, x W + alpha / rank x A B: Hu et al. 2021 (arXiv 2106.09685).

    Attributes:
      rank: columns of A and rows of B.
      alpha: the scale of an adapter's product, times its rank.
      targets: the projections that have one, of `PROJECTIONS`, kept in its order.
    """

    rank: int
    alpha: float
    targets: Sequence[str]

    def __post_init__(self) -> None:
        if unknown := [name for name in self.targets if name not in PROJECTIONS]:
            raise ValueError(f"lora.targets names {unknown[0]!r}: known are {', '.join(PROJECTIONS)}")
        object.__setattr__(self, "targets", tuple(name for name in PROJECTIONS if name in self.targets))
        if not self.targets:
            raise ValueError("lora.targets is empty: name at least one projection")
        if self.rank < 1:
            raise ValueError(f"lora.rank is {self.rank}: it must be at least 1")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"lora.alpha is {self.alpha}: it must be above 0")

    @property
    def scale(self) -> float:
        """Of an adapter's product."""
        return self.alpha / self.rank

    def shapes(self, kernels: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """A's and B's shapes, as `NAME_a` and `NAME_b`, for the shapes of a block's kernels."""
        found = {}
        for name in self.targets:
            split = -1 if name in _INTO_STREAM else 1
            inputs, outputs = kernels[name][:split], kernels[name][split:]
            found |= {f"{name}_a": (*inputs, self.rank), f"{name}_b": (self.rank, *outputs)}
        return found


# Fields of `ModelConfig` in which families differ from a plain decoder.
FAMILY_OPTIONS = (
    "rope_scaling",
    "rope_thetas",
    "windows",
    "qk_norm",
    "qk_norm_width",
    "qkv_bias",
    "norms",
    "norm_offset",
    "activation",
    "scale_embeddings",
    "query_pre_attn_scalar",
)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes and numerics of a decoder; the fields of `config.model` in `configs/`.

    Attributes:
      vocab_size: real ids, the harm tag included; `padded_vocab_size` is what arrays hold.
      rope_scaling: None for plain rotary positions; a mapping of its fields is taken too.
      rope_thetas: a base for each layer where they differ; 0 is a layer without rotary positions (SmolLM3).
        `rope_scaling` holds for layers of the base `rope_theta`.
      windows: for each layer how many tokens a query sees, itself included (Gemma 3); 0: all before it. Empty: all.
      qk_norm: an RMSNorm over every head of queries and keys (Qwen3).
      qk_norm_width: that norm is one over all heads together (OLMo 2).
      qkv_bias: queries, keys and values have biases (Qwen2).
      norms: where RMSNorms stand: "before" attention and MLP, "after" them (OLMo 2) or "around" them (Gemma 3).
      norm_offset: a norm multiplies by 1 + its scale (Gemma).
      activation: of the MLP's gate: "silu", or "gelu" by its tanh formula (Gemma).
      scale_embeddings: embeddings are multiplied by sqrt(d_model) (Gemma).
      query_pre_attn_scalar: scores are divided by its square root; `head_dim` where not given.
      init_std: of a normal; output projections are divided by sqrt(2 * num_layers), as SmolLM2 was initialised.
      dtype: of the computation; norms, softmax and logits are float32 anyway.
      param_dtype: of the parameters; those that are trained, adapters too, are float32 (`safelm.train.step`).
      remat: "none" saves every activation, "dots" those of matmuls with parameters and a fused attention kernel's
        output, "full" only each layer's input, "keep:NAMES" that and results by name, "keep:NAMES;offload:NAMES" some
        in the host's memory: see `safelm.models.remat`.
      attention: of training: "xla", "splash" (TPU), "cudnn" (GPU), or "auto" = the fused one of the platform where it
        can run, else xla; settled by `attention_kernels.choose` for a mesh, until when "auto" computes with xla.
      products: of training, with large matrices: "xla", "native" (our C++ kernels: one CPU, bfloat16), or "auto" =
        native where it can run, else xla; settled by `product_kernels.choose`, until when "auto" computes with xla.
      lora: adapters among the parameters (`safelm.models.lora`); None: none. A mapping of its fields is taken too.
      routed: units that learned labelled rows alone (`safelm.models.routing`); None: none. A mapping is taken too.
      banned_ids: what decoding never chooses, by any method; log-probs are the model's own.
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
    rope_thetas: Sequence[float] = ()
    windows: Sequence[int] = ()
    qk_norm: bool = False
    qk_norm_width: bool = False
    qkv_bias: bool = False
    norms: str = "before"
    norm_offset: bool = False
    activation: str = "silu"
    scale_embeddings: bool = False
    query_pre_attn_scalar: float | None = None
    rms_norm_eps: float = 1e-5
    tie_embeddings: bool = True
    init_std: float = 0.02
    dtype: str = "bfloat16"
    param_dtype: str = "float32"
    scan_layers: bool = True
    remat: str = "none"
    attention: str = "auto"
    products: str = "auto"
    lora: Lora | Mapping[str, Any] | None = None
    routed: Routing | Mapping[str, Any] | None = None
    banned_ids: Sequence[int] = ()

    def __post_init__(self) -> None:
        if isinstance(self.lora, Mapping):
            object.__setattr__(self, "lora", Lora(**self.lora))
        if isinstance(self.routed, Mapping):
            object.__setattr__(self, "routed", Routing(**self.routed))
        if self.routed is not None:
            self.routed.check_sizes(self.num_heads, self.d_ff)
        if self.routed is not None and self.lora is not None:
            raise ValueError("routing: not with lora, whose adapters are all that is trained")
        if isinstance(self.rope_scaling, Mapping):
            object.__setattr__(self, "rope_scaling", RopeScaling.from_mapping(self.rope_scaling))
        for name in ("rope_thetas", "windows", "banned_ids"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("rope_thetas", "windows"):
            self._check_layers(name)
        sizes = ("vocab_size", "num_layers", "d_model", "d_ff", "num_heads", "num_kv_heads", "head_dim", "max_seq_len")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name}={getattr(self, name)}: must be at least 1")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"model.num_kv_heads={self.num_kv_heads} does not divide num_heads={self.num_heads}")
        if self.head_dim % 2:
            raise ValueError(f"model.head_dim={self.head_dim}: rotary positions need an even number")
        remat_lib.check(self.remat)
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"model.{name}={getattr(self, name)!r}: one of {', '.join(allowed)}")
        if self.query_pre_attn_scalar is not None and not 0 < self.query_pre_attn_scalar < math.inf:
            raise ValueError(f"model.query_pre_attn_scalar={self.query_pre_attn_scalar}: must be above 0")

    def _check_layers(self, name: str) -> None:
        values = getattr(self, name)
        if values and (len(values) != self.num_layers or not all(0 <= value < math.inf for value in values)):
            raise ValueError(f"model.{name}={values}: want a number of at least 0 for each of {self.num_layers} layers")

    def part(self, start: int, stop: int) -> "ModelConfig":
        """The config of these layers alone."""
        layers = {name: getattr(self, name)[start:stop] for name in ("rope_thetas", "windows")}
        return dataclasses.replace(self, num_layers=stop - start, **layers)

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def block_shapes(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """The shape of every parameter of a block, by part and name; a norm is a part with a `scale` alone."""
        heads, kv_heads = (self.num_heads, self.head_dim), (self.num_kv_heads, self.head_dim)
        norms = {f"{part}{end}_norm": self.d_model for part in ("attention", "mlp") for end in NORMS[self.norms]}
        if self.qk_norm:
            query, key = (self.num_heads, self.num_kv_heads) if self.qk_norm_width else (1, 1)
            norms |= {"query_norm": query * self.head_dim, "key_norm": key * self.head_dim}
        biases = {"query_bias": heads, "key_bias": kv_heads, "value_bias": kv_heads} if self.qkv_bias else {}
        attention = {
            "query": (self.d_model, *heads),
            "key": (self.d_model, *kv_heads),
            "value": (self.d_model, *kv_heads),
            "output": (*heads, self.d_model),
        }
        mlp = {
            "gate": (self.d_model, self.d_ff),
            "up": (self.d_model, self.d_ff),
            "down": (self.d_ff, self.d_model),
        }
        adapters = {"lora": self.lora.shapes(attention | mlp)} if self.lora else {}
        scales = {name: {"scale": (size,)} for name, size in norms.items()}
        return {"attention": attention | biases, "mlp": mlp, **scales, **adapters}

    @property
    def num_params(self) -> int:
        """Real parameters, adapters included: the rows that only pad the vocabulary are not counted."""
        tables = self.vocab_size * (1 if self.tie_embeddings else 2)
        return self.num_layers * self._block_params() + self.d_model * (tables + 1)

    @property
    def num_trained_params(self) -> int:
        """Of those, what a run trains: the adapters alone where there are some."""
        return self.num_layers * self._adapter_params() if self.lora else self.num_params

    @property
    def param_bytes(self) -> int:
        """Of all parameters in `param_dtype`, rows that pad the vocabulary included."""
        padding = (self.padded_vocab_size - self.vocab_size) * self.d_model * (1 if self.tie_embeddings else 2)
        return (self.num_params + padding) * jnp.dtype(self.param_dtype).itemsize

    def flops_per_token(self, seq_len: int) -> int:
        """Model FLOPs to train on one token of a row of `seq_len`: the formula of `safelm.train.metrics`."""
        matmul_params = self.num_layers * self._block_params(products_only=True) + self.vocab_size * self.d_model
        frozen_params = matmul_params - self.num_trained_params if self.lora else 0
        seen = sum(min(window or seq_len, seq_len) for window in self.windows or [0] * self.num_layers)
        return 6 * matmul_params - 2 * frozen_params + 12 * self.num_heads * self.head_dim * seen

    def kept_bytes_per_token(self, seq_len: int, *, remat: str = "", tensor: int = 1) -> int:
        """Bytes that a block keeps of a token for its backward pass: the formulas of `safelm.train.plan`.

        With `remat` in place of the config's, on one of `tensor` devices that share heads and the MLP's width.
        """
        remat, width = remat or self.remat, jnp.dtype(self.dtype).itemsize
        heads, kv_heads = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        is_fused = self.attention in ("splash", "cudnn")
        if kept := remat_lib.Kept(()) if remat == "full" else remat_lib.Kept.parse(remat):
            return width * self.d_model + sum(self._kept_bytes_by_name(tensor)[name] for name in kept.on_device)
        adapters = self._kept_bytes_of_adapters(remat, width, tensor)
        if remat == "dots":
            fused = (width * self.head_dim + 4) * self.num_heads if is_fused else 0
            split = (width * (heads + 2 * kv_heads + 2 * self.d_ff) + fused) // tensor
            return width * (2 + (self.norms != "before")) * self.d_model + split + adapters
        if is_fused:
            attention = 3 * width * heads + 4 * self.num_heads
        else:
            blocks = query_blocks(seq_len)
            seen = seq_len * (blocks + 1) // (2 * blocks)
            attention = (2 * width + 4) * heads + (4 + width * seen) * self.num_heads
        num_normed = 2 if self.qk_norm_width else self.num_heads + self.num_kv_heads
        norms = self.qk_norm * (12 * (heads + kv_heads) + 8 * num_normed)
        split = width * (2 * kv_heads + (8 if self.activation == "gelu" else 6) * self.d_ff) + attention + norms
        return 2 * width * self.d_model + (24 * self.d_model + 16) * len(NORMS[self.norms]) + split // tensor + adapters

    def _kept_bytes_by_name(self, tensor: int) -> dict[str, int]:
        """Of a token, by its name in `remat.NAMES`, on one of `tensor` devices."""
        heads, kv_heads = (count * self.head_dim // tensor for count in (self.num_heads, self.num_kv_heads))
        sizes = {"query": heads, "key": kv_heads, "value": kv_heads, "attention": heads, "output": self.d_model}
        sizes |= dict.fromkeys(("gate", "up"), self.d_ff // tensor)
        sizes["down"] = self.d_model * (self.norms != "before")  # which nothing but a norm takes in
        found = {name: jnp.dtype(self.dtype).itemsize * size for name, size in sizes.items()}
        found["attention"] += 4 * self.num_heads // tensor * (self.attention == "splash")  # logarithms of sums
        return found

    def _kept_bytes_of_adapters(self, remat: str, width: int, tensor: int) -> int:
        """x A of every adapter and, where products are kept, its own beside the projection's."""
        if self.lora is None:
            return 0
        heads, kv_heads = self.num_heads * self.head_dim // tensor, self.num_kv_heads * self.head_dim // tensor
        outputs = {"query": heads, "key": kv_heads, "value": kv_heads, "output": self.d_model}
        outputs |= dict.fromkeys(("gate", "up"), self.d_ff // tensor)
        outputs["down"] = self.d_model * (self.norms != "before")  # which nothing but a norm takes in
        kept = sum(outputs[name] for name in self.lora.targets) if remat == "dots" else 0
        return width * (self.lora.rank * len(self.lora.targets) + kept)

    def _adapter_params(self) -> int:
        return sum(math.prod(shape) for shape in self.block_shapes.get("lora", {}).values())

    def _block_params(self, *, products_only: bool = False) -> int:
        named = [each for part in self.block_shapes.values() for each in part.items()]
        added = [name for name, _ in named if name == "scale" or name.endswith("_bias")]
        return sum(math.prod(shape) for name, shape in named if not products_only or name not in added)


_DTYPES = ("float32", "bfloat16", "float16")
_CHOICES = {
    "attention": ATTENTIONS,
    "products": PRODUCTS,
    "norms": tuple(NORMS),
    "activation": ACTIVATIONS,
    "dtype": _DTYPES,
    "param_dtype": _DTYPES,
}
