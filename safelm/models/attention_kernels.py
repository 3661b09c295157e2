"""Chooses the attention kernel of training, and wraps the fused kernels of TPUs and NVIDIA GPUs.

| kernel | platform | packed documents | scores in memory |
|---|---|---|---|
| splash | TPU, Pallas | segment ids, compared inside the kernel | blocks only |
| cudnn | NVIDIA GPU | a mask [B, 1, T, T] in the compute dtype, added block by block | blocks, and the mask |
| xla | any | a boolean mask [B, T, T] | 5/8 of [B, N, T, T] float32, a layer at a time |

cuDNN can keep packed documents apart without a mask, but JAX offers that only in private modules. Generation and
evaluation with a cache always use xla.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from safelm.models import attention, causal_attention, sharding
from safelm.models.arrays import ArrayLike
from safelm.models.config import ModelConfig, query_blocks
from safelm.models.remat import ATTENTION_OUTPUT

LANES = 128  # of a TPU: splash's blocks are multiples of it
MAX_BLOCK = 512  # rows and columns of splash's score blocks: 1 MB of float32 each, far below a core's fast memory


@dataclasses.dataclass(frozen=True)
class Choice:
    """The chosen attention kernel ("xla", "splash" or "cudnn") and the reason in words."""

    kernel: str
    reason: str


def choose(config: ModelConfig, seq_len: int, mesh: Mesh) -> Choice:
    """Settles `config.attention` for rows of `seq_len` tokens on the devices of `mesh`.

    "auto" is splash on TPU and cudnn on GPU where they can run, else xla. The platform is that of the mesh's devices,
    which need not be this process's (a program can be compiled for a TPU without one).

    Raises ValueError if `config.attention` names a kernel that can't run, saying why.
    """
    fused = {"tpu": "splash", "gpu": "cudnn"}.get(platform := mesh.devices.flat[0].platform)
    if config.attention == "xla":
        return Choice("xla", "model.attention is xla")
    if config.attention == "auto":
        if fused is None:
            return Choice("xla", f"auto: {platform} devices have no fused kernel")
        refusal = _REFUSALS[fused](config, seq_len, mesh)
        return Choice("xla", f"auto: not {fused}, {refusal}") if refusal else Choice(fused, f"auto: {platform} devices")
    if refusal := _REFUSALS[config.attention](config, seq_len, mesh):
        raise ValueError(f"model.attention={config.attention!r} can't run: {refusal}")
    return Choice(config.attention, f"model.attention is {config.attention}")


def _refuse_splash(config: ModelConfig, seq_len: int, mesh: Mesh) -> str | None:
    if (platform := mesh.devices.flat[0].platform) != "tpu":
        return f"it needs TPU devices, these are {platform}"
    if seq_len % LANES:
        return f"it needs rows of a multiple of {LANES} tokens, seq_len is {seq_len}"
    if any(config.windows):
        return "its mask is the same in all layers, model.windows gives each its own"
    if config.dtype == "float16":
        return "it computes in bfloat16 or float32, model.dtype is float16"
    return None


def _refuse_cudnn(config: ModelConfig, seq_len: int, mesh: Mesh) -> str | None:
    if (platform := mesh.devices.flat[0].platform) != "gpu":
        return f"it needs NVIDIA GPUs, these are {platform} devices"
    if config.dtype == "float32":
        return "it computes in bfloat16 or float16, model.dtype is float32"
    return _refused_by_cudnn(config, seq_len, mesh.local_devices[0])


def _refused_by_cudnn(config: ModelConfig, seq_len: int, device: jax.Device) -> str | None:
    """cuDNN's reason for refusing, if any. Its limits change with the version, so a small program is tried."""

    def attend(q_BTNH: jax.Array, kv_BTKH: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
        mask_BTS = attention.causal_mask(seq_len, segment_ids_BT)
        return cudnn(q_BTNH, kv_BTKH, kv_BTKH, mask_BTS).sum(dtype=jnp.float32)

    placed = functools.partial(jax.ShapeDtypeStruct, sharding=jax.sharding.SingleDeviceSharding(device))
    q_BTNH = placed((1, seq_len, config.num_heads, config.head_dim), config.dtype)
    kv_BTKH = placed((1, seq_len, config.num_kv_heads, config.head_dim), config.dtype)
    try:
        jax.jit(jax.grad(attend, argnums=(0, 1))).lower(q_BTNH, kv_BTKH, placed((1, seq_len), np.int32)).compile()
    except (NotImplementedError, RuntimeError, ValueError) as error:  # XLA's errors are RuntimeErrors
        return f"cuDNN says: {' '.join(str(error).split())}"
    return None


_REFUSALS = {"splash": _refuse_splash, "cudnn": _refuse_cudnn}


def attend(
    kernel: str,
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    visible: Array,
) -> Float[Array, "B T N H"]:
    """Causal attention inside documents by a kernel; `visible` is the result of `what_is_visible` for that kernel."""
    if fused := {"splash": splash, "cudnn": cudnn}.get(kernel):
        return fused(q_BTNH, k_BTKH, v_BTKH, visible)
    return causal_attention.attend_causally(q_BTNH, k_BTKH, v_BTKH, visible, query_blocks(q_BTNH.shape[1]))


def what_is_visible(kernel: str, length: int, segment_ids_BT: Int[ArrayLike, "B T"] | None) -> Array:
    """A kernel's description of the documents in each row, for all layers: segment ids [B, T] or a mask [b, T, T].

    Rows are one document each when `segment_ids_BT` is None.
    """
    if kernel != "splash":
        return attention.causal_mask(length, segment_ids_BT)
    return jnp.zeros((1, length), jnp.int32) if segment_ids_BT is None else jnp.asarray(segment_ids_BT)


def cudnn(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    mask_BTS: Bool[Array, "b T T"],
) -> Float[Array, "B T N H"]:
    """Attention by cuDNN's flash kernel, causal, further restricted by a mask; sums in float32.

    Under `jax.set_mesh` every device computes its own rows and heads.
    """

    def on_device(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, mask_BTS: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(
            q_BTNH, k_BTKH, v_BTKH, mask=mask_BTS[:, None], is_causal=True, implementation="cudnn"
        )

    return _on_every_device(on_device, q_BTNH, k_BTKH, v_BTKH, mask_BTS)


def splash(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    segment_ids_BT: Int[Array, "b T"],
    *,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Causal attention inside documents by the Pallas TPU kernel; scores and sums in float32, a block at a time.

    Under `jax.set_mesh` every device computes its own rows and heads. T must be a multiple of 128. `interpret` runs
    the kernel's operations one by one on any platform, slowly.

    The backward pass has a kernel for the queries' gradient and one for those of keys and values, which compute the
    scores twice. The one that has both leaves a queries' gradient for every block of keys, and their sum alone takes as
    long as the kernel: `docs/results/pods.md`.
    """
    on_device = functools.partial(_splash_on_device, interpret=interpret)
    return _on_every_device(on_device, q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)


def _on_every_device(
    attend: Callable[..., jax.Array], q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, visible: jax.Array
) -> jax.Array:
    """Runs a kernel on every device's rows and heads, since no compiler can split it."""
    visible = jnp.broadcast_to(visible, (q_BTNH.shape[0], *visible.shape[1:]))
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return attend(q_BTNH, k_BTKH, v_BTKH, visible)
    query = sharding.activation_spec(("batch", "length", "heads", "head_dim"))
    key = sharding.activation_spec(("batch", "length", "kv_heads", "head_dim"))
    rows = sharding.activation_spec(("batch",))
    # Kernels carry no record of the axes their results vary over: check_vma would refuse them.
    mapped = jax.shard_map(attend, in_specs=(query, key, key, rows), out_specs=query, check_vma=False)
    return mapped(q_BTNH, k_BTKH, v_BTKH, visible)


def _splash_on_device(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segment_ids_BT: jax.Array, *, interpret: bool
) -> jax.Array:
    from jax.experimental.pallas.ops.tpu import splash_attention  # 0.4 s that only TPUs need

    _, T, N, H = q_BTNH.shape
    block = math.gcd(T, MAX_BLOCK)
    kernel = splash_attention.make_splash_mha(
        splash_attention.MultiHeadMask([splash_attention.CausalMask((T, T))] * N),
        block_sizes=splash_attention.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=ATTENTION_OUTPUT,
        interpret=interpret,
    )

    def heads_first(x_BTNH: jax.Array) -> jax.Array:
        return x_BTNH.transpose(0, 2, 1, 3)

    out_BNTH = jax.vmap(kernel)(
        heads_first(q_BTNH * (1 / math.sqrt(H))),
        heads_first(k_BTKH),
        heads_first(v_BTKH),
        splash_attention.SegmentIds(segment_ids_BT, segment_ids_BT),
    )
    return out_BNTH.transpose(0, 2, 1, 3)
