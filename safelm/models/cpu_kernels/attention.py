"""Attention of a decoding step and of a chunk of prompts by the C++ kernels. Axes: see `safelm.inference.asked`.

Both compute in float32 and read caches in float32 or bfloat16; results are in the dtype of the queries.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from safelm.models.arrays import ArrayLike
from safelm.models.cpu_kernels import building

_LANES = 16  # numbers of the widest vector


def takes_heads_of(head_dim: int, dtype: str) -> bool:
    """Whether the kernel is written for such heads."""
    return dtype in ("float32", "bfloat16") and head_dim % _LANES == 0


def attend_next(
    q_RCNH: Float[ArrayLike, "R C N H"],
    k_RCKH: Float[ArrayLike, "R C K H"],
    v_RCKH: Float[ArrayLike, "R C K H"],
    k_RKSH: Float[ArrayLike, "R K S H"],
    v_RKSH: Float[ArrayLike, "R K S H"],
    lengths_R: Int[Array, " R"],
    window: int = 0,
) -> Float[Array, "R C N H"]:
    """Softmax attention of C alternatives over their row's first `lengths_R` cached tokens and, each, itself.

    Args:
      window: tokens that the last one sees, itself included; 0: all.
    """
    call = jax.ffi.ffi_call(building.target("attend_next"), jax.ShapeDtypeStruct(q_RCNH.shape, jnp.float32))
    fresh = (jnp.asarray(each, jnp.float32) for each in (q_RCNH, k_RCKH, v_RCKH))
    out_RCNH = call(*fresh, k_RKSH, v_RKSH, lengths_R.astype(jnp.int32), window=np.int64(window))
    return out_RCNH.astype(q_RCNH.dtype)


def attend_chunk(
    q_1TNH: Float[ArrayLike, "1 T N H"],
    k_1TKH: Float[ArrayLike, "1 T K H"],
    v_1TKH: Float[ArrayLike, "1 T K H"],
    k_1KSH: Float[ArrayLike, "1 K S H"],
    v_1KSH: Float[ArrayLike, "1 K S H"],
    starts_T: Int[Array, " T"],
    behind_T: Int[Array, " T"],
    window: int = 0,
) -> Float[Array, "1 T N H"]:
    """Causal softmax attention of the tokens of prompts end to end in a row, each over its own prompt.

    A token's result is the same wherever its prompt was cut into what is cached and what is new.

    Args:
      starts_T: where the token's prompt begins in the row.
      behind_T: how many cached tokens stand before that.
      window: tokens that one sees, itself included; 0: all.
    """
    call = jax.ffi.ffi_call(building.target("attend_chunk"), jax.ShapeDtypeStruct(q_1TNH.shape, jnp.float32))
    rows = (each.astype(jnp.int32) for each in (starts_T, behind_T))
    fresh = (jnp.asarray(each, jnp.float32) for each in (q_1TNH, k_1TKH, v_1TKH))
    return call(*fresh, k_1KSH, v_1KSH, *rows, window=np.int64(window)).astype(q_1TNH.dtype)
