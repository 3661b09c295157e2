"""The classifier of words and n-grams: against a slow reference, as it is trained, and as it comes with the package."""

import json

import ngram_sets
import numpy as np
import pytest
from scoring_runs import rows_of

import safelm
from safelm import score as score_command
from safelm import train_classifier
from safelm.safety import ngrams
from safelm.safety.ngrams import features, levels, model, scorer
from safelm.safety.scorer import load_scorer

CONFIG = "configs/classifier_bundled.py"


def slow_hash(stretch: bytes) -> int:
    values = [int(value) for value in features.mixed(np.arange(1, 257, dtype=np.uint64) * np.uint64(features._BASE))]
    return sum(values[byte] * features._BASE**place for place, byte in enumerate(stretch)) % (1 << 64)


def slow_buckets(word: bytes, bits: int) -> list[int]:
    padded = b" " + word + b" "
    found = [slow_hash(word)]
    for size in (3, 4, 5):
        found += [slow_hash(padded[at : at + size]) + size for at in range(len(padded) - size + 1)]
    mixed = features.mixed(np.asarray([value % (1 << 64) for value in found], np.uint64))
    return [int(value) >> (64 - bits) for value in mixed]


def slow_value(weights, text: str, bits: int) -> float:
    """Word by word, window by window."""
    data, found, word = text.lower().encode(), [], b""
    for byte in data + b" ":
        if byte >= 128 or chr(byte) in "abcdefghijklmnopqrstuvwxyz0123456789'*$@":
            word += bytes([byte])
        elif word:
            found, word = [*found, word], b""
    number = max(-(-len(found) // 128), 1)
    windows = [[] for _ in range(number)]
    for place, word in enumerate(found):
        windows[place * number // len(found)].append(word)
    values = []
    for window in windows:
        buckets = [bucket for word in set(window) for bucket in slow_buckets(word, bits)]
        values.append(sum(int(weights[bucket]) for bucket in buckets) / max(len(buckets), 1) ** 0.5)
    return max(values)


def test_values_are_those_of_a_slow_reference_however_texts_are_batched(monkeypatch):
    weights = np.random.default_rng(0).integers(-127, 128, 1 << 10).astype(np.int8)
    rng = np.random.default_rng(1)
    texts = ["", " .. ", "A", "It's a CAFÉ, isn't it? \U0001f600", "nul\x00byte", "x" * 40]
    texts += [" ".join(rng.choice(ngram_sets.SAFE + ngram_sets.HARM, count)) for count in (1, 2, 127, 128, 129, 300)]
    expected = [-30, -30, *(0.25 + 0.5 * slow_value(weights, text, 10) for text in texts[2:])]
    found = model.NgramModel(weights, 0.5, 0.25)
    assert found.values(texts) == pytest.approx(expected, abs=1e-12)
    assert len(set(expected)) > 8
    assert list(found.values(texts[::-1])[::-1]) == list(found.values(texts))
    monkeypatch.setattr(model, "_KEPT_BITS", 1)  # nearly every word loses its slot to another one
    assert list(model.NgramModel(weights, 0.5, 0.25).values(texts)) == list(found.values(texts))


def test_a_long_text_is_as_harmful_as_its_worst_window():
    weights = np.zeros(1 << 12, np.int8)
    weights[slow_buckets(b"zorp", 12)] = 100
    found = model.NgramModel(weights, 1.0, 0.0)
    safe = "garden harbour " * 100_000
    short, long = found.values(["zorp " + "garden harbour " * 60, safe + "zorp " + safe])
    assert long > 0.9 * short > 0 and len(safe) > model._BLOCK_CHARACTERS


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a small model, and what it was trained with."""
    folder = tmp_path_factory.mktemp("ngrams")
    sources = ngram_sets.write_sources(folder)
    return train(folder / "model", sources), sources


def train(output, sources, *changes):
    given = [f"--set=ngrams.{change}" for change in ("bits=12", "steps=15", "page_folds=2", *changes)]
    argv = [f"--config={CONFIG}", f"--output={output}", *given, *(f"--data={source}" for source in sources)]
    train_classifier.main(train_classifier.arguments().parse_args(argv))
    return output


def test_training_again_gives_the_same_bytes_and_tells_no_folder(trained, tmp_path, capsys):
    folder, sources = trained
    again = train(tmp_path / "again", sources)
    data = (folder / scorer.FILE).read_bytes()
    assert (again / scorer.FILE).read_bytes() == data
    assert str(folder.parent).encode() not in data and b"harm_score:a.jsonl" in data
    measured = json.loads(capsys.readouterr().out)
    assert set(measured["left_out"]) == {"harm_score:a.jsonl", "harm_score:b.jsonl"}
    other = train(tmp_path / "other", sources, "l2=0.01")
    assert (other / scorer.FILE).read_bytes() != data


def test_a_trained_model_finds_harm_and_cuts_pages_as_the_prior_says(trained):
    folder, _ = trained
    found = load_scorer(f"classifier:{folder}")
    harmful, safe = found.score(["zorp vultox gravvim thrillo garden", " ".join(ngram_sets.SAFE)])
    assert harmful.score >= 3 and safe.score == 0
    assert harmful.details["unsafe_probability"] >= harmful.details["unsafe_probability_3"] > 0.5
    test = found.measured["test"]["harm_score:a.jsonl"]
    assert test["auroc_1"][0] > 0.9 and found.measured["left_out"]["harm_score:b.jsonl"]["auroc_3"][0] > 0.9
    assert sum(test["scores"]) == test["texts"] == int((found.held_out.source_N == 0).sum())


def test_levels_give_pages_each_score_as_often_as_the_prior_and_probabilities_that_agree():
    rng = np.random.default_rng(0)
    pages, value_n = rng.normal(-1, 1, 100_000), np.r_[rng.normal(-1, 1, 5000), rng.normal(1, 1, 5000)]
    target_n2 = np.repeat([[0.0, 0.0], [1.0, 1.0]], 5000, axis=0)
    found = levels.fit(value_n, target_n2, np.ones(10_000), pages, web_share=1.0)
    shares = np.bincount(found.scores(pages), minlength=6) / len(pages)
    assert shares == pytest.approx(levels.REFERENCE_SHARES, abs=2e-3)
    assert found.slopes[1] == pytest.approx(2, rel=0.05)  # log-odds of two normals two deviations apart
    assert found.probability(1, pages).mean() == pytest.approx(0.215, abs=1e-3)
    assert (found.probability(3, pages) <= found.probability(1, pages)).all()
    assert levels.Levels.from_json(json.loads(json.dumps(found.to_json()))) == found


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (slice(0, 2), "0 pages of safe:PATH"),
        (slice(2, 3), "0 texts of score 3 or more"),
    ],
)
def test_data_without_pages_or_without_harm_is_one_line(trained, tmp_path, sources, message):
    with pytest.raises(ValueError, match=message):
        train(tmp_path / "model", trained[1][sources])
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("change", ["bits=30", "l2=0", "web_share=2", "page_folds=1"])
def test_a_setting_out_of_its_range_is_one_line(trained, tmp_path, change):
    with pytest.raises(ValueError, match="ngrams"):
        train(tmp_path / "model", trained[1], change)


def damage(kind: str, data: bytes) -> bytes:
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    if kind == "flipped":
        return data[:-1] + bytes([data[-1] ^ 1])
    if kind in ("no levels", "other scale", "other version"):
        changes = {"no levels": {"levels": {}}, "other scale": {"scale": 1.0}, "other version": {"version": 0}}
        record = json.loads(header["__metadata__"]["record"]) | changes[kind]
        header["__metadata__"]["record"] = json.dumps(record)
    else:
        del header["__metadata__"]
    packed = json.dumps(header).encode()
    return len(packed).to_bytes(8, "little") + packed + data[8 + size :]


@pytest.mark.parametrize(
    "kind", ["gone", "cut", "empty", "flipped", "no levels", "other scale", "other version", "no header"]
)
def test_damaged_package_data_is_one_line(tmp_path, monkeypatch, kind):
    data = (scorer._FOLDER / scorer.FILE).read_bytes()
    bad = {"cut": data[: len(data) // 2], "empty": b""}
    if kind != "gone":
        (tmp_path / scorer.FILE).write_bytes(bad[kind] if kind in bad else damage(kind, data))
    monkeypatch.setattr(scorer, "_FOLDER", tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path}.*the installed package is damaged.*--scorers"):
        ngrams.load_bundled()


def test_options_of_a_spec_are_checked(trained):
    for spec in ("bundled?colour=1", f"classifier:{trained[0]}?backbone=x", "bundled?threshold_1=x", "bundle"):
        with pytest.raises(ValueError, match="scorer"):
            load_scorer(spec)
    strict, usual = load_scorer("bundled?threshold_1=1&threshold_3=1"), load_scorer("bundled")
    assert strict.thresholds == {1: 1, 3: 1} and strict.fingerprint != usual.fingerprint


def run_score(tmp_path, *flags):
    page = {"text": "The meadow by the river.", "id": "a"}
    (tmp_path / "web.jsonl").write_text("\n".join(json.dumps(page | {"id": name}) for name in "ab"))
    argv = [f"--input={tmp_path}/web.jsonl", f"--output={tmp_path}/out", "--workers=1", *flags]
    score_command.main(score_command.arguments().parse_args(argv))
    return json.loads((tmp_path / "out" / "manifest.json").read_text())


def test_scoring_without_a_scorer_takes_the_bundled_one_and_states_its_errors(tmp_path):
    manifest = run_score(tmp_path)
    (only,) = manifest["scorers"]
    assert (only["name"], only["spec"]) == ("bundled", "bundled") and manifest["safe_bound"] is None
    for area in only["measured"]["left_out"].values():
        assert 0.3 < area["auroc_1"][0] < 1
    assert all("flagged_1" in figures for figures in only["measured"]["test"].values())
    (row, _) = rows_of(tmp_path / "out", "score=0")
    assert (
        row["score_bundled"] == 0 and 0 < row["bundled_unsafe_probability_3"] < row["bundled_unsafe_probability"] < 0.5
    )


def test_in_an_ensemble_the_highest_score_counts(tmp_path):
    manifest = run_score(tmp_path, "--scorers=words=bundled,python:scorers_for_tests:LevelScorer")
    assert [s["name"] for s in manifest["scorers"]] == ["words", "level"]
    assert manifest["agreement"]["pairs"][0]["documents"] == 2


def test_from_python_the_bundled_scorer_needs_no_name():
    verdict = safelm.score("The meadow by the river.")
    assert verdict == safelm.score(["The meadow by the river."], "bundled")[0]
    assert verdict.score == 0 and safelm.score(" ").reason == "empty"


def test_the_bundled_weights_are_small_and_have_a_data_sheet():
    data = (scorer._FOLDER / scorer.FILE).read_bytes()
    sheet = (scorer._FOLDER / "DATASHEET.md").read_text()
    assert len(data) < 3 << 20
    for source in load_scorer("bundled").held_out.sources:
        assert source.partition(":")[2] in sheet, source
    assert ngrams.load_bundled().score(["garden"])[0].score == 0
