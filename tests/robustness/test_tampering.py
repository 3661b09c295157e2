"""Tampering with tiny models: abliteration against projected activations, edits of weights, finetuning curves."""

import dataclasses
import functools
import gc
import re
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_decoders
import tiny_runs

from safelm.checkpoints.checkpoint import ARCHITECTURE_FIELDS
from safelm.models import attention, attention_kernels, decoder
from safelm.models.block import BlockWeights, block, embedded, rms_norm
from safelm.models.config import ModelConfig
from safelm.robustness.tampering import abliteration, weight_edits
from safelm.robustness.tampering.finetuning import Finetuner
from safelm.robustness.target import NotTriedError, Target
from safelm.text.tokenizer import Tokenizer

CONFIG = ModelConfig(**tiny_runs.model_fields(num_kv_heads=2, max_seq_len=64))
apply = jax.jit(decoder.apply, static_argnums=0)
PROMPTS = [[5, 6, 7, 8 + number] for number in range(4)]
OTHERS = [[40, 41 + number] for number in range(4)]


@pytest.fixture(scope="module")
def target():
    return Target(CONFIG, random_decoders.random_params(CONFIG), tiny_runs.tokenizer(), is_chat=False)


def logits_without(config, params, tokens_BT, unit_D):
    """Logits where the direction is taken out of the stream after the embedding and after every sublayer's output."""

    def project(x):
        return x - (x @ unit_D)[..., None] * unit_D

    positions_BT = jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None]
    rope = attention.rope_angles(config, positions_BT)
    visible = attention_kernels.what_is_visible("xla", tokens_BT.shape[1], None)
    x_BTD = project(embedded(config, jnp.take(jnp.asarray(params["embedder"]["embedding"]), tokens_BT, axis=0)))
    for i in range(config.num_layers):
        layer = jax.tree.map(lambda leaf, i=i: jnp.asarray(leaf[i]), params["layers"])
        of_attention, of_mlp = layer["attention"], layer["mlp"]
        weights = BlockWeights(
            heads=lambda x, of=of_attention: tuple(
                jnp.einsum("dnh,btd->btnh", of[name], x) for name in ("query", "key", "value")
            ),
            output=lambda x, of=of_attention: project(jnp.einsum("btnh,nhd->btd", x, of["output"])),
            gated=lambda x, of=of_mlp: (x @ of["gate"], x @ of["up"]),
            down=lambda x, of=of_mlp: project(x @ of["down"]),
            norms={name: layer[name]["scale"] for name in ("attention_norm", "mlp_norm")},
        )
        attend = functools.partial(attention_kernels.attend, "xla", visible=visible)
        x_BTD, _, _ = block(config, weights, x_BTD, rope, lambda q, k, v, attend=attend: attend(q, k, v))
    return decoder.unembed(config, params, rms_norm(config, x_BTD, jnp.asarray(params["final_norm"]["scale"])))


def test_projected_weights_are_projected_activations(target):
    direction_D = np.random.default_rng(3).normal(size=CONFIG.d_model)
    edited = abliteration.project_out(target, direction_D)
    assert CONFIG.tie_embeddings and not edited.config.tie_embeddings
    tokens_BT = jnp.asarray(PROMPTS)
    unit_D = jnp.asarray(direction_D / np.linalg.norm(direction_D), jnp.float32)
    found = apply(edited.config, edited.params, tokens_BT)
    np.testing.assert_allclose(found, logits_without(CONFIG, target.params, tokens_BT, unit_D), rtol=2e-4, atol=2e-4)
    assert np.abs(found - apply(CONFIG, target.params, tokens_BT))[..., : CONFIG.vocab_size].max() > 0.1
    for layer in (0, 1, CONFIG.num_layers):
        states = decoder.layer_states(edited.config, edited.params, tokens_BT, (layer,))[0]
        assert np.abs(states @ unit_D).max() < 1e-4


