"""Small decoders with random weights: any part that is left out shows."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import tiny_runs
from safe_beam_reference import LanguageModel

from safelm.models import decoder as model

TINY = model.ModelConfig(
    vocab_size=300,
    num_layers=3,
    d_model=32,
    d_ff=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    init_std=0.2,  # large enough that attention matters
    dtype="float32",
)
UNTIED = dataclasses.replace(TINY, tie_embeddings=False)


@functools.cache
def random_params(config: model.ModelConfig):
    """Random parameters, made without a compiler; norm scales away from one, so that leaving a norm out would show."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        is_norm = path[-1].key == "scale"
        return jnp.asarray(is_norm + 0.2 * rng.standard_normal(leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, model.abstract_params(config))


def random_tokens(batch_size: int, length: int, seed: int = 1):
    return jax.random.randint(jax.random.key(seed), (batch_size, length), 0, TINY.vocab_size)


# ---- for decoding


def wild_model(vocab_size: int, max_seq_len: int):
    """A config, and weights so large that what is written goes on differently after every token."""
    config = model.ModelConfig(**tiny_runs.model_fields(vocab_size=vocab_size, max_seq_len=max_seq_len))
    rng = np.random.default_rng(1)
    return config, jax.tree.map(
        lambda leaf: rng.normal(0, 0.5, leaf.shape).astype(np.float32), model.abstract_params(config)
    )


EOS, TAG, VOCAB = 0, 49, 50
CONFIG = model.ModelConfig(
    vocab_size=VOCAB,
    num_layers=2,
    d_model=32,
    d_ff=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_seq_len=24,
    dtype="float32",
    tie_embeddings=False,
    init_std=0.35,
)
apply = jax.jit(functools.partial(model.apply, CONFIG))


def random_model(seed: int, *, eos_bias: float = 0.0, tag_bias: float = 0.0):
    """Random parameters, EOS and the tag made likelier, differently in every context."""
    params = model.init(CONFIG, jax.random.key(seed))
    kernel = params["unembed"]["kernel"]
    kernel = kernel.at[:, EOS].multiply(1 + eos_bias).at[:, TAG].multiply(1 + tag_bias)
    return {**params, "unembed": {"kernel": kernel}}


def full_model(params) -> LanguageModel:
    """log P(next | tokens) from one forward of the whole sequence, without a cache."""

    @functools.cache
    def cached(tokens: tuple[int, ...]) -> np.ndarray:
        padded = np.zeros((1, CONFIG.max_seq_len), np.int32)
        padded[0, : len(tokens)] = tokens
        logits = np.asarray(apply(params, padded))[0, len(tokens) - 1].astype(np.float64)
        return (logits - np.logaddexp.reduce(logits))[:VOCAB]

    return lambda tokens: cached(tuple(tokens))


def random_prompts(seed: int, count: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(1, TAG, size=rng.integers(1, 15)).tolist() for _ in range(count)]
