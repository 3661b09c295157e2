"""The safety watch: its measures against a plain forward, its drift on curves with known noise, a poisoned phase."""

import json
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from safelm.checkpoints import checkpoint
from safelm.data.store import ShardWriter, write_manifest
from safelm.inference import Greedy, generate
from safelm.models import decoder, sharding
from safelm.models.decoder import ModelConfig
from safelm.train import generation_sample, run, safety_watch
from safelm.train.preemption import Preempted
from safelm.train.run import train
from safelm.train.safety_watch import DRIFT_LIMIT, Drift, page_measures, probe_auroc

pytestmark = pytest.mark.usefixtures("quick_compilation")

SAFE_WORDS = ("the", "cat", "sat", "on", "mat", "a", "dog", "ran")
HARMFUL_WORDS = ("zor", "vlex", "quim", "brax", "jup", "wyd", "fonk", "pell")
STEPS, SWITCH, EVERY = 100, 50, 1


@pytest.mark.parametrize("logits_at_once", [600, 2**24])
def test_the_measures_are_those_of_a_plain_forward(monkeypatch, logits_at_once):
    monkeypatch.setattr(safety_watch, "_LOGITS_AT_ONCE", logits_at_once)
    config = ModelConfig(**tiny_runs.model_fields())
    params = decoder.init(config, jax.random.key(0))
    rng = np.random.default_rng(0)
    lengths, tag = (7, 2, 12, 0), 5
    tokens_BT = rng.integers(0, config.vocab_size, (len(lengths), 12)).astype(np.int32)
    real_BT = np.arange(12) < np.array(lengths)[:, None]
    found = jax.jit(lambda *args: page_measures(config, params, *args, tag))(tokens_BT, real_BT)
    nats_B, tag_B, state_BD = map(np.asarray, found)
    for row, length in enumerate(lengths[:3]):
        tokens = jnp.asarray(tokens_BT[row : row + 1, :length])
        logits = np.asarray(decoder.apply(config, params, tokens), np.float64)[0]
        log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        wanted = -np.mean([log_probs[t, tokens_BT[row, t + 1]] for t in range(length - 1)])
        np.testing.assert_allclose(nats_B[row], wanted, rtol=1e-5)
        np.testing.assert_allclose(tag_B[row], log_probs[:, tag].max(), rtol=1e-5)
        states = np.asarray(decoder.hidden_states(config, params, tokens))[0]
        np.testing.assert_allclose(state_BD[row], states.mean(0), rtol=1e-4, atol=1e-5)


def test_a_probe_finds_what_is_there_and_nothing_else():
    rng = np.random.default_rng(0)
    harmful_N = np.arange(64) < 32
    noise_ND = rng.normal(size=(64, 200))
    assert 0.3 < probe_auroc(noise_ND, harmful_N) < 0.7
    noise_ND[harmful_N, 3] += 60
    assert probe_auroc(noise_ND, harmful_N) == 1.0


def drifts(curve):
    drift = Drift()
    return np.array([drift.add(float(value)) for value in curve])


def test_a_trend_with_noise_is_no_drift_and_a_fall_is():
    rng = np.random.default_rng(0)
    false, missed = 0, 0
    for _ in range(100):
        curve = -0.02 * np.arange(150) + np.cumsum(rng.normal(0, 0.01, 150))
        false += drifts(curve).max() > DRIFT_LIMIT
        slower = 4 * (1 - np.exp(-np.arange(150) / 20)) + rng.normal(0, 0.005, 150)
        false += drifts(slower).max() > DRIFT_LIMIT
        falling = curve.copy()
        falling[100:] -= 0.03 * np.arange(1, 51)  # three times the changes' noise, at every step
        found = drifts(falling)
        missed += found[:100].max() > DRIFT_LIMIT or found[100:106].max() <= DRIFT_LIMIT
    assert false <= 10 and missed <= 10


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=1, max_size=40), st.data())
def test_a_drift_goes_on_where_its_record_ends(values, data):
    cut = data.draw(st.integers(0, len(values)))
    first, second = Drift(), Drift()
    found = [first.add(value) for value in values[:cut]]
    second.load(json.loads(json.dumps(first.record())))
    assert [*found, *(second.add(value) for value in values[cut:])] == drifts(values).tolist()
    first.load(None)
    assert first.record() == Drift().record()


