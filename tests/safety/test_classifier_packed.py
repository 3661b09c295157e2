"""Packed rows of chunks and the frozen layers' states kept on disk: the same as one chunk a row."""

import dataclasses
import json
from pathlib import Path

import embedding_folders
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs

from safelm.models import decoder as model
from safelm.safety.classifier import head, state_cache, tuning
from safelm.safety.classifier.state_cache import StateCache
from safelm.safety.classifier.targets import Targets
from safelm.safety.classifier.tuning import TuningRecipe
from safelm.safety.embedding import Backbone, load_backbone, packed

ROW = 32
LAYERS = 3


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Backbone:
    folder = tmp_path_factory.mktemp("bert")
    embedding_folders.write(folder, **embedding_folders.BERT, num_hidden_layers=LAYERS)
    return load_backbone(str(folder), max_tokens=ROW)


def decoder_of(bert: Backbone) -> Backbone:
    """A small decoder that pools an inner layer."""
    fields = tiny_runs.model_fields(vocab_size=64, num_layers=LAYERS, max_seq_len=ROW)
    config = model.ModelConfig(**fields, init_std=0.3, scan_layers=False, remat="none", attention="xla")
    params = jax.tree.map(np.asarray, model.init(config, jax.random.key(0)))
    return dataclasses.replace(bert, config=config, params=params, layers=(2, 3), pooling="mean")


def some_chunks(count: int = 11) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    lengths = [ROW, 1, 2, *rng.integers(3, 20, count - 3)]
    return [rng.integers(1, 30, length).astype(np.int32) for length in lengths]


def one_a_row(backbone: Backbone, chunks: list[np.ndarray]) -> np.ndarray:
    tokens = np.stack([np.pad(chunk, (0, ROW - len(chunk))) for chunk in chunks])
    lengths = jnp.asarray([len(chunk) for chunk in chunks])
    params = jax.tree.map(jnp.asarray, backbone.params)
    return np.asarray(backbone.pooled(params, jnp.asarray(tokens), lengths))


def of_rows(backbone: Backbone, chunks: list[np.ndarray], first: int = 0) -> np.ndarray:
    plan = packed.plan([len(chunk) for chunk in chunks], ROW)
    assert len(plan) < len(chunks) and sorted(i for row in plan for i in row) == list(range(len(chunks)))
    rows = packed.filled(plan, ROW, len(plan) + 1, lambda i: chunks[i])
    values, *where = (jnp.asarray(part) for part in (rows.values, rows.segments_BT, rows.positions_BT))
    params = jax.tree.map(jnp.asarray, backbone.params)
    x = backbone.stream(params, values, *where, first) if first else values
    found = np.asarray(backbone.pooled_rows(params, x, *where, first))
    out = np.full((len(chunks), backbone.dim), np.nan, np.float32)
    out[rows.chunk_BS[rows.chunk_BS >= 0]] = found[rows.chunk_BS >= 0]
    assert np.isfinite(found).all()
    return out


@pytest.mark.parametrize("kind", ["mean", "cls", "max", "last", "mean_last"])
def test_packed_chunks_are_pooled_as_if_each_had_a_row(bert: Backbone, kind: str):
    backbone = dataclasses.replace(bert, pooling=kind)
    chunks = some_chunks()
    np.testing.assert_allclose(of_rows(backbone, chunks), one_a_row(backbone, chunks), atol=2e-5)


@pytest.mark.parametrize("first", [1, 2])
def test_the_stream_of_the_frozen_layers_is_where_the_rest_goes_on(bert: Backbone, first: int):
    chunks = some_chunks()
    for backbone in (bert, decoder_of(bert)):
        assert backbone.frozen_layers(LAYERS - first) == first
        np.testing.assert_allclose(of_rows(backbone, chunks, first), one_a_row(backbone, chunks), atol=2e-5)


def test_rotary_positions_begin_anew_in_every_chunk(tmp_path: Path):
    embedding_folders.write(tmp_path, **embedding_folders.GTE, type_vocab_size=0)
    backbone = load_backbone(str(tmp_path), max_tokens=ROW)
    chunks = some_chunks()
    np.testing.assert_allclose(of_rows(backbone, chunks), one_a_row(backbone, chunks), atol=2e-5)


