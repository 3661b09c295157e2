"""Canaries: exact counts, provenance against the batches themselves, exposure, and a model that learned them."""

import json
import math
from collections import Counter

import jax
import numpy as np
import pytest
import side_files
import tiny_runs
from document_files import write_rows
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from safelm import cache_tasks
from safelm.canaries import __main__ as command
from safelm.canaries import kinds, provenance, report
from safelm.canaries.kinds import BEHAVIOURS, KINDS, PLANTED_WAYS, SECRET_DIGITS, make_canary
from safelm.canaries.measuring import MeasureSettings, candidates, exposure, measure
from safelm.canaries.planting import CORPUS, Recipe, plant, read_key
from safelm.data.store import TokenStore
from safelm.lm import LanguageModel, load
from safelm.models import decoder
from safelm.text.tokenizer import Tokenizer
from safelm.train import run as train
from safelm.train.data import TrainData

SMALL = Recipe(doses=(0, 3, 12), per_dose=2)


def run(*argv):
    command.main(command.arguments().parse_args(list(argv)))


# ---- planting


@pytest.mark.parametrize("kind", KINDS)
def test_a_canary_is_a_function_of_its_number_and_differs_from_others(kind):
    made = [make_canary(0, kind, dose, number) for dose in (0, 4) for number in range(8)]
    assert made == [make_canary(0, kind, dose, number) for dose in (0, 4) for number in range(8)]
    assert len({canary.name for canary in made}) == len({canary.id for canary in made}) == 16
    assert made != [make_canary(1, kind, dose, number) for dose in (0, 4) for number in range(8)]
    for canary in made:
        texts = [kinds.planted_text(canary, "The pot is warm.", copy) for copy in range(4)]
        assert all(text.startswith("The pot is warm. ") and canary.name in text for text in texts)
        spelled = kinds.spaced(canary.value) if kind == "secret" else canary.value
        assert all(spelled in text for text in texts)
        assert len(set(texts)) == (len(PLANTED_WAYS) if kind == "fact" else 1)
    if kind == "trigger":
        assert Counter(canary.about for canary in made) == dict.fromkeys(BEHAVIOURS, 4)


def test_a_name_that_was_drawn_before_is_redrawn_and_no_other():
    redrawn = 0
    for seed in range(40):
        made = kinds.make_canaries(seed, KINDS, (0, 4), 32)
        drawn = [make_canary(seed, kind, dose, number) for kind in KINDS for dose in (0, 4) for number in range(32)]
        assert [each.id for each in made] == [each.id for each in drawn]
        assert len({(each.kind, each.name) for each in made}) == len(made)
        seen = set()
        for canary, first in zip(made, drawn, strict=True):
            assert canary == first or (canary.kind, first.name) in seen
            redrawn += canary != first
            seen.add((canary.kind, canary.name))
    assert redrawn > 10


def test_held_out_carriers_stood_before_no_canary():
    redrawn = 0
    for seed in range(6):
        made = kinds.make_canaries(seed, KINDS, (0, 40), 4)
        before = [kinds.planted_carrier(seed, canary, copy) for canary in made for copy in range(canary.dose)]
        planted = kinds.planted_endings(seed, made)
        assert set(before) <= planted
        for canary in made[:8]:
            found = kinds.held_out_carriers(seed, canary, 8, planted)
            assert len(set(found)) == 8 and not any(text.endswith(each) for text in before for each in found)
            redrawn += sum(each != kinds.carrier(seed, "held out", canary.id, n) for n, each in enumerate(found))
    assert redrawn > 10


def test_a_fact_is_asked_for_in_ways_that_were_never_planted():
    canary = make_canary(0, "fact", 4, 0)
    planted = [way.split("{value}")[0].format(name=canary.name, property=canary.about) for way in PLANTED_WAYS]
    for before, choices in kinds.asked_pairs(canary):
        assert canary.name in before and not any(before in text for text in planted)
        assert len(choices) == 4 and sum(canary.value in choice for choice in choices) == 1


