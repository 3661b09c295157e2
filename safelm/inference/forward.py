"""The forward passes of decoding, as pure functions under `jit`; layers are unrolled.

Axes: see `safelm.inference.asked`.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from safelm.inference.kv_cache import Cache, write_behind
from safelm.inference.next_attention import attend_next, attend_next_over_rows
from safelm.inference.placement import STREAM_AXES
from safelm.inference.weights import Kernel, Layer, Weights, look_up, product, products
from safelm.models import attention, cpu_kernels, sharding
from safelm.models.block import BlockWeights, block, embedded, rms_norm
from safelm.models.config import ModelConfig
from safelm.models.cpu_kernels import PackedKernel
from safelm.models.decoder import mask_padded_ids


def read_prompts(
    config: ModelConfig, weights: Weights, tokens_PT: Int[Array, "P T"], lengths_P: Int[Array, " P"]
) -> tuple[Cache, Float[Array, "P V"]]:
    """Keys and values of every prompt's tokens (and of padding after them), and the logits of the token after it."""
    x_PTD, new_kv = _read(config, weights, tokens_PT)
    return new_kv, logits_of(config, weights, at_last(x_PTD, lengths_P))


def at_last(x_BTD: Float[Array, "B T D"], lengths_B: Int[Array, " B"]) -> Float[Array, "B D"]:
    """The stream at the last token of every right-padded row; for an empty row at its first position."""
    last_B11 = jnp.maximum(lengths_B - 1, 0)[:, None, None]
    return jnp.take_along_axis(x_BTD, last_B11, axis=1)[:, 0]


