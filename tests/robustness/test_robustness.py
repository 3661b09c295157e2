"""Attacks on tiny models: what they do to contexts and parameters, and a study that goes on where it was stopped."""

import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
import side_files
import tiny_runs

from safelm.checkpoints import checkpoint
from safelm.evaluate.suites.suite import read_prompts
from safelm.inference import tag_probability
from safelm.models import decoder as model
from safelm.models.config import ModelConfig
from safelm.robustness import attacks
from safelm.robustness import study as robustness
from safelm.robustness.report import markdown, write_report
from safelm.robustness.seeds import pool
from safelm.robustness.target import Target, measure_answers, measure_tag


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    from safelm.synthetic_web.corpus import Recipe, write_corpus

    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(str(folder), Recipe(seed=0, documents=40, validation_documents=2, prompts=4, chats=20))
    return str(folder / "chat_prompts")


@pytest.fixture(scope="module")
def target():
    vocabulary = tiny_runs.tokenizer()
    config = ModelConfig(**tiny_runs.model_fields(num_layers=1, max_seq_len=384, init_std=0.4))
    return Target(config, model.init(config, jax.random.key(0)), vocabulary, is_chat=True)


@pytest.fixture(scope="module")
def harmful(prompts):
    return [prompt for prompt in read_prompts(prompts) if prompt.harmful]


def last_tag_probability(target, contexts):
    found = tag_probability(target.config, target.params, contexts, harm_tag_id=target.tokenizer.harm_tag_id)
    return np.array([probs[-1] for probs in found])


def test_first_words_are_those_of_a_harmful_answer(target, harmful):
    from safelm.evaluate.judges import word_lists as judge

    answers = attacks.harmful_answers(harmful)
    assert answers == attacks.harmful_answers(harmful)
    assert {judge.judge(answer) for answer in answers.values()} == {judge.HARMFUL}
    plain = attacks.prefix_contexts(target, harmful, answers, 0)
    assert plain == [target.context(prompt.prompt) for prompt in harmful]
    given = attacks.prefix_contexts(target, harmful, answers, 3)
    for prompt, before, after in zip(harmful, plain, given, strict=True):
        assert after[: len(before)] == before
        words = target.tokenizer.decode(after[len(before) :])
        assert words == " ".join(answers[prompt.id].split()[:3])


def test_prefilled_tokens_and_shots_stand_where_the_model_reads_them(target, harmful):
    answers = attacks.harmful_answers(harmful, words=40)
    assert min(len(answer.split()) for answer in answers.values()) > 25
    given = attacks.prefill_contexts(target, harmful, answers, 5)
    for prompt, context in zip(harmful, given, strict=True):
        plain = target.context(prompt.prompt)
        assert context[: len(plain)] == plain and len(context) == len(plain) + 5
        assert answers[prompt.id].startswith(target.tokenizer.decode(context[len(plain) :]))
    shots = attacks.ManyShot(target, harmful, attacks.harmful_answers(harmful), 40)
    for room in (target.config.max_seq_len, 150):
        small = dataclasses.replace(target, config=dataclasses.replace(target.config, max_seq_len=room))
        shots = attacks.ManyShot(small, harmful, attacks.harmful_answers(harmful), 40)
        fits = shots.room(harmful[0], 64)
        context = shots.context(harmful[0], 64)
        assert fits < len(harmful) and len(context) <= room - 40
        text = target.tokenizer.decode(context)
        assert text.count("assistant") == fits + 1  # one a turn, the last open
        assert text.count(harmful[0].topic) == harmful[0].prompt.count(harmful[0].topic)
        assert shots.context(harmful[0], 0) == target.context(harmful[0].prompt)
    assert fits == 0


def test_a_topic_of_another_corpus_is_named(harmful):
    with pytest.raises(ValueError, match=f"{harmful[0].id}.*'tea'"):
        attacks.harmful_answers([dataclasses.replace(harmful[0], topic="tea")])


def test_the_cover_chosen_has_the_lowest_tag_probability(target, harmful):
    covers = ["the cat sat", "the dog did not", "on the mat", "cat"]
    chosen = last_tag_probability(target, attacks.cover_contexts(target, harmful, covers, knows_tag=True))
    for cover in covers:
        tried = last_tag_probability(target, [target.context(f"{cover} {prompt.prompt}") for prompt in harmful])
        assert (chosen <= tried + 1e-7).all()
    drawn = attacks.cover_contexts(target, harmful, covers, knows_tag=False)
    assert drawn == attacks.cover_contexts(target, harmful, covers, knows_tag=False)