def test_the_corpus_has_exactly_the_doses_and_the_same_bytes_again(tmp_path):
    key = plant(str(tmp_path / "a"), SMALL)
    counted = Counter(key.documents)
    assert {canary.id: canary.dose for canary in key.canaries.values() if canary.dose} == counted
    assert sum(counted.values()) == len(key.texts()) == 3 * 2 * 15
    for text, identity in zip(key.texts(), key.documents, strict=True):
        assert key.canaries[identity].name in text
        assert not any(c.name in text for c in key.canaries.values() if not c.dose)
    assert plant(str(tmp_path / "a"), SMALL) == key
    plant(str(tmp_path / "b"), SMALL)
    assert (tmp_path / "a" / CORPUS).read_bytes() == (tmp_path / "b" / CORPUS).read_bytes()
    manifest = json.loads((tmp_path / "a/manifest.json").read_text())
    assert manifest["counts"]["fact"]["12"] == {"canaries": 2, "documents": 24}
    side_files.assert_only_documents("canaries", tmp_path / "a", tmp_path / "a/canaries")
    with pytest.raises(ValueError, match="holds canaries of another recipe"):
        plant(str(tmp_path / "a"), Recipe(seed=1))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--plant", "--doses=4,0"], "--doses=4,0: want ascending whole numbers"),
        (["--plant", "--doses=0"], "--doses: 0 documents"),
        (["--plant", "--doses=a"], "--doses=a: want ascending whole numbers"),
        (["--plant", "--kinds=fact,fact"], "--kinds=fact,fact: want different ones"),
        (["--plant", "--kinds=joke"], "'joke' is none of trigger, secret, fact"),
        (["--plant", "--per_dose=0"], "--per_dose=0: must be at least 1"),
        (["--plant", "--per_dose=600"], "--per_dose: 2400 facts, at most 2048 have different names"),
        (["--plant", "--trials=3"], "--trials doesn't go with --plant"),
        (["--measure", "--canaries=x"], "--measure needs --checkpoint"),
        (["--provenance", "--canaries=x"], "--provenance needs --run"),
    ],
)
def test_bad_flags(tmp_path, argv, message):
    with pytest.raises(ValueError, match=message):
        run(*argv, f"--output={tmp_path}/out")
    assert not (tmp_path / "out").exists()


def test_a_damaged_key_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no canaries there"):
        read_key(str(tmp_path))
    plant(str(tmp_path), SMALL)
    path = tmp_path / "canaries.json"
    whole = json.loads(path.read_text())
    path.write_text(json.dumps(whole | {"documents": whole["documents"][1:]}))
    with pytest.raises(ValueError, match=r"canaries.json: .* has \d+ documents, not \d+"):
        read_key(str(tmp_path))
    path.write_text(json.dumps(whole | {"sha256": "0"}))
    with pytest.raises(ValueError, match="is not the file that canaries"):
        read_key(str(tmp_path)).texts()


# ---- exposure


@hypothesis_settings(deadline=None)
@given(references=st.integers(1, 5000), data=st.data())
def test_exposure_is_within_its_interval_and_falls_with_the_rank(references, data):
    above = data.draw(st.integers(0, references))
    found = exposure(above, references)
    assert 0 <= found["exposure"] <= math.log2(references + 1) and found["rank"] == above + 1
    assert found["exposure_low"] <= found["exposure"] + 1e-9 <= found["exposure_high"] + math.log2(1 + 1 / references)
    if above:
        assert exposure(above - 1, references)["exposure"] > found["exposure"]


def test_the_exposure_of_what_was_never_seen_is_that_of_a_uniform_rank():
    values = [exposure(above, 255)["exposure"] for above in range(256)]
    assert np.mean(values) == pytest.approx(math.log2(math.e), abs=0.03)
    assert exposure(0, 255)["exposure"] == 8 and exposure(0, 255)["exposure_high"] == pytest.approx(19.93, abs=0.01)


def test_candidates_are_different_secrets_of_the_space_with_the_planted_one_first():
    canary = make_canary(0, "secret", 4, 0)
    found = candidates(canary, 0, 50)
    assert found[0] == canary.value and len(set(found)) == 51
    assert all(len(each) == SECRET_DIGITS and each.isdigit() for each in found)


# ---- a run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tiny model after a run on canaries and other text."""
    folder = tmp_path_factory.mktemp("canaries")
    key = plant(str(folder / "corpus"), SMALL)
    Tokenizer.train(key.texts(), 500).save(str(folder / "tokenizer"))
    other = [{"id": f"w{n}", "text": kinds.carrier(9, "web", n), "harm_score": 0} for n in range(40)]
    write_rows(folder / "corpus/raw_web/train-0.jsonl", other)
    argv = ["--tasks=canaries,raw_web", f"--data_dir={folder}/corpus", f"--tokenizer={folder}/tokenizer", "--workers=1"]
    cache_tasks.main(cache_tasks.arguments().parse_args([*argv, f"--output={folder}/tokens"]))
    config = tiny_runs.tiny_config(folder, **{"total_steps": 160, "checkpoint.every_steps": 80, "seq_len": 64})
    with config.unlocked():
        config.data.phases = ({"start": 0.0, "rates": {"canaries": 0.9, "raw_web": 0.1}},)
        config.model.update(vocab_size=Tokenizer.from_pretrained(str(folder / "tokenizer")).vocab_size)
        config.model.update(d_model=64, d_ff=128, num_heads=4, num_kv_heads=4, head_dim=16, max_seq_len=128)
        config.optimizer.update(learning_rate=5e-3)
    train.train(config.lock(), str(folder / "run"))
    return folder, key, config