def test_the_layer_is_chosen_on_development_prompts_within_the_bound(target):
    means = abliteration.mean_states(target, PROMPTS) - abliteration.mean_states(target, OTHERS)
    by_hand = [
        np.mean([decoder.layer_states(CONFIG, target.params, jnp.asarray([p]), (1,))[0][0, -1] for p in some], 0)
        for some in (PROMPTS, OTHERS)
    ]
    np.testing.assert_allclose(means[1], by_hand[0] - by_hand[1], rtol=1e-4, atol=1e-5)
    asked = []

    def share(edited):
        asked.append(edited)
        return {1: 0.25, 2: 0.75}[len(asked)]

    found = abliteration.abliterate(target, PROMPTS, OTHERS, share, max_kl=100.0)
    assert (found.chosen.layer, found.chosen.harmful, len(found.candidates)) == (2, 0.75, CONFIG.num_layers)
    jax.tree.map(np.testing.assert_array_equal, found.target.params, asked[1].params)
    assert found.chosen.kl == pytest.approx(abliteration.divergence(target, found.target, OTHERS))
    strict = abliteration.abliterate(target, PROMPTS, OTHERS, lambda _: pytest.fail("asked"), max_kl=0.0)
    assert strict.chosen.kl == min(each.kl for each in strict.candidates) and strict.chosen.harmful is None
    assert abliteration.divergence(target, target, OTHERS) == pytest.approx(0.0, abs=1e-6)
    with pytest.raises(ValueError, match="same states"):
        abliteration.project_out(target, np.zeros(CONFIG.d_model))
    after = dataclasses.replace(target, config=dataclasses.replace(CONFIG, norms="after"))
    with pytest.raises(ValueError, match="norms='after'"):
        abliteration.project_out(after, np.ones(CONFIG.d_model))


def test_one_edited_model_is_in_memory_at_a_time(target):
    seen = []

    def share(edited):
        gc.collect()
        assert not any(model() for model in seen)
        seen.append(weakref.ref(edited))
        return 1 / len(seen)

    found = abliteration.abliterate(target, PROMPTS, OTHERS, share, max_kl=100.0)
    assert found.chosen.layer == 1 and len(seen) == CONFIG.num_layers > 1


def test_edits_of_weights(target):
    kernel = np.asarray(target.params["layers"]["mlp"]["up"])
    pruned = np.asarray(weight_edits.prune(target, 0.25).params["layers"]["mlp"]["up"])
    assert (pruned == 0).mean() == pytest.approx(0.25, abs=0.01)
    kept = pruned != 0
    np.testing.assert_array_equal(pruned[kept], kernel[kept])
    assert np.abs(kernel[~kept]).max() <= np.abs(kernel[kept]).min() + np.abs(kernel).max() * 0.2
    errors = []
    for bits in (3, 8):
        rounded = np.asarray(weight_edits.round_weights(target, bits).params["layers"]["mlp"]["up"])
        assert max(len(np.unique(rounded[0, :, column])) for column in range(4)) <= 2**bits - 1
        errors.append(np.abs(rounded - kernel).max() / np.abs(kernel).max())
    assert errors[1] < 1 / 254 + 1e-6 < errors[0]
    other = dataclasses.replace(target, params=jax.tree.map(lambda leaf: leaf + 1, target.params))
    merged = weight_edits.merge(target, other, 0.25)
    np.testing.assert_allclose(merged.params["layers"]["mlp"]["up"], kernel + 0.25, rtol=1e-5)
    tag = target.tokenizer.harm_tag_id
    table = weight_edits.delete_tag_row(target).params["embedder"]["embedding"]
    assert not np.asarray(table[tag]).any() and np.asarray(table[tag - 1]).any()
    small = dataclasses.replace(target, params={**target.params, "embedder": {"embedding": np.zeros((2, 2))}})
    with pytest.raises(ValueError, match="merging: embedder/embedding has shape"):
        weight_edits.merge(target, small, 0.5)
    with pytest.raises(ValueError, match="share of 1"):
        weight_edits.prune(target, 1)