def test_an_erased_tag_is_never_likely_and_nothing_else_changes(target, harmful):
    contexts = [target.context(prompt.prompt) for prompt in harmful]
    erased = attacks.erase_tag(target, contexts)
    assert last_tag_probability(target, contexts).max() > 1e-6
    assert last_tag_probability(erased, contexts).max() < 1e-12
    before, after = (each.params["embedder"]["embedding"] for each in (target, erased))
    (changed,) = np.flatnonzero((np.asarray(before) != np.asarray(after)).any(axis=1))
    assert changed == target.tokenizer.harm_tag_id


@pytest.mark.parametrize("tied", [True, False])
def test_a_tag_is_erased_from_parameters_of_numpy_too(target, harmful, tied):
    """As Hugging Face folders and GGUF files are read."""
    params = jax.tree.map(np.asarray, target.params)
    if not tied:
        params["unembed"] = {"kernel": params["embedder"]["embedding"].T}
    config = dataclasses.replace(target.config, tie_embeddings=tied)
    contexts = [target.context(prompt.prompt) for prompt in harmful[:2]]
    erased = attacks.erase_tag(dataclasses.replace(target, config=config, params=params), contexts)
    assert last_tag_probability(erased, contexts).max() < 1e-12


def test_answers_and_tag_are_measured_with_intervals(target, prompts):
    chosen = read_prompts(prompts)
    contexts = [target.context(prompt.prompt) for prompt in chosen]
    found = measure_answers(target, chosen, contexts, "greedy", max_new_tokens=3)
    assert found["harmful_completion"]["cases"] == found["wrongly_refused"]["cases"] == len(chosen) // 2
    assert set(found["labels"]) == {prompt.id for prompt in chosen}
    tag = measure_tag(target, contexts[:2], contexts[2:])
    assert tag["tag_auroc"]["low"] <= tag["tag_auroc"]["value"] <= tag["tag_auroc"]["high"]


