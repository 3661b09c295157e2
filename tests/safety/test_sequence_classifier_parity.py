"""Sequence classifiers of every architecture against transformers, on random weights; packed rows."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import sequence_classifiers

from safelm.safety import sequence_classifier
from safelm.safety.embedding import encoder, encoder_config, load_backbone, relative_positions

TEXTS = (
    "w1 w2 w3",
    "",
    "w5",
    " ".join(f"w{(7 * i) % 40}" for i in range(60)),
    " ".join(f"w{i % 40}" for i in range(25)),
)


def theirs(model, backbone, texts):
    """The model's logits for the first chunk of each text."""
    torch = parity.module("torch")
    chunks = dict(reversed(list(backbone.tokenizer.chunks(texts, backbone.max_tokens))))
    with torch.no_grad():
        rows = [model(torch.tensor(chunks[i][None], dtype=torch.long)).logits[0] for i in range(len(texts))]
    return np.stack([row.numpy() for row in rows])


FIRST = ("bert", "deberta-v2", "modernbert")


@pytest.mark.parity
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        *((kind, {}) for kind in FIRST),
        *(pytest.param(kind, {}, marks=pytest.mark.slow) for kind in sequence_classifiers.KINDS if kind not in FIRST),
        *(
            pytest.param(kind, changes, marks=pytest.mark.slow)
            for kind, changes in (
                ("bert", {"labels": 2, "hidden_act": "gelu_new"}),
                ("deberta-v2", {"pooler_hidden_act": "tanh", "type_vocab_size": 2}),
                ("modernbert", {"classifier_pooling": "mean", "classifier_bias": True}),
                ("modernbert", {"num_hidden_layers": 3, "global_attn_every_n_layers": 1}),
            )
        ),
    ],
)
def test_logits_are_those_of_transformers(tmp_path, kind, changes):
    model = sequence_classifiers.write_by_transformers(tmp_path, kind, **changes)
    labels = {"labels": "LABEL_0:0;LABEL_1:5"} if changes.get("labels") == 2 else {}
    scorer = sequence_classifier.load(str(tmp_path), **labels)
    logits_CL, text_C = scorer.logits(TEXTS)
    assert text_C.tolist() == [0, 1, 2, 3, 4]
    wanted = theirs(model, load_backbone(str(tmp_path)), TEXTS)
    print(kind, "largest difference", np.abs(logits_CL - wanted).max(), "of logits up to", np.abs(wanted).max())
    assert np.ptp(wanted, axis=0).max() > 0.1  # texts differ, or nothing would be compared
    np.testing.assert_allclose(logits_CL, wanted, atol=1e-4)
    probabilities = np.exp(wanted) / np.exp(wanted).sum(1, keepdims=True)
    verdicts = scorer.score(TEXTS)
    if not labels:
        assert [v.score for v in verdicts] == wanted.argmax(1).tolist()
        found = [[v.details[f"probability_{i}"] for i in range(6)] for v in verdicts]
        np.testing.assert_allclose(found, probabilities, atol=1e-5)


@pytest.mark.parity
def test_modernbert_configs_of_transformers_4_are_read_too(tmp_path):
    sequence_classifiers.write_by_transformers(tmp_path, "modernbert")
    now = encoder_config.read_config(tmp_path)
    assert now.windows == (0, 4, 4, 0, 4) and (now.rope_theta, now.window_rope_theta) == (160_000.0, 10_000.0)
    old = {"global_attn_every_n_layers": 3, "global_rope_theta": 160000.0, "local_rope_theta": 10000.0}
    sequence_classifiers.change_config(tmp_path, layer_types=None, rope_parameters=None, **old)
    assert "layer_types" not in json.loads((tmp_path / "config.json").read_text())
    assert encoder_config.read_config(tmp_path) == now


@pytest.mark.parity
@pytest.mark.parametrize(("buckets", "reach"), [(256, 512), (8, 64), (32, 128)])
def test_buckets_of_relative_positions_are_those_of_transformers(buckets, reach):
    torch = parity.module("torch")
    deberta = parity.module("transformers.models.deberta_v2.modeling_deberta_v2")
    length = 2048
    at_T = torch.arange(length)
    wanted_TS = deberta.make_log_bucket_position(at_T[:, None] - at_T, buckets, reach).long() + buckets
    first, index_TS = relative_positions.rows_of(length, buckets, reach)
    np.testing.assert_array_equal(index_TS + first, wanted_TS.clamp(0, 2 * buckets - 1).numpy())


@pytest.mark.parametrize("kind", ["deberta", "modernbert"])
def test_packed_chunks_are_those_of_rows_of_their_own(kind):
    config = encoder_config.EncoderConfig(
        **{"vocab_size": 48, "num_layers": 4, "d_model": 16, "d_ff": 24, "num_heads": 2, "max_positions": 64},
        **{
            "deberta": {"relative_buckets": 8, "relative_reach": 64, "type_vocab_size": 0},
            "modernbert": {
                "rope_theta": 1000.0,
                "window_rope_theta": 100.0,
                "windows": (0, 3, 3, 0),
                "is_gated": True,
                "norms_first": True,
                "has_final_norm": True,
                "has_biases": False,
                "type_vocab_size": 0,
            },
        }[kind],
    )
    params = jax.tree.map(
        lambda p: p + 0.3 * np.random.default_rng(0).normal(size=p.shape), encoder.init(config, jax.random.key(0))
    )
    lengths = (20, 11)
    tokens_BT = jnp.asarray(np.random.default_rng(1).integers(0, 48, (2, 20)))
    alone = encoder.hidden_states(config, params, tokens_BT, jnp.asarray(lengths))[-1]
    row_1T = jnp.concatenate([tokens_BT[0, :20], tokens_BT[1, :11]])[None]
    segments_1T = jnp.asarray([[1] * 20 + [2] * 11])
    positions_1T = jnp.asarray([[*range(20), *range(11)]])
    together = encoder.packed_states(config, params, row_1T, segments_1T, positions_1T)[-1]
    np.testing.assert_allclose(together[0, :20], alone[0], atol=1e-4)
    np.testing.assert_allclose(together[0, 20:], alone[1, :11], atol=1e-4)
    later = encoder.hidden_states(config, params, tokens_BT.at[1, 11:].set(3), jnp.asarray(lengths))[-1]
    np.testing.assert_array_equal(later[1, :11], alone[1, :11])  # padding takes no part
