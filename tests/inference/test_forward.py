"""Cached forwards give what the model of training gives for the whole row."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_decoders import TINY, UNTIED, random_params, random_tokens

from safelm.inference import forward, kv_cache
from safelm.inference.weights import prepare
from safelm.models import decoder
from safelm.models.config import RopeScaling
from safelm.models.cpu_kernels import building

CONFIGS = {
    "llama": TINY,
    "untied": UNTIED,
    "qk_norm": dataclasses.replace(TINY, qk_norm=True),
    "rope_scaling": dataclasses.replace(TINY, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 16)),
    "all": dataclasses.replace(
        TINY,
        windows=(3, 0, 5),
        rope_thetas=(0.0, 1e4, 50.0),
        qk_norm=True,
        qk_norm_width=True,
        qkv_bias=True,
        norms="around",
        norm_offset=True,
        activation="gelu",
        scale_embeddings=True,
        query_pre_attn_scalar=5.0,
    ),
}
FIRST = ("llama", "rope_scaling", "all")
EACH = [
    pytest.param(config, id=name, marks=[] if name in FIRST else pytest.mark.slow) for name, config in CONFIGS.items()
]


@pytest.mark.parametrize("config", EACH)
def test_reading_on_behind_a_cache_equals_the_whole_forward_with_ragged_lengths(config):
    params, tokens_BT = random_params(config), random_tokens(3, 14)
    weights, full_BTV = prepare(config, params), decoder.apply(config, params, tokens_BT)
    lengths, start = np.array([8, 3, 5]), jnp.zeros(3, jnp.int32)
    cache = kv_cache.empty_cache(config, 3, 20)
    x_BTD, new_kv = forward.read_behind(config, weights, tokens_BT[:, :8], cache, start)
    np.testing.assert_allclose(forward.logits_of(config, weights, x_BTD), full_BTV[:, :8], atol=3e-5)
    assert not any(kv.any() for kv in jax.tree.leaves(cache))
    cache = kv_cache.write_behind(cache, new_kv, start)  # rows 1 and 2 hold entries past their length: must not count
    for width in (1, 3):
        columns = lengths[:, None] + np.arange(width)
        new = jnp.take_along_axis(tokens_BT, columns, axis=1)
        x_BTD, new_kv = forward.read_behind(config, weights, new, cache, jnp.asarray(lengths))
        expected = np.take_along_axis(np.asarray(full_BTV), columns[..., None], axis=1)
        np.testing.assert_allclose(forward.logits_of(config, weights, x_BTD), expected, atol=3e-5)
        cache, lengths = kv_cache.write_behind(cache, new_kv, jnp.asarray(lengths)), lengths + width


@pytest.mark.parametrize("config", EACH)
def test_alternatives_share_one_prefix_and_do_not_see_each_other(config):
    params, prefix_BT, candidates_BC = random_params(config), random_tokens(2, 6), random_tokens(2, 4, seed=5)
    weights, lengths = prepare(config, params), jnp.array([6, 4])
    cache, _ = forward.read_prompts(config, weights, prefix_BT, lengths)
    logits_BCV, _ = forward.try_next(config, weights, candidates_BC, cache, lengths)
    for row in range(2):
        for i in range(4):
            alone = jnp.concatenate([prefix_BT[row, : lengths[row]], candidates_BC[row, i : i + 1]])[None]
            expected_V = decoder.apply(config, params, alone)[0, -1]
            np.testing.assert_allclose(logits_BCV[row, i], expected_V, atol=3e-5)


@pytest.mark.parametrize("is_native", [False, True])
def test_writing_drops_what_does_not_fit_and_keeps_the_rest(is_native):
    if is_native and isinstance(found := building.find(), str):
        pytest.skip(f"no CPU kernels: {found}")
    cache = jax.tree.map(lambda x: x - 1.0, kv_cache.empty_cache(TINY, 2, 4))
    new_kv = jax.tree.map(lambda x: x + 2.0, kv_cache.empty_cache(TINY, 2, 3))
    own = {"is_native": is_native}
    written = kv_cache.write_behind(cache, new_kv, jnp.array([0, 2]), **own)
    np.testing.assert_array_equal(written.keys[0][:, 0, :, 0], [[2, 2, 2, -1], [-1, -1, 2, 2]])
    written = kv_cache.write_behind(cache, jax.tree.map(lambda x: x[:1], new_kv), jnp.array([1]), jnp.array([1]), **own)
    np.testing.assert_array_equal(written.values[1][:, 1, :, 2], [[-1, -1, -1, -1], [-1, 2, 2, 2]])
    counted = jax.tree.map(lambda x: x + jnp.arange(3.0)[:, None], new_kv)
    written = kv_cache.write_next(cache, counted, jnp.array([2, 1]), jnp.array([3, 4]), **own)
    np.testing.assert_array_equal(written.keys[1][:, 0, :, 1], [[-1, -1, -1, 4], [-1, -1, -1, -1]])
    rows, places = jnp.array([[0, 1], [1, 2], [0, 1]]), jnp.array([2, 0, 4])
    written = kv_cache.put_tokens(cache, jax.tree.map(lambda x: x[:1], counted), rows, places, **own)
    np.testing.assert_array_equal(written.values[0][:, 1, :, 0], [[-1, -1, 2, -1], [3, -1, 2, -1]])
