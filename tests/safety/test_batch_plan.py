"""Batches by a budget of tokens: every chunk once, few programs, next to no padding, one result on any devices."""

import dataclasses
import itertools

import embedding_folders
import jax
import numpy as np
import pytest
import sequence_classifiers
from annotation_runs import annotate, rows
from document_files import write_rows

from safelm.safety import sequence_classifier
from safelm.safety.embedding import Embedder, batch_plan, chunking, load_backbone

TEXTS = ["w1 w2 w3", "", *(" ".join(f"w{(7 * i + k) % 40}" for i in range(4 + 9 * k)) for k in range(12))]


@pytest.mark.parametrize(("longest", "count"), [(256, 32), (512, 48), (2048, 96), (8192, 128)])
def test_there_are_as_many_programs_as_the_module_says(longest, count):
    buckets = batch_plan.bucket_lengths(longest)
    assert len(buckets) == count and buckets[-1] == longest and list(buckets) == sorted(set(buckets))
    assert f"| {longest:,} | {count} |" in batch_plan.__doc__
    for shorter, longer in itertools.pairwise(buckets):
        assert longer - shorter <= max(8, shorter / 16)


@pytest.mark.parametrize("longest", [1, 7, 8, 9, 100, 511, 700])
def test_the_longest_chunk_has_a_row_of_its_length(longest):
    buckets = batch_plan.bucket_lengths(longest)
    assert buckets[-1] == longest and all(length < longest for length in buckets[:-1])


