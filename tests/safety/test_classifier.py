"""The classifier's parts: loss, training, calibration, maximum over chunks, splits, its folder."""

import dataclasses
import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import side_files

from safelm.models import decoder as model
from safelm.safety import classifier
from safelm.safety.classifier import calibration, checkpoint, head, metrics, ridge, training, tuning
from safelm.safety.classifier.head import HeadRecipe
from safelm.safety.classifier.targets import Targets
from safelm.safety.classifier.tuning import TuningRecipe
from safelm.safety.embedding import Backbone, chunking
from safelm.safety.scorer import load_scorer
from safelm.safety.scoring import columns
from safelm.synthetic_web import corpus
from safelm.text.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
LAYERS = 3


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train((corpus.draft(0, "train", i).text for i in range(100)), vocab_size=400)


def bag_of_tokens(tokenizer: Tokenizer, seed: int = 0) -> Backbone:
    """A backbone whose vector is the mean of its token embeddings: what words there are is all it tells."""
    tiny = tiny_backbone(tokenizer, seed=seed)
    table = np.random.default_rng(seed).normal(size=(tiny.config.padded_vocab_size, 256)).astype(np.float32)
    config = dataclasses.replace(tiny.config, d_model=256, num_layers=1)
    params = {"embedder": {"embedding": table}, "layers": jax.tree.map(lambda p: p[:1], tiny.params["layers"])}
    return dataclasses.replace(tiny, config=config, params=params, layers=(0,))


def tiny_backbone(tokenizer: Tokenizer, *, seed: int = 0, max_tokens: int = 64) -> Backbone:
    config = model.ModelConfig(
        vocab_size=tokenizer.vocab_size,
        num_layers=LAYERS,
        d_model=32,
        d_ff=64,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        max_seq_len=64,
        dtype="float32",
        init_std=0.3,
        scan_layers=False,
        remat="none",
        attention="xla",
    )
    return Backbone(
        name="tiny",
        spec={"source": "tiny"},
        fingerprint=f"tiny-{seed}",
        config=config,
        params=jax.tree.map(np.asarray, model.init(config, jax.random.key(seed))),
        tokenizer=chunking.of_decoder(tokenizer),
        layers=(),
        pooling="mean",
        is_normalized=False,
        max_tokens=max_tokens,
    )


@pytest.fixture(scope="module")
def backbone(tokenizer: Tokenizer) -> Backbone:
    return tiny_backbone(tokenizer)


def recipe(**changes) -> training.Recipe:
    base = training.Recipe(
        backbone={"source": "tiny"},
        head=HeadRecipe(solver="exact", standardize=True, l2=0.01),
        tuning=TuningRecipe(last_n=0, epochs=1, learning_rate=1e-3, batch_tokens=512),
        folds=3,
    )
    return dataclasses.replace(base, **changes)


@pytest.fixture(scope="module")
def bag(tokenizer: Tokenizer) -> Backbone:
    return bag_of_tokens(tokenizer)