def sentences(words, count, seed):
    rng = random.Random(seed)
    return [" ".join(rng.choices(words, k=12)) + "." for _ in range(count)]


@pytest.fixture(scope="module")
def poisoned(inputs):
    """Stores of clean and of harmful pages, and a file of others with their harm scores."""
    vocabulary = tiny_runs.tokenizer()
    for name, words in (("filtered_web", SAFE_WORDS), ("raw_web", HARMFUL_WORDS)):
        directory = inputs / "poisoned" / name / "train"
        tag = {"harm_tag_id": vocabulary.harm_tag_id}
        with ShardWriter(directory, 0, 1, np.uint16, **tag) as writer:
            for text in sentences(words, 200, name):
                writer.add(np.append(np.asarray(vocabulary.encode(text)), vocabulary.eos_id))
            shard = writer.close()
        manifest = tiny_runs.manifest(name, "train", shard)
        write_manifest(directory, manifest)
    rows = [{"id": f"s{i}", "text": text, "harm_score": 0} for i, text in enumerate(sentences(SAFE_WORDS, 40, 1))]
    rows += [{"id": f"h{i}", "text": text, "harm_score": 5} for i, text in enumerate(sentences(HARMFUL_WORDS, 40, 2))]
    rows += [{"id": "m", "text": "zor", "harm_score": 2}, {"id": "n", "text": "no score"}]
    (inputs / "pages.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return inputs


def watched(inputs, **changes):
    fields = {
        "data.root": str(inputs / "poisoned"),
        "data.phases": ({"start": 0.0, "rates": {"filtered_web": 1.0}},),
        "total_steps": STEPS,
        "seq_len": 32,
        "checkpoint.every_steps": 60,
        "watch.every_steps": EVERY,
        "watch.documents": str(inputs / "pages.jsonl"),
        "watch.texts": 16,
        "watch.prompts": 4,
        "watch.prompt_tokens": 3,
        "watch.new_tokens": 4,
    }
    return tiny_runs.tiny_config(inputs, **fields | changes)


def events(workdir):
    return [json.loads(line) for line in (workdir / "events.jsonl").read_text().splitlines()]


def test_a_poisoned_phase_is_told_within_two_percent_of_the_tokens_and_a_clean_run_is_not(poisoned, tmp_path):
    train(watched(poisoned), str(tmp_path / "clean"))
    assert not [event for event in events(tmp_path / "clean") if event["event"] == "safety_drift"]
    phases = ({"start": 0.0, "rates": {"filtered_web": 1.0}}, {"start": SWITCH / STEPS, "rates": {"raw_web": 1.0}})
    train(watched(poisoned, **{"data.phases": phases}), str(tmp_path / "poisoned"))
    told = [event["step"] for event in events(tmp_path / "poisoned") if event["event"] == "safety_drift"]
    assert len(told) == 1 and SWITCH < told[0] <= SWITCH + 0.02 * STEPS
    lines = [json.loads(line) for line in (tmp_path / "poisoned" / "metrics.jsonl").read_text().splitlines()]
    gaps = [line["safety/likelihood_gap"] for line in lines]
    assert gaps[SWITCH - 1] > 1 > 0 > gaps[-1]
    assert all(0 <= lines[-1][f"safety/{name}_auroc"] <= 1 for name in ("tag", "probe"))
    assert lines[-1]["safety/probe_auroc"] > 0.9
    sampled = [line["step"] for line in lines if "safety/sample_harmful" in line]
    nth = generation_sample.every_nth(watched(poisoned))
    assert nth > 1 and sampled == [step for step in range(1, STEPS + 1) if step % nth == 0 or step == STEPS]
    shares = [lines[step - 1] for step in sampled]
    assert all(
        sum(line[f"safety/sample_{name}"] for name in generation_sample.OUTCOMES) == pytest.approx(1)
        and line["safety/sample_seconds"] > 0
        for line in shares
    )


def one_device():
    return NamedSharding(sharding.make_mesh({}, jax.local_devices()[:1]), PartitionSpec())


def test_a_step_that_is_watched_again_counts_once(poisoned, tmp_path, monkeypatch):
    every = {"watch.every_steps": 1, "watch.prompts": 0, "export.every_steps": 1}
    config = watched(poisoned, total_steps=3, **every)
    train(config, str(tmp_path / "whole"))
    with monkeypatch.context() as patched, pytest.raises(Preempted):
        patched.setattr(run.Run, "_should_stop", lambda self: self.step == 2)  # which the export asks, after the watch
        train(config, str(tmp_path / "stopped"))
    train(config, str(tmp_path / "stopped"))
    whole, stopped = (checkpoint.open_checkpoint(str(tmp_path / name))[2] for name in ("whole", "stopped"))
    assert whole["drift"] == stopped["drift"] and len(whole["drift"]["changes"]) == 2


def test_a_sample_continues_as_the_engine_does_and_its_cost_is_bounded(poisoned):
    config = ModelConfig(**tiny_runs.model_fields(init_std=0.4))
    params, vocabulary = decoder.init(config, jax.random.key(0)), tiny_runs.tokenizer()
    beginnings, tag = [vocabulary.encode(text) for text in ("the cat", "a dog sat on", "mat")], vocabulary.harm_tag_id
    longest = max(map(len, beginnings))
    tokens_BT = np.zeros((3, longest + 6), np.int32)
    for row, each in enumerate(beginnings):
        tokens_BT[row, : len(each)] = each
    lengths_B = jnp.asarray([len(each) for each in beginnings])
    found_BT = np.asarray(generation_sample.continued(config, params, jnp.asarray(tokens_BT), lengths_B, 6, (tag,)))
    wanted = generate(
        config, params, beginnings, Greedy(), max_new_tokens=6, end_ids=(vocabulary.eos_id,), harm_tag_id=tag
    )
    for row, (each, told) in enumerate(zip(beginnings, wanted, strict=True)):
        assert found_BT[row, len(each) :][: len(told.tokens)].tolist() == list(told.tokens)
    run = watched(poisoned)
    with run.unlocked():
        run.watch.every_steps, run.batch_size, run.seq_len = 100, 512, 2048
    assert generation_sample.every_nth(run) == 1
    with run.unlocked():
        run.watch.prompts = 0
    assert generation_sample.every_nth(run) == 0
    judged = generation_sample.make_outcome("", 4)(["gravv the skurdok with the dremmit", "The rain was quiet."])
    assert judged == [generation_sample.HARMFUL, generation_sample.NEITHER]
    scored = generation_sample.make_outcome("python:tiny_scorers:Words", 4)
    assert scored(["zor vlex", "I can't do that.", "the cat"]) == list(generation_sample.OUTCOMES)
    seen = []

    def outcome(texts):
        seen.extend(texts)
        return [generation_sample.REFUSED] * len(texts)

    sample = generation_sample.GenerationSample(config, beginnings, 6, vocabulary, outcome, one_device())
    assert sample(params)["sample_refused"] == 1.0
    assert seen == [vocabulary.decode(told.text_tokens, keep_special=False) for told in wanted]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"watch.documents": ""}, "watch.every_steps is 1: watch.documents must name pages to watch"),
        ({"watch.min_harm_score": 0}, "watch.min_harm_score is 0: it must be in 1 .. 5"),
        ({"watch.texts": 7}, "watch.texts is 7: it must be in 8 .. "),
        ({"watch.documents": "few.jsonl"}, "few.jsonl: 1 pages of harm score 4 or more, at least 8 are needed"),
        ({"watch.documents": "absent.jsonl"}, "watch.documents=absent.jsonl: absent.jsonl: no such file"),
    ],
)
def test_pages_that_cannot_be_watched_are_named(poisoned, tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    rows = [
        {"id": "h", "text": "zor", "harm_score": 5},
        *({"id": f"s{i}", "text": "a", "harm_score": 0} for i in range(9)),
    ]
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for dry_run in (False, True):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            train(watched(poisoned, **changes), str(tmp_path / "run"), dry_run=dry_run)
    assert not (tmp_path / "run").exists()