@pytest.mark.parametrize("is_last", [True, False])
def test_every_chunk_is_in_one_batch_that_holds_it_or_left(is_last):
    rng = np.random.default_rng(0)
    buckets = batch_plan.bucket_lengths(300)
    for count in (0, 1, 5, 400):
        lengths = rng.integers(1, 301, count).tolist()
        batches, left = batch_plan.plan(lengths, buckets, lambda length: max(900 // length, 1), is_last=is_last)
        assert sorted([chunk for batch, _ in batches for chunk in batch] + left) == list(range(count))
        for batch, length in batches:
            assert length in buckets and max(lengths[chunk] for chunk in batch) <= length
            assert len(batch) <= max(900 // length, 1)
        assert not left or (not is_last and len(left) < 900 // 8 + 1)
        assert is_last or all(len(batch) == max(900 // length, 1) for batch, length in batches)


class LengthTokenizer(chunking.ChunkTokenizer):
    """Gives chunks of the lengths that stand in the text, as a tokenizer that cuts at `longest` would."""

    def chunks(self, texts, longest):
        for index, text in enumerate(texts):
            left = int(text)
            while left > 0:
                yield index, np.ones(min(left, longest), np.int32)
                left -= longest


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    embedding_folders.write(folder)
    return load_backbone(str(folder), max_tokens=32)


def web_lengths(count):
    """Tokens of web pages, as C4's are spread: half below 230, a tenth above 900, a long tail."""
    return np.maximum(np.random.default_rng(0).lognormal(np.log(230), 1.07, count).astype(int), 5)


@pytest.mark.parametrize(
    ("longest", "is_cut", "batch_tokens", "devices"),
    [
        *((longest, is_cut, 512, 1) for longest, is_cut in ((256, False), (512, False), (512, True), (2048, True))),
        *((longest, is_cut, 16_384, 1) for longest, is_cut in ((512, False), (512, True), (2048, True), (8192, True))),
        (512, False, 2048, 8),
        (512, True, 2048, 8),
    ],
)
def test_less_than_three_percent_is_padding(backbone, longest, is_cut, batch_tokens, devices):
    """Of pages by the batches that `safelm.score` makes of them; nothing is computed."""
    wide = dataclasses.replace(backbone, max_tokens=longest, tokenizer=LengthTokenizer(backbone.tokenizer.backend))
    embedder = Embedder(wide, batch_tokens=batch_tokens, devices=devices)
    embedder._at_once = 1
    embedder._programs[head] = lambda params, fn_params, tokens_BT, lengths_B: np.zeros((len(tokens_BT), 1))
    pages = [min(length, longest) if is_cut else length for length in web_lengths(30_000).tolist()]
    calls, characters = [[]], 0
    for page in pages:
        if characters >= embedder.batch_characters:
            calls, characters = [*calls, []], 0
        calls[-1].append(str(page))
        characters += 4 * page
    for call in calls[:-1] or calls:
        embedder.map_chunks(call, None, head)
    used = embedder.usage
    assert 1 - used["tokens"] / used["positions"] < 0.03
    assert used["programs"] <= len(embedder.buckets)


def head(_, x_BD):
    return x_BD


def test_chunks_wait_for_a_full_batch_and_come_back_in_their_place(backbone, monkeypatch):
    """Windows of few chunks: results are those of one window, and only the last batch of all isn't full."""
    wanted, wanted_C = Embedder(backbone, batch_tokens=64).embed(TEXTS * 5)
    monkeypatch.setattr("safelm.safety.embedding.embedder._LEAST_WINDOW", 1)
    monkeypatch.setattr("safelm.safety.embedding.embedder._WINDOW_BATCHES", 2)
    embedder, seen = Embedder(backbone, batch_tokens=64, devices=1), []
    real = embedder._padded
    monkeypatch.setattr(
        embedder, "_padded", lambda chunks, length: seen.append((len(chunks), length)) or real(chunks, length)
    )
    found, found_C = embedder.embed(TEXTS * 5)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    np.testing.assert_array_equal(found_C, wanted_C)
    assert sum(count < embedder.rows(length) for count, length in seen) <= 1 and len(seen) > 10


def test_a_classifier_gives_the_same_scores_on_a_mesh_of_any_size(tmp_path):
    sequence_classifiers.write(tmp_path)
    verdicts, logits = {}, {}
    for devices in (1, 3, 8, 0):
        scorer = sequence_classifier.load(str(tmp_path), max_length=32, devices=devices)
        assert scorer._embedder._mesh.size == (devices or jax.device_count())
        verdicts[devices] = scorer.score(TEXTS)
        logits[devices], _ = scorer.logits(TEXTS)
    fingerprints = {
        sequence_classifier.load(str(tmp_path), devices=n, batch_tokens=b).fingerprint for n, b in ((1, 0), (8, 64))
    }
    assert len(fingerprints) == 1
    for devices in (3, 8, 0):
        assert [verdict.score for verdict in verdicts[devices]] == [verdict.score for verdict in verdicts[1]]
        np.testing.assert_allclose(logits[devices], logits[1], atol=1e-5)


def test_the_command_annotates_the_same_on_one_device_and_on_eight(tmp_path):
    sequence_classifiers.write(tmp_path / "model")
    write_rows(tmp_path / "web.jsonl", [{"text": text} for text in TEXTS])
    found = {}
    for devices in (1, 8):
        spec = f"hf:{tmp_path}/model?max_length=32&devices={devices}&batch_tokens=64"
        annotate(tmp_path / f"out{devices}", tmp_path / "web.jsonl", scorers=spec)
        found[devices] = rows(tmp_path / f"out{devices}/web.parquet")
    for one, eight in zip(found[1], found[8], strict=True):
        assert one["harm_score"] == eight["harm_score"]
        assert [one[f"hf_probability_{k}"] for k in range(6)] == pytest.approx(
            [eight[f"hf_probability_{k}"] for k in range(6)], abs=1e-5, nan_ok=True
        ) or one["flags"] == "empty"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"devices": 9}, "devices=9: there are 8 here"),
        ({"devices": -1}, "devices=-1"),
        ({"batch_tokens": -5}, "batch_tokens=-5"),
    ],
)
def test_sizes_that_cannot_be_are_named(tmp_path, options, message):
    sequence_classifiers.write(tmp_path)
    with pytest.raises(ValueError, match=message):
        sequence_classifier.load(str(tmp_path), **options)