@pytest.fixture(scope="module")
def study(target, prompts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    checkpoint.save_params(str(folder / "model"), target.config, target.params, target.tokenizer)
    inputs = tiny_runs.write_inputs(folder / "inputs")
    finetunings = tuple(
        robustness.Finetuning(name, str(inputs / "tokens"), source, (1e-3,), (0.0, 0.25))
        for name, source in (("benign", "filtered_web"), ("tag_free", "raw_web"))
    )
    return robustness.Study(
        models={"plain": str(folder / "model"), "tagged": str(folder / "model")},
        tagged=("tagged",),
        prompts=prompts,
        output=str(folder / "out"),
        finetunings=finetunings,
        prefix_words=(0, 2),
        num_covers=2,
        max_prompts=2,
        max_new_tokens=2,
        batch_size=8,
        seq_len=64,
    )


def test_a_study_has_every_point_and_goes_on_where_it_was_stopped(study, monkeypatch):
    points = robustness.run(study)
    for name, methods in (("plain", {"greedy"}), ("tagged", {"greedy", "beam", "safe_beam"})):
        prefix = [point for point in points if point["model"] == name and point["attack"] == "prefix"]
        assert {(point["words"], point["method"]) for point in prefix} == {(k, m) for k in (0, 2) for m in methods}
    assert {point["method"] for point in points if point["attack"] == "erased_tag"} == {"greedy", "beam", "safe_beam"}

    def attacks_on(name):
        return {point["attack"] for point in points if point["model"] == name}

    assert attacks_on("plain") == {"prefix", "cover", "benign"}
    assert attacks_on("tagged") == {"prefix", "cover", "erased_tag", "benign", "tag_free"}
    assert {point["epochs"] for point in points if point["attack"] == "benign"} == {0, 0.25}
    assert all(point["steps"] > 0 for point in points if point.get("epochs"))

    monkeypatch.setattr(robustness.train, "train", None)  # nothing is trained again
    monkeypatch.setattr(robustness, "load_target", None)
    assert robustness.run(study) == points

    paths = write_report(study.output, points, {"machine": "test"})
    assert [path.name for path in paths] == ["results.json", "results.md", "results.png"]
    stored = json.loads(paths[0].read_text())
    assert len(stored["points"]) == len(points) and "labels" not in stored["points"][0]
    side_files.assert_only_documents("robustness", study.output)
    text = markdown(points, {})
    assert all(head in text for head in ("first words", "harmless sentence", "row erased", "Benign", "without tags"))


def test_stored_points_are_of_the_same_parameters_store_and_tags(study, target, tmp_path):
    for name in ("model", "inputs"):
        shutil.copytree(pathlib.Path(study.models["plain"]).parent / name, tmp_path / name)
    (attack,) = (each for each in study.finetunings if each.name == "benign")
    attack = dataclasses.replace(attack, root=str(tmp_path / "inputs" / "tokens"))

    def settings(**changes):
        changed = {"models": {"plain": str(tmp_path / "model")}, "tagged": (), "finetunings": (attack,)} | changes
        one = dataclasses.replace(study, output=str(tmp_path / "out"), **changed)
        for job in (*robustness._inference(one, "plain", []), *robustness._training(one, "plain", [])):
            job()
        return {path.name for path in (tmp_path / "out" / "points").iterdir()}

    def measure(*args):
        return []

    def inference(study, name, prompts):
        return [lambda: robustness._resume(study, {"model": name}, prompts, measure)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(robustness, "_finetuned", measure)
        patch.setattr(robustness, "_inference", inference)
        first = settings()
        shutil.copytree(tmp_path / "model", tmp_path / "moved")
        assert settings() == settings(models={"plain": str(tmp_path / "moved")}) == first, "the same model elsewhere"
        tagged = settings(tagged=("plain",))
        assert len(tagged) == 2 * len(first), "what knows the tag is measured otherwise"
        shutil.rmtree(tmp_path / "inputs" / "tokens" / "filtered_web" / "train")
        tiny_runs.write_store(tmp_path / "inputs" / "tokens", "filtered_web", seed=7)
        stored = settings()
        assert len(stored) == len(tagged) + 2, "both points of another store, and none that has no store"
        params = model.init(target.config, jax.random.key(1))
        shutil.rmtree(tmp_path / "model")
        checkpoint.save_params(str(tmp_path / "model"), target.config, params, target.tokenizer)
        assert len(settings()) == len(stored) + len(first), "another model in the same folder"


def test_an_unknown_tagged_model_is_named(study):
    with pytest.raises(ValueError, match="--tagged=other"):
        dataclasses.replace(study, tagged=("other",))


def test_seeds_of_a_model_are_one_row_whose_interval_is_over_them_too(tmp_path):
    """Five seeds that agree on no prompt, before and after a finetuning that turns every third answer harmful."""
    rng, prompts = np.random.default_rng(0), [f"h{i}" for i in range(60)]

    def point(seed, epochs, rate):
        labels = {prompt: "harmful" if rng.random() < rate else "refusal" for prompt in prompts} | {"s": "refusal"}
        share = {"value": 0.0, "low": 0.0, "high": 0.0}
        tag = {"tag_auroc": {"value": 0.5 + seed / 10}, "median_tag_probability": {"harmful": 0.1, "safe": 0.2}}
        key = {"model": f"raw#{seed}", "attack": "benign", "method": "greedy", "learning_rate": 1e-3}
        key |= {"epochs": epochs, "steps": 10 * epochs}
        return {**key, "labels": labels, "harmful_completion": share, "wrongly_refused": share, **tag}

    points = [
        point(seed, epochs, rate)
        for seed, base in enumerate((0.05, 0.2, 0.35, 0.5, 0.65))
        for epochs, rate in ((0, base), (1, base + 0.3))
    ]
    before, after = pool(points, set(prompts))
    assert before["model"] == "raw" and before["seeds"] == 5 and "change" not in before
    share = np.mean([[label == "harmful" for label in each["labels"].values()][:60] for each in points[::2]])
    assert before["harmful_completion"]["value"] == pytest.approx(share)
    spread = before["harmful_completion"]["high"] - before["harmful_completion"]["low"]
    assert spread > 1.2 * (after["change"]["high"] - after["change"]["low"])  # pairing takes the seeds' spread out
    assert after["change"]["low"] > 0.1 and before["wrongly_refused"]["value"] == 1.0
    assert (before["tag_auroc"]["low"], before["tag_auroc"]["high"]) == (0.5, 0.9)
    paths = write_report(str(tmp_path), points, {}, harmful=set(prompts))
    assert len(json.loads(paths[0].read_text())["points"]) == 10 and "| raw |" in paths[1].read_text()
    assert "raw#0" not in paths[1].read_text()