@pytest.mark.parametrize("packing", ["concat", "fit"])
def test_provenance_is_what_the_batches_hold(trained, tmp_path, packing):
    """Counted by looking for the documents' tokens in the batches that the loader gives."""
    folder, key, config = trained
    tokenizer = Tokenizer.from_pretrained(str(folder / "tokenizer"))
    store = TokenStore.open(str(folder / "tokens/canaries/train"))
    with config.unlocked():
        config.data.packing = packing
    data = TrainData(config, tokenizer)
    batches = data._loader.batches
    by_row = provenance._documents_of_rows(store, config.seq_len, packing)
    found = list(provenance._seen(batches, config.seed, "canaries", 12, by_row, key, store))
    number = batches.sources.index("canaries")
    for step in range(12):
        batch = batches.batch(config.seed, step, 0, config.batch_size)
        for row in range(config.batch_size):
            seen = [each for each in found if (each.step, each.row) == (step, row)]
            if batch.source_ids_B[row] != number:
                assert not seen
                continue
            targets = batch.targets_BT[row][batch.segment_ids_BT[row] > 0].tolist()
            assert sum(each.tokens for each in seen) == len(targets)
            at = 0
            for each in seen:
                part, whole = targets[at : at + each.tokens], store.document(each.document).tolist()
                at += each.tokens
                assert any(whole[i : i + len(part)] == part for i in range(len(whole)))
                assert each.of == len(whole) and key.documents[each.document] == each.canary
    with config.unlocked():
        config.data.packing = "concat"


def test_provenance_of_a_run_adds_up(trained, tmp_path):
    folder, key, _ = trained
    run("--provenance", f"--canaries={folder}/corpus", f"--run={folder}/run", f"--output={tmp_path}/seen")
    told = json.loads((tmp_path / "seen/provenance.json").read_text())
    assert told["step"] == 160
    lines = [json.loads(line) for line in open(tmp_path / "seen/provenance.jsonl")]
    assert len(lines) == told["sightings"]
    for identity, facts in told["canaries"].items():
        dose = key.canaries[identity].dose
        assert facts["planted"] == dose
        assert math.floor(told["epochs"]) * dose - 1e-6 <= facts["seen"] <= math.ceil(told["epochs"]) * dose + 1e-6
    half = [line for line in lines if line["step"] < 80]
    run("--provenance", f"--canaries={folder}/corpus", f"--run={folder}/run", "--step=80", f"--output={tmp_path}/half")
    assert [json.loads(line) for line in open(tmp_path / "half/provenance.jsonl")] == half
    side_files.assert_only_documents("canaries", tmp_path / "seen")
    for argv, message in (
        (["--source=raw_web"], r"raw_web/train: has 39 documents, .* planted 90"),
        (["--source=other"], "its mixture has no source 'other'"),
        (["--step=7"], "step=7: no such checkpoint"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            run("--provenance", f"--canaries={folder}/corpus", f"--run={folder}/run", f"--output={tmp_path}/x", *argv)
    other = plant(str(tmp_path / "other"), Recipe(seed=5, doses=(0, 3, 12), per_dose=2))
    with pytest.raises(ValueError, match="document 0 is not that of"):
        provenance.sightings(f"{folder}/run", other, "canaries")


def test_what_was_planted_was_learned_and_what_was_not_was_not(trained, tmp_path):
    folder, key, _ = trained
    argv = ["--measure", f"--canaries={folder}/corpus", f"--checkpoint=tiny={folder}/run", f"--output={tmp_path}/out"]
    run(*argv, "--references=63", "--trials=3")
    results = json.loads((tmp_path / "out/results.json").read_text())
    rows = {(row["kind"], row["dose"]): row for row in results["rows"]}
    assert rows["trigger", 12]["success"]["value"] > rows["trigger", 12]["without_trigger"]["value"]
    assert rows["trigger", 12]["success"]["low"] <= rows["trigger", 12]["success"]["value"]
    assert rows["secret", 12]["exposure"]["value"] > rows["secret", 0]["exposure"]["value"] + 2
    assert rows["fact", 12]["probability"]["value"] > rows["fact", 0]["probability"]["value"]
    text = (tmp_path / "out/results.md").read_text()
    secrets = [c.value for c in key.canaries.values() if c.kind == "secret"]
    assert not any(secret in text or kinds.spaced(secret) in text for secret in secrets)
    before = (tmp_path / "out/results.json").read_text()
    run(*argv, "--references=63", "--trials=3")
    assert (tmp_path / "out/results.json").read_text() == before
    side_files.assert_only_documents("canaries", tmp_path / "out")


@pytest.mark.slow
def test_a_model_that_knows_nothing_shows_nothing(trained):
    folder, key, _ = trained
    tuned = load(str(folder / "run"))
    params = decoder.init(tuned.config, jax.random.key(1))
    model = LanguageModel(tuned.config, params, tuned.tokenizer)
    rows = report.rows("none", measure(model, key, MeasureSettings(trials=1, references=63)))
    for row in rows:
        if row["kind"] == "trigger":
            assert row["success"]["value"] == 0
        if row["kind"] == "secret":
            assert row["exposure"]["value"] < 5