def read_all(config: ModelConfig, weights: Weights, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T V"]:
    """Float32 logits of the next token at every position."""
    return logits_of(config, weights, _read(config, weights, tokens_BT)[0])


def _read(config: ModelConfig, weights: Weights, tokens_BT: Array) -> tuple[Array, Cache]:
    mask_1TT = attention.causal_mask(tokens_BT.shape[1])

    def attend(layer: int, q_BTNH: Array, k_BTKH: Array, v_BTKH: Array) -> Array:
        return attention.attend(q_BTNH, k_BTKH, v_BTKH, attention.windowed(mask_1TT, window_of(config, layer)))

    return stream_of(config, weights, tokens_BT, jnp.arange(tokens_BT.shape[1])[None], attend)[:2]


def read_behind(
    config: ModelConfig, weights: Weights, tokens_BT: Int[Array, "B T"], cache: Cache, lengths_B: Int[Array, " B"]
) -> tuple[Float[Array, "B T D"], Cache]:
    """The stream over T tokens that follow their row's first `lengths_B` cached ones, and their cache (S = T).

    The given cache is not changed; `write_behind` adds to it. `logits_of` turns the stream into logits.
    """
    return read_behind_tapped(config, weights, tokens_BT, cache, lengths_B, None)[:2]


def read_behind_tapped(
    config: ModelConfig,
    weights: Weights,
    tokens_BT: Int[Array, "B T"],
    cache: Cache,
    lengths_B: Int[Array, " B"],
    layer: int | None,
) -> tuple[Float[Array, "B T D"], Cache, Float[Array, "B T D"] | None]:
    """`read_behind`, and the stream after `layer` blocks, not normed; None where no layer is asked for."""

    def attend(layer: int, q_BTNH: Array, k_BTKH: Array, v_BTKH: Array) -> Array:
        cached = cache.keys[layer], cache.values[layer]
        return attention.attend_behind(q_BTNH, k_BTKH, v_BTKH, cached, lengths_B, window_of(config, layer))

    positions_BT = lengths_B[:, None] + jnp.arange(tokens_BT.shape[1])
    return stream_of(config, weights, tokens_BT, positions_BT, attend, tapped=layer)


def read_on(
    config: ModelConfig, weights: Weights, tokens_RT: Int[Array, "R T"], cache: Cache, lengths_R: Int[Array, " R"]
) -> tuple[Float[Array, "R T D"], Cache]:
    """`read_behind` and `write_behind` in one, for a few tokens of every row.

    With C++ kernels the attention of each token is the one of `try_next`, so in int8, whose sums are exact, the stream
    is what as many single steps would give, to the last bit.
    """
    if not has_native_attention(config, weights):
        x_RTD, new_kv = read_behind(config, weights, tokens_RT, cache, lengths_R)
        # Nothing is written after numbers that are none: so the write waits for all that reads the cache.
        is_number_R = ~jnp.isnan(x_RTD).any(axis=(1, 2))
        return x_RTD, write_behind(cache, new_kv, jnp.where(is_number_R, lengths_R, cache.max_len))
    written: list[Cache] = []

    def attend(layer: int, q_RTNH: Array, k_RTKH: Array, v_RTKH: Array) -> Array:
        new_kv = Cache((k_RTKH.swapaxes(1, 2),), (v_RTKH.swapaxes(1, 2),))
        own = Cache((cache.keys[layer],), (cache.values[layer],))
        written.append(write_behind(own, new_kv, lengths_R, is_native=True))
        outs_R1NH = []
        for place in range(tokens_RT.shape[1]):
            own = (each[:, place : place + 1] for each in (q_RTNH, k_RTKH, v_RTKH))
            cached = written[layer].keys[0], written[layer].values[0]
            outs_R1NH.append(cpu_kernels.attend_next(*own, *cached, lengths_R + place, window_of(config, layer)))
        return jnp.concatenate(outs_R1NH, axis=1)

    x_RTD, _, _ = stream_of(config, weights, tokens_RT, lengths_R[:, None] + jnp.arange(tokens_RT.shape[1]), attend)
    return x_RTD, Cache(tuple(each.keys[0] for each in written), tuple(each.values[0] for each in written))


def has_native_attention(config: ModelConfig, weights: Weights) -> bool:
    """Whether the C++ kernels attend: of packed weights, in float32 or bfloat16, with heads that fit."""
    return weights.is_packed and cpu_kernels.takes_heads_of(config.head_dim, config.dtype)


def try_next(
    config: ModelConfig, weights: Weights, tokens_RC: Int[Array, "R C"], cache: Cache, lengths_R: Int[Array, " R"]
) -> tuple[Float[Array, "R C V"], Cache]:
    """One forward pass over C alternatives for every row's next token; each sees only its row's cache and itself.

    Returns float32 logits of the token after each alternative, and the alternatives' keys and values (S = C).
    """
    return try_next_tapped(config, weights, tokens_RC, cache, lengths_R, None)[:2]


def try_next_tapped(
    config: ModelConfig,
    weights: Weights,
    tokens_RC: Int[Array, "R C"],
    cache: Cache,
    lengths_R: Int[Array, " R"],
    layer: int | None,
    holders_PWS: Int[Array, "P W S"] | None = None,
) -> tuple[Float[Array, "R C V"], Cache, Float[Array, "R C D"] | None]:
    """`try_next`, and the stream after `layer` blocks, not normed; None where no layer is asked for.

    Args:
      holders_PWS: which of its prompt's W rows holds each token of a row's text; None: the row itself holds them all.
    """

    is_native = has_native_attention(config, weights)

    def attend(layer: int, q_RCNH: Array, k_RCKH: Array, v_RCKH: Array) -> Array:
        if is_native:
            cached = cache.keys[layer], cache.values[layer]
            return cpu_kernels.attend_next(q_RCNH, k_RCKH, v_RCKH, *cached, lengths_R, window_of(config, layer))
        is_seen_R1S = attention.seen_in_cache(cache.max_len, lengths_R, 1, window_of(config, layer))
        if holders_PWS is not None:
            is_seen_PW1S = is_seen_R1S.reshape(holders_PWS.shape)[:, :, None]
            is_held_PWVS = holders_PWS[:, :, None] == jnp.arange(holders_PWS.shape[1])[:, None]
            cached = cache.keys[layer], cache.values[layer]
            return attend_next_over_rows(q_RCNH, k_RCKH, v_RCKH, *cached, is_held_PWVS & is_seen_PW1S)
        return attend_next(q_RCNH, k_RCKH, v_RCKH, cache.keys[layer], cache.values[layer], is_seen_R1S[:, 0])

    x_RCD, new_kv, read_RCD = stream_of(config, weights, tokens_RC, lengths_R[:, None], attend, tapped=layer)
    return logits_of(config, weights, x_RCD), new_kv, read_RCD


def stream_of(
    config: ModelConfig,
    weights: Weights,
    tokens_BT: Array,
    positions_BT: Array,
    attend: Callable[..., Array],
    *,
    tapped: int | None = None,
) -> tuple[Array, Cache, Array | None]:
    """The stream after the final norm, every token's keys and values, and the stream after `tapped` blocks."""
    positions_BT = jnp.broadcast_to(positions_BT, tokens_BT.shape)
    thetas = config.rope_thetas or (config.rope_theta,) * config.num_layers
    ropes = {theta: attention.rope_angles(config, positions_BT, theta) for theta in dict.fromkeys(thetas)}
    x_BTD = embedded(config, look_up(weights.embedding, tokens_BT, config.dtype))
    keys, values = [], []
    read_BTD = x_BTD if tapped == 0 else None
    for index, layer in enumerate(weights.layers):
        of_block = _block_weights(config, layer)
        x_BTD, k_BTKH, v_BTKH = block(config, of_block, x_BTD, ropes[thetas[index]], functools.partial(attend, index))
        x_BTD = sharding.constrain(x_BTD, STREAM_AXES)
        keys.append(k_BTKH.swapaxes(1, 2))
        values.append(v_BTKH.swapaxes(1, 2))
        read_BTD = x_BTD if tapped == index + 1 else read_BTD
    return rms_norm(config, x_BTD, weights.final_norm_D), Cache(tuple(keys), tuple(values)), read_BTD


def window_of(config: ModelConfig, layer: int) -> int:
    return config.windows[layer] if config.windows else 0


def _block_weights(config: ModelConfig, layer: Layer) -> BlockWeights:
    def heads(x_BTD: Array) -> tuple[Array, ...]:
        names = ("query", "key", "value")
        found = products(x_BTD, [getattr(layer, name) for name in names])
        biased = (
            out_BTF + layer.biases[f"{name}_bias"] if f"{name}_bias" in layer.biases else out_BTF
            for name, out_BTF in zip(names, found, strict=True)
        )
        return tuple(out_BTF.astype(config.dtype).reshape(*x_BTD.shape[:2], -1, config.head_dim) for out_BTF in biased)

    def to_stream(kernel: Kernel | PackedKernel) -> Callable[[Array], Array]:
        return lambda x_BTF: product(x_BTF, kernel).astype(config.dtype)

    return BlockWeights(
        heads=heads,
        output=lambda out_BTNH: to_stream(layer.output)(out_BTNH.reshape(*out_BTNH.shape[:2], -1)),
        gated=lambda x_BTD: tuple(products(x_BTD, [layer.gate, layer.up])),
        down=lambda hidden_BTF: to_stream(layer.down)(hidden_BTF.astype(config.dtype)),
        norms=layer.norms,
    )


def logits_of(config: ModelConfig, weights: Weights, x: Float[Array, "*A D"]) -> Float[Array, "*A V"]:
    """Float32 logits over the padded vocabulary; those of padded ids are `MASKED_LOGIT`."""
    return mask_padded_ids(config, product(x, weights.unembedding, is_embedding=True))


def log_normaliser(logits: Float[Array, "*A V"], *, is_native: bool = False) -> Float[Array, "*A"]:
    """log sum exp of the logits, the difference between logits and log-probs; `is_native`: by the C++ kernels."""
    return cpu_kernels.log_sum_exp(logits) if is_native else jax.nn.logsumexp(logits, axis=-1)