def test_what_is_merged_has_one_architecture_however_it_is_computed(target):
    """A field that only says how to compute is no reason to leave merging out; others are named."""

    def other(**fields):
        return dataclasses.replace(target, config=dataclasses.replace(CONFIG, **fields))

    computing = {"remat": "full", "attention": "xla", "products": "xla", "init_std": 0.01, "max_seq_len": 999}
    for name, value in (computing | {"banned_ids": (3,), "dtype": "bfloat16"}).items():
        assert getattr(CONFIG, name) != value
        merged = weight_edits.merge(target, other(**{name: value}), 0.5)
        assert merged.config == CONFIG
        jax.tree.map(np.testing.assert_array_equal, merged.params, target.params)
    unlike = {"rope_theta": 5e5, "norms": "after", "rms_norm_eps": 1e-3, "tie_embeddings": False, "activation": "gelu"}
    assert unlike.keys() <= set(ARCHITECTURE_FIELDS)
    for name, value in unlike.items():
        here = re.escape(str(getattr(CONFIG, name)))
        with pytest.raises(NotTriedError, match=f"merging: {name} is {here} here and {value} in") as told:
            weight_edits.merge(target, other(**{name: value}), 0.5)
        assert not told.value.applies
    stranger = Tokenizer.train(["word other"] * 20, 300)
    with pytest.raises(NotTriedError, match="another vocabulary") as told:
        weight_edits.merge(target, dataclasses.replace(target, tokenizer=stranger), 0.5)
    assert not told.value.applies


@pytest.mark.parametrize("rank", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_curves_learn_what_they_are_given_and_begin_anew(target, rank):
    documents = [[9, 10, 11, 12, 13, 14] for _ in range(3)]
    tuner = Finetuner(target, OTHERS, batch_size=2, seq_len=8, rank=rank)
    settings = {"learning_rate": 3e-2, "seed": 0, "points": (0, 2, 6), "max_loss_increase": 10.0}
    points = list(tuner.curve(documents, **settings))
    assert [point.steps for point in points] == [0, 2, 6] and [point.tokens for point in points] == [0, 24, 72]

    def loss(model):
        logits = apply(model.config, model.params, jnp.asarray([[9, 10, 11, 12, 13]]))
        return -float(jax.nn.log_softmax(logits)[0, jnp.arange(5), jnp.arange(10, 15)].mean())

    losses = [loss(point.target) for point in points]
    assert losses == sorted(losses, reverse=True) and losses[2] < losses[0] - 0.5
    np.testing.assert_allclose(loss(points[0].target), loss(target), rtol=1e-5)
    again = list(tuner.curve(documents, **settings))
    jax.tree.map(np.testing.assert_array_equal, again[2].target.params, points[2].target.params)
    assert jax.tree.structure(points[2].target.params) == jax.tree.structure(target.params)


def test_rows_begin_as_the_models_texts_do(target):
    begun = dataclasses.replace(target, tokenizer=target.tokenizer.beginning_with([3]))
    for model, begin in ((target, target.tokenizer.eos_id), (begun, 3)):
        for safe in ([9, 10], [begin, 9, 10]):
            tuner = Finetuner(model, [safe], batch_size=1, seq_len=4)
            first = tuner._safe[0]
            assert first.inputs_BT.tolist() == [[begin, 9, 10, 0]] and first.targets_BT.tolist() == [[9, 10, 0, 0]]


def test_a_curve_stops_where_safe_text_suffers(target):
    tuner = Finetuner(target, OTHERS, batch_size=2, seq_len=8)
    wild = {"learning_rate": 1.0, "seed": 0, "points": (0, 1, 8)}
    points = list(tuner.curve([[9, 10, 11]], **wild, max_loss_increase=0.1))
    assert [point.steps for point in points] == [0]
    first = points[0].safe_loss
    calm = tuner.curve([[9, 10, 11]], learning_rate=1e-6, seed=0, points=(1,), max_loss_increase=0.1)
    assert [point.safe_loss for point in calm] == [pytest.approx(first, rel=1e-3)]