@pytest.fixture(scope="module")
def trained(bag: Backbone, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("classifier") / "trained"
    training.train(recipe(), ["synthetic_web:300"], str(folder), backbone=bag)
    return folder


def test_logits_that_are_not_finite_give_no_score(trained: Path, bag: Backbone, monkeypatch):
    scorer = classifier.load(str(trained), bag)
    texts = ["a page", "another one", "a third"]
    before, real = scorer.score(texts), scorer.logits

    def broken(texts):
        logits_CL, text_C = real(texts)
        return np.where(text_C[:, None] == 1, np.nan, logits_CL), text_C

    monkeypatch.setattr(scorer, "logits", broken)
    found = scorer.score(texts)
    assert [verdict.score for verdict in found] == [before[0].score, None, before[2].score]
    assert found[0].details == before[0].details and found[1].details["n_chunks"] == 1
    assert np.isnan(found[1].details["unsafe_probability"]) and found[1].details.keys() == before[1].details.keys()


def blobs(count: int = 400, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Overlapping features of scores 0 and 4."""
    rng = np.random.default_rng(seed)
    scores = np.where(rng.random(count) < 0.3, 4, 0)
    return (rng.normal(size=(count, 5)) + 0.8 * (scores > 0)[:, None]).astype(np.float32), scores


def test_the_loss_of_unsafe_examples_is_multiplied_by_lambda():
    logits = np.random.default_rng(0).normal(size=(6, 6)).astype(np.float32)
    scores = np.array([0, 3, 0, 5, 1, 0])
    each = [float(head.weighted_loss(logits[i : i + 1], scores[i : i + 1], 1.0)) for i in range(6)]
    expected = np.mean([loss * (7.0 if score else 1.0) for loss, score in zip(each, scores, strict=True)])
    np.testing.assert_allclose(head.weighted_loss(logits, scores, 7.0), expected, rtol=1e-5)


@pytest.mark.parametrize("solver", ["adam", "exact", "ridge"])
def test_a_larger_lambda_finds_more_unsafe_texts_and_more_false_ones(solver: str):
    x, scores = blobs()
    found = {}
    for weight in (1.0, 30.0):
        params = head.fit(x, scores, HeadRecipe(solver, weight, epochs=20, learning_rate=1e-2, l2=1e-3))
        given = np.asarray(head.apply(params, x)).argmax(1)
        found[weight] = [m(1, scores, given).value for m in (metrics.recall_at, metrics.false_positive_rate)]
    assert found[30.0][0] > found[1.0][0] and found[30.0][1] > found[1.0][1]


def test_standardizing_is_folded_into_the_head():
    x, scores = blobs()
    shifted = x * np.array([1, 100, 1e-3, 1, 1], np.float32) + np.array([0, 50, 1, 0, 0], np.float32)
    plain, folded = (head.fit(v, scores, HeadRecipe("exact", l2=0.1, standardize=True)) for v in (x, shifted))
    logits, same = np.asarray(head.apply(plain, x)), np.asarray(head.apply(folded, shifted))
    np.testing.assert_allclose(jax.nn.softmax(logits), jax.nn.softmax(same), atol=0.01)
    assert logits.std() > 0.1


def test_the_exact_solver_is_at_the_optimum():
    x, scores = blobs()
    params = head.fit(x, scores, HeadRecipe("exact", 5.0, l2=0.1))
    mean_weight = np.mean(np.where(scores > 0, 5.0, 1.0))

    def loss(params):
        penalty = 0.05 * (params["kernel"] ** 2).sum()
        return head.weighted_loss(head.apply(params, x), scores, 5.0) / mean_weight + penalty

    gradient = jax.grad(loss)(params)
    assert max(float(abs(g).max()) for g in gradient.values()) < 1e-3


@pytest.mark.parametrize("dims", [4, 60], ids=["more texts than dimensions", "more dimensions than texts"])
def test_the_ridge_solver_is_the_weighted_least_squares_of_the_scores_order(dims: int):
    rng = np.random.default_rng(0)
    scores = rng.choice([0, 1, 3, 4, 5], 40)
    x = rng.normal(size=(40, dims)) + scores[:, None] * rng.normal(size=dims)
    weights = np.where(scores > 0, 3.0, 1.0)
    weights /= weights.mean()
    kernel, bias = ridge.fit(x, scores, weights, l2=0.5)
    number = np.searchsorted([0, 1, 3, 4, 5], scores)
    centred = x - np.average(x, axis=0, weights=weights)
    normal = centred.T @ (centred * weights[:, None]) + 0.5 * 40 * np.eye(dims)
    direction = np.linalg.solve(normal, centred.T @ (weights * (number - np.average(number, weights=weights))))
    step = kernel[:, 1] - kernel[:, 0]  # one direction for all scores, which rise in order
    np.testing.assert_allclose(step / np.linalg.norm(step), direction / np.linalg.norm(direction), atol=1e-6)
    value, expected = x @ direction, calibration.expected_score((x @ kernel + bias).astype(np.float32))
    assert (np.diff(expected[np.argsort(value)]) > -1e-5).all() and np.ptp(expected) > 1


def test_the_ridge_solver_left_out_values_are_those_of_fits_without_the_text():
    rng = np.random.default_rng(1)
    x, target, weights = rng.normal(size=(30, 3)), rng.normal(size=30), np.ones(30)
    _, _, left_out = ridge._least_squares(x, target, weights, 1e-9)
    for i in range(30):
        rest = np.arange(30) != i
        direction, offset, _ = ridge._least_squares(x[rest], target[rest], weights[rest], 1e-9)
        assert abs(x[i] @ direction + offset - left_out[i]) < 1e-6


def test_the_ridge_solver_needs_an_l2():
    x, scores = blobs()
    with pytest.raises(ValueError, match=r"head\.l2=0\.0: the ridge solver"):
        head.fit(x, scores, HeadRecipe("ridge"))


# --- tuning


def tune(backbone: Backbone, last_n: int | None, **changes):
    texts = [corpus.draft(0, "train", i) for i in range(24)]
    chunks = [next(backbone.tokenizer.chunks([t.text], backbone.max_tokens))[1] for t in texts]
    scores = np.asarray([t.score for t in texts])
    settings = TuningRecipe(last_n=last_n, epochs=2, learning_rate=1e-2, batch_tokens=512)
    measure = changes.pop("measure", lambda logits: (float(logits().std()), 0.0))
    first = jax.tree.map(np.asarray, head.init(backbone.dim))
    first["kernel"] = np.random.default_rng(0).normal(size=first["kernel"].shape).astype(np.float32)
    return tuning.tune(
        backbone, first, chunks, Targets.of_scores(scores), settings, 1.0, measure, chunks[:8], **changes
    )


def changed(before, after) -> dict[str, np.ndarray]:
    """For each parameter, along its first axis, whether any bit of it differs."""

    def flat(tree):
        return {jax.tree_util.keystr(p): np.asarray(v) for p, v in jax.tree_util.tree_leaves_with_path(tree)}

    before, after = flat(before), flat(after)
    assert before.keys() == after.keys()
    return {
        name: (before[name].view(np.uint32) != after[name].view(np.uint32)).reshape(len(before[name]), -1).any(1)
        for name in before
    }


def test_all_parameters_or_only_the_last_layers_are_trained(backbone: Backbone):
    params, _ = tune(backbone, None)
    everything = changed(backbone.params, params)
    assert all(rows.any() for rows in everything.values())
    params, _ = tune(backbone, 1)
    for name, rows in changed(backbone.params, params).items():
        if name.startswith("['layers']"):
            assert list(rows) == [False] * (LAYERS - 1) + [True], name
        else:
            assert rows.any() == name.startswith("['final_norm']"), name


def test_the_epoch_that_is_best_on_held_out_texts_is_kept(backbone: Backbone):
    seen = []

    def measure(logits):
        seen.append(logits())
        return (1.0 if len(seen) == 1 else 0.5, 0.0)

    params, final = tune(backbone, None, measure=measure)
    assert len(seen) == 2 and abs(seen[0] - seen[1]).max() > 1e-3
    texts = [corpus.draft(0, "train", i).text for i in range(8)]
    chunks = [next(backbone.tokenizer.chunks([t], backbone.max_tokens))[1] for t in texts]
    tokens = np.stack([np.pad(c, (0, backbone.max_tokens - len(c))) for c in chunks])
    pooled = backbone.pooled(
        jax.tree.map(jnp.asarray, params), jnp.asarray(tokens), jnp.asarray([len(c) for c in chunks])
    )
    np.testing.assert_allclose(head.apply(final, pooled), seen[0], atol=1e-4)


def test_tuning_goes_on_as_if_it_had_not_been_interrupted(backbone: Backbone):
    states = []
    whole = tune(backbone, None, on_epoch=states.append)
    resumed = tune(backbone, None, resume=jax.device_get(states[0]))
    assert not any(rows.any() for rows in changed(whole[0], resumed[0]).values())


def test_head_first_then_all_through_the_whole_command(backbone: Backbone, tmp_path: Path):
    run = recipe(tuning=TuningRecipe(last_n=None, epochs=1, learning_rate=1e-3, batch_tokens=512), held_out=0.4)
    record = training.train(run, ["synthetic_web:150"], str(tmp_path / "c"), backbone=backbone)
    loaded = classifier.load(str(tmp_path / "c"), backbone)
    assert record["measured"]["recall_1"]["value"] >= 0.9
    assert (tmp_path / "c" / checkpoint.BACKBONE_FILE).exists()
    assert list(tmp_path.iterdir()) == [tmp_path / "c"]  # nothing unfinished is left
    assert loaded.score(["a text"])[0].score in range(6)
    side_files.assert_only_documents("train_classifier", tmp_path)


# --- scoring


def test_frozen_training_learns_and_leaves_the_backbone_alone(bag: Backbone, trained: Path):
    config = checkpoint.read_config(str(trained))
    assert checkpoint.BACKBONE_FILE not in config["files"]
    assert config["training"]["measured"]["auroc_3"]["value"] > 0.8
    assert sum(config["training"]["data"]["by_score"].values()) == config["training"]["data"]["texts"]


def test_a_text_is_as_harmful_as_its_worst_chunk(bag: Backbone, trained: Path):
    scorer = classifier.load(str(trained), bag)
    assert pickle.loads(pickle.dumps(scorer.measured))["on"]  # worker processes and the manifest get it
    drafts = [corpus.draft(0, "validation", i) for i in range(40)]
    ranked = sorted((d.text for d in drafts), key=lambda t: scorer.score([t])[0].details["expected_score"])
    safe, harmful = " ".join(ranked[:10]), ranked[-1]
    chunks = list(bag.tokenizer.chunks([safe], bag.max_tokens))
    deep = f"{safe} {harmful * 2} {safe}"
    whole, without = scorer.score([deep, f"{safe} {safe}"])
    assert whole.details["n_chunks"] > 2 * len(chunks)
    assert whole.details["expected_score"] > without.details["expected_score"]
    logits, text = scorer.logits([deep, "short"])
    np.testing.assert_array_equal(text, [0] * whole.details["n_chunks"] + [1])
    assert whole.score == scorer.calibration.scores(logits[text == 0]).max()
    assert whole.details["unsafe_probability"] == scorer.calibration.probability(1, logits[text == 0]).max()


def test_kinds_of_harm_are_columns_beside_the_score(bag: Backbone, trained: Path, tmp_path: Path):
    _, _, head_params, fitted, config = checkpoint.read(str(trained), bag)
    beside = {"kinds_kernel": np.zeros((bag.dim, 2), np.float32), "kinds_bias": np.asarray([0.0, -2.0], np.float32)}
    beside["kinds_kernel"][:, 1] = head_params["kernel"][:, 5]
    whole, folder = {**head_params, **beside}, str(tmp_path / "kinds")
    checkpoint.save(folder, bag, whole, fitted, config["training"], kinds=("hate", "sexual"))
    scorer, plain = classifier.load(folder, bag), classifier.load(str(trained), bag)
    text = " ".join(corpus.draft(0, "validation", i).text for i in range(6))
    (verdict,), (without,) = scorer.score([text]), plain.score([text])
    assert verdict.details == without.details | {"hate": 0.5, "sexual": verdict.details["sexual"]}
    logits, _ = scorer.logits([text])
    assert len(logits) > 1 and verdict.details["sexual"] == pytest.approx(1 / (1 + np.exp(-logits[:, 7].max())))
    found = columns.probe([scorer])
    assert {found.types[f"classifier_{kind}"] for kind in ("hate", "sexual")} == {"float64"}
    assert scorer.fingerprint != plain.fingerprint
    checkpoint.save(f"{folder}-less", bag, head_params, fitted, config["training"], kinds=("hate",))
    with pytest.raises(ValueError, match=r"to 6 classes and 1 kinds"):
        classifier.load(f"{folder}-less", bag)
    checkpoint.save(f"{folder}-new", bag, whole, fitted, config["training"], kinds=("hate", "rudeness"))
    with pytest.raises(ValueError, match="field 'kinds' is not a list of hate, harassment"):
        classifier.load(f"{folder}-new", bag)


@pytest.mark.parametrize("scores", [(0, 0, 0), (5, 5, 4), (0, 1, 2)])
def test_labels_of_one_kind_only_are_one_clear_error(bag: Backbone, tmp_path: Path, scores: tuple[int, ...]):
    rows = [json.dumps({"text": f"text number {i}", "harm_score": score}) for i, score in enumerate(scores)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    with pytest.raises(ValueError, match=r"--data: texts by score are .*; needs some of score 0 and some of 3 or more"):
        training.train(recipe(), [f"harm_score:{tmp_path}/rows.jsonl"], str(tmp_path / "c"), backbone=bag)


def test_any_text_is_scored(bag: Backbone, trained: Path):
    scorer = classifier.load(str(trained), bag)
    verdicts = scorer.score(["", "\x00\ud800 \U0001f600", "x" * 20_000])
    assert [v.score in range(6) for v in verdicts] == [True] * 3
    assert len({tuple(v.details) for v in verdicts}) == 1
    assert scorer.score([]) == []


# --- the folder


def test_a_saved_classifier_scores_as_before(bag: Backbone, trained: Path, tmp_path: Path):
    first = classifier.load(str(trained), bag)
    config = checkpoint.read_config(str(trained))
    parts = checkpoint.read(str(trained), bag)
    checkpoint.save(str(tmp_path / "again"), bag, parts[2], parts[3], config["training"], tuned=parts[1])
    second = classifier.load(str(tmp_path / "again"), other_params(bag))
    texts = [corpus.draft(0, "validation", i).text for i in range(10)]
    assert first.score(texts) == second.score(texts)
    assert first.fingerprint != second.fingerprint  # one has the backbone's parameters with it


def other_params(bag: Backbone) -> Backbone:
    """The same fingerprint, other parameters: those in the folder count."""
    return dataclasses.replace(bag, params=jax.tree.map(lambda p: p + 1, bag.params))


def test_another_backbone_or_class_count_is_one_clear_error(
    tokenizer: Tokenizer, bag: Backbone, trained: Path, tmp_path: Path
):
    with pytest.raises(
        ValueError, match="trained on another backbone: tiny with fingerprint tiny-0, not tiny with tiny-1"
    ):
        classifier.load(str(trained), bag_of_tokens(tokenizer, seed=1))
    config = json.loads((trained / "config.json").read_text())
    for folder, changes, message in (
        ("classes", {"classes": 2}, "has 2 classes, where scores 0 to 5 need 6"),
        ("format", {"format": "other"}, "not a classifier's"),
        ("calibration", {"calibration": {}}, "calibration"),
        ("backbone", {"backbone": []}, "field 'backbone' is missing or no object"),
        ("spec", {"backbone": {"fingerprint": ""}}, "field 'backbone' has no spec"),
    ):
        (tmp_path / folder).mkdir()
        for file in trained.iterdir():
            (tmp_path / folder / file.name).write_bytes(file.read_bytes())
        (tmp_path / folder / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(ValueError, match=message):
            classifier.load(str(tmp_path / folder), bag)


def test_a_damaged_or_absent_classifier_is_one_clear_error(bag: Backbone, trained: Path, tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"no classifier there \(no config\.json\)"):
        load_scorer(f"classifier:{tmp_path}/nowhere")
    with pytest.raises(FileNotFoundError, match=r"its backbone is not there .*\?backbone=FOLDER says where"):
        load_scorer(f"classifier:{trained}")
    with pytest.raises(ValueError, match="no option 'batch'; there is backbone"):
        load_scorer(f"classifier:{trained}?batch=8")
    (tmp_path / "c").mkdir()
    for file in trained.iterdir():
        (tmp_path / "c" / file.name).write_bytes(file.read_bytes())
    data = bytearray((tmp_path / "c" / checkpoint.HEAD_FILE).read_bytes())
    data[-1] ^= 1
    (tmp_path / "c" / checkpoint.HEAD_FILE).write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        classifier.load(str(tmp_path / "c"), bag)
    with pytest.raises(ValueError, match="not empty"):
        training.train(recipe(), ["synthetic_web:20"], str(tmp_path / "c"), backbone=bag)


KILLED = """
import os, pathlib, signal, sys
import numpy as np
from safelm.safety.classifier import calibration, checkpoint
written = pathlib.Path.write_bytes
def write_and_die(path, data):
    if path.name == sys.argv[2]:
        written(path, data[: len(data) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    written(path, data)
pathlib.Path.write_bytes = write_and_die
class Backbone: spec, fingerprint, dim = {}, "", 2
values = {1: 0.5, 3: 0.5}
checkpoint.save(sys.argv[1], Backbone, {"kernel": np.zeros((2, 6)), "bias": np.zeros(6)},
                calibration.Calibration(values, values, values), {})
"""


@pytest.mark.parametrize("file", [checkpoint.HEAD_FILE, pytest.param(checkpoint.CONFIG_FILE, marks=pytest.mark.slow)])
def test_a_kill_while_writing_leaves_nothing_that_loads_or_stays(tmp_path: Path, file: str):
    def save(dies_at: str) -> int:
        command = [sys.executable, "-c", KILLED, str(tmp_path / "c"), dies_at]
        return subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}).returncode

    assert save(file) == -signal.SIGKILL
    with pytest.raises(FileNotFoundError, match="no classifier there"):
        classifier.load(str(tmp_path / "c"))
    assert not (tmp_path / "c").exists()
    assert save("nothing") == 0 and os.listdir(tmp_path) == ["c"]