def test_states_are_computed_once_and_survive_an_interruption(bert: Backbone, tmp_path: Path, monkeypatch):
    chunks = some_chunks()
    StateCache(bert, 1, str(tmp_path)).fill(chunks[:5])
    index = next(tmp_path.glob("*/[!.]*.json"))
    (index.parent / ".writing-abc.json").write_text('{"keys"')
    again = StateCache(bert, 1, str(tmp_path))
    asked: list[int] = []
    real = packed.plan
    monkeypatch.setattr(state_cache.packed, "plan", lambda lengths, row: asked.extend(lengths) or real(lengths, row))
    again.fill([*chunks, chunks[0]])
    assert sorted(asked) == sorted(len(chunk) for chunk in chunks[5:])
    in_memory = StateCache(bert, 1)
    in_memory.fill(chunks)
    for chunk in chunks:
        assert again.states(chunk).shape == (len(chunk), bert.config.d_model)
        np.testing.assert_allclose(again.states(chunk), in_memory.states(chunk), atol=4e-3)
    index.write_text(json.dumps({"keys": [], "lengths": [3]}))
    with pytest.raises(ValueError, match=r"\.json: not a cache of token states; remove it"):
        StateCache(bert, 1, str(tmp_path))


def tuned(backbone: Backbone, targets: Targets, chunks: list[np.ndarray], states=None, **changes):
    settings = TuningRecipe(last_n=1, epochs=3, learning_rate=1e-2, batch_tokens=2 * ROW, schedule="linear", **changes)
    first = jax.tree.map(np.asarray, head.init(backbone.dim, len(targets.names)))
    seen: list[np.ndarray] = []

    def measure(logits):
        seen.append(logits())
        return (1.0 - 0.1 * len(seen), 0.0)

    tuning.tune(backbone, first, chunks, targets, settings, 2.0, measure, chunks, states=states)
    return seen


def labels(count: int) -> Targets:
    rng = np.random.default_rng(1)
    kinds = np.where(rng.random((count, 2)) < 0.5, np.nan, rng.integers(0, 2, (count, 2)))
    scores = rng.integers(0, 6, count)
    return Targets(scores, np.eye(6)[scores], kinds, np.ones(count), ("hate", "sexual"))


def test_training_from_kept_states_is_training(bert: Backbone):
    chunks, targets = some_chunks(), labels(11)
    states = tuning.frozen_states(bert, 1)
    assert states.layer == LAYERS - 1 and tuning.frozen_states(bert, None) is None
    kept, anew = tuned(bert, targets, chunks, states)[-1], tuned(bert, targets, chunks)[-1]
    np.testing.assert_allclose(kept, anew, atol=5e-3)
    assert np.abs(kept - kept.mean(0)).max() > 0.05
    found = [state_cache.embed(bert, chunks, s) for s in (states, None)]
    np.testing.assert_allclose(found[1], one_a_row(bert, chunks), atol=2e-5)
    np.testing.assert_allclose(found[0], found[1], atol=2e-3)


def test_training_ends_when_no_epoch_was_better_for_long_enough(bert: Backbone):
    assert [len(tuned(bert, labels(11), some_chunks(), patience=p)) for p in (1, 2, None)] == [2, 3, 3]


def test_a_kind_that_is_unknown_teaches_nothing():
    x, targets = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32), labels(8)
    unknown = dataclasses.replace(targets, kinds_NK=np.full((8, 2), np.nan))
    params = jax.tree.map(np.asarray, head.init(4, 2))
    gradients = [
        jax.grad(lambda p, t=t: head.joint_loss(p, x, *head.arrays(t, 1.0)))(params) for t in (targets, unknown)
    ]
    assert all(np.abs(gradients[0][name]).max() > 1e-3 for name in ("kinds_kernel", "kinds_bias", "kernel"))
    assert not np.abs(gradients[1]["kinds_kernel"]).any() and not np.abs(gradients[1]["kinds_bias"]).any()
    np.testing.assert_allclose(gradients[0]["kernel"], gradients[1]["kernel"])


def test_soft_labels_and_weights_pull_as_they_say():
    x = np.ones((2, 1), np.float32)
    votes = np.asarray([[0.25, 0, 0, 0.75, 0, 0], [0, 0, 0, 0, 0, 1.0]])
    for weights, expected in (([1, 0], votes[0]), ([1, 1], votes.mean(0)), ([3, 1], votes.T @ [0.75, 0.25])):
        targets = Targets(np.asarray([3, 5]), votes, np.zeros((2, 0)), np.asarray(weights, float))
        params = head.fit(x, targets, head.HeadRecipe("exact"))
        logits = np.asarray(head.apply(params, x[:1]))[0]
        np.testing.assert_allclose(np.asarray(jax.nn.softmax(logits)), expected, atol=0.01)
