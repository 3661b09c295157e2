"""`safelm.score --estimate`: a fair sample of a corpus, the shares of scores in it, what all of it would cost."""

import collections
import contextlib
import gzip
import json
import shutil

import numpy as np
import pytest
import scorers_for_tests
import side_files
from document_files import write_rows
from scoring_runs import make_rows

from safelm import documents, score
from safelm.safety.scoring import corpus_sample

SCORER = "python:scorers_for_tests:LevelScorer"


def estimate(output, *inputs, scorers=SCORER, **flags):
    argv = [f"--output={output}", f"--scorers={scorers}", *(f"--input={path}" for path in inputs)]
    argv += [f"--{name}={value}" for name, value in flags.items()]
    score.main(score.arguments().parse_args(argv))
    return json.loads((output / "estimate.json").read_text())


def draw(pattern, count, seed=0):
    wanted = {"text_column": "text", "id_column": "id", "max_chunks": 512, "seed": seed}
    return corpus_sample.draw(documents.find(str(pattern)), count, **wanted)


@pytest.fixture(scope="module")
def web(tmp_path_factory):
    """Files whose documents differ: harmless short ones in many, long harmful ones in one."""
    folder = tmp_path_factory.mktemp("web")
    for index in range(12):
        write_rows(folder / f"part-{index:02}.parquet", make_levels(60, 0, 40), row_group_size=15)
    write_rows(folder / "harmful.parquet", make_levels(120, 5, 400), row_group_size=15)
    write_rows(folder / "lines.jsonl", make_levels(180, 3, 100))
    write_rows(folder / "packed.jsonl.gz", make_levels(120, 1, 100))
    return folder


def make_levels(count, level, length):
    return [{"id": None, "text": f"level{level} number {at} ".ljust(length, "x")} for at in range(count)]


TRUE, ALL = {"0": 720, "1": 120, "2": 0, "3": 180, "4": 0, "5": 120}, 1140


def test_a_sample_larger_than_the_corpus_is_the_corpus_and_certain(web, tmp_path, capsys):
    report = estimate(tmp_path / "out", web, estimate=10_000)
    assert report["sample"]["is_all"] and report["sample"]["documents"] == ALL
    for level, many in TRUE.items():
        found = report["scores"][level]
        assert (found["count"], found["low"], found["high"]) == (many, many / ALL, many / ALL)
    assert report["documents"] == {"value": ALL, "low": ALL, "high": ALL}
    assert "These are all documents there are" in capsys.readouterr().out


def test_every_document_counts_as_much_whatever_file_it_lies_in(web, monkeypatch):
    """A dense file, a sparse one, row groups, ranges of lines and packed files: shares and counts over many seeds."""
    monkeypatch.setattr(corpus_sample, "RANGE_BYTES", 4000)
    found, totals, seeds = collections.Counter(), [], 40
    for seed in range(seeds):
        sample = draw(web, 80, seed)
        assert len(sample.texts) == 80 and not sample.is_all and sample.places <= 32
        for text, weight in zip(sample.texts, sample.weight_N, strict=True):
            found[text[5]] += weight / sample.weight_N.sum() / seeds
        totals.append(sum(total.documents.value for total in sample.totals))
    for level, many in TRUE.items():
        assert found[level] == pytest.approx(many / ALL, abs=0.04), level
    assert np.mean(totals) == pytest.approx(ALL, rel=0.05)


def test_intervals_hold_the_truth_about_as_often_as_they_say_although_files_are_alike_inside(web, monkeypatch):
    """Counted as independent documents they would be too narrow for documents that come in blocks."""
    monkeypatch.setattr(corpus_sample, "RANGE_BYTES", 4000)
    from safelm.safety.scoring.estimate import _shares

    held = wider = 0
    for seed in range(40):
        sample = draw(web, 80, seed)
        shares = _shares(sample, np.array([int(text[5]) for text in sample.texts]))
        held += shares["5"]["low"] <= 120 / ALL <= shares["5"]["high"]
        independent = 2 * 1.96 * np.sqrt(0.105 * 0.895 / 80)
        wider += shares["5"]["high"] - shares["5"]["low"] > independent
    assert held >= 34 and wider >= 30


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("common", "rare"), [((100, 60, 300), (100, 3, 300)), ((50, 60, 600), (50, 20, 40))], ids=["few rows", "few bytes"]
)
def test_shares_are_unbiased_and_covered_where_files_are_small(tmp_path, common, rare, count):
    """Files of many harmless documents beside files of few, or short, harmful ones, which have the larger weights."""
    from safelm.safety.scoring.estimate import _shares

    for level, (files, rows, length) in ((0, common), (5, rare)):
        for at in range(files):
            write_rows(tmp_path / f"{level}-{at:03}.jsonl", make_levels(rows, level, length))
    total = {level: files * rows for level, (files, rows, _) in ((0, common), (5, rare))}
    truth, held, values, documents_held = total[5] / sum(total.values()), 0, [], 0
    for seed in range(40):
        sample = draw(tmp_path, count, seed)
        share = _shares(sample, np.array([int(text[5]) for text in sample.texts]))["5"]
        held += share["low"] <= truth <= share["high"]
        values.append(share["value"])
        (found,) = sample.totals
        documents_held += found.documents.low <= sum(total.values()) <= found.documents.high
    error = np.std(values) / 40**0.5
    assert abs(np.mean(values) - truth) <= 3 * error + 0.003
    assert held >= 35 and documents_held >= 34


def test_of_very_many_files_some_are_looked_into_and_stand_for_the_others(web, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_sample, "MOST_FILES", 8)
    opened, real = set(), documents.open_parquet

    @contextlib.contextmanager
    def counted(path):
        opened.add(path)
        with real(path) as table:
            yield table

    monkeypatch.setattr(documents, "open_parquet", counted)
    totals = []
    for seed in range(30):
        opened.clear()
        sample = draw(web, 100, seed)
        assert len(opened) <= 8 and len(set(sample.cluster_N.tolist())) <= 8 and not sample.is_all
        totals.append(sum(total.documents.value for total in sample.totals))
    assert np.mean(totals) == pytest.approx(ALL, rel=0.15)


def test_a_seed_gives_one_sample_and_another_another(web):
    first = draw(web, 50)
    assert first.texts == draw(web, 50).texts != draw(web, 50, seed=1).texts


def test_only_what_is_drawn_is_read(tmp_path):
    """Of a large file of lines some megabytes, and no line before them for its number."""
    with open(tmp_path / "lines.jsonl", "w") as file:
        for at in range(60_000):
            file.write(json.dumps({"text": f"level1 {at} ".ljust(1000, "x")}) + "\n")
    sample = draw(tmp_path / "lines.jsonl", 64)
    assert sample.places == 32 and sample.read_bytes <= 32 << 20
    (total,) = sample.totals
    assert total.documents.value == pytest.approx(60_000, rel=0.02)
    assert total.documents.low <= 60_000 <= total.documents.high and "bytes * " in total.how


def test_unusable_rows_are_shares_too_and_nothing_quotes_a_text(tmp_path, capsys):
    rows = [*make_rows(30), {"id": "e", "text": " "}, {"id": "n", "text": None}, {"id": "u", "text": "unusable"}]
    write_rows(tmp_path / "web/rows.jsonl", rows)
    (tmp_path / "web/cut.jsonl").write_bytes(b'{"text": "level2"}\n{"text": "broken\n')
    report = estimate(tmp_path / "out", tmp_path / "web", estimate=100)
    counts = {name: found["count"] for name, found in report["scores"].items()}
    assert counts == {"0": 6, "1": 5, "2": 6, "3": 5, "4": 5, "5": 5, "3 or more": 15, "unscored": 1, "malformed": 2}
    printed = capsys.readouterr().out + (tmp_path / "out/estimate.json").read_text()
    assert "broken" not in printed and "Document 1 " not in printed


def test_hours_and_price_follow_from_the_numbers_beside_them(web, tmp_path, capsys):
    report = estimate(tmp_path / "out", web, estimate=300, chips=4, price_per_hour=2.5)
    cost, speed = report["cost"], report["speed"]
    for end in ("value", "low", "high"):
        characters = report["documents"][end] * report["characters_per_document"][end]
        assert cost["chip_hours"][end] == pytest.approx(characters / speed["characters_per_second"] / 3600)
        assert cost["hours"][end] == pytest.approx(cost["chip_hours"][end] / 4)
        assert cost["price"][end] == pytest.approx(cost["chip_hours"][end] * 2.5)
    assert speed["documents_per_second"] == pytest.approx(speed["documents"] / speed["seconds"])
    printed = capsys.readouterr().out
    assert "Price at 2.5 an hour each" in printed and "rows in the footers of all 13 files" in printed


def test_what_a_scorer_compiles_is_not_taken_for_its_speed(tmp_path, monkeypatch):
    """A batch during which something was compiled is scored again and timed then."""
    monkeypatch.setattr("safelm.safety.scoring.shard.BATCH_ROWS", 10)
    write_rows(tmp_path / "web.jsonl", make_rows(40))
    report = estimate(tmp_path / "out", tmp_path / "web.jsonl", scorers="python:test_estimate:Compiling", estimate=40)
    speed = report["speed"]
    assert speed["programs"] == 2 and speed["compiling_seconds"] >= 0.3 and speed["seconds"] < 0.3
    assert (speed["tokens"], round(speed["padding"], 6)) == (400, 0.2)


def test_a_stopped_estimate_goes_on_with_its_scores(web, tmp_path, monkeypatch):
    """What was scored is not scored again and gives the report of a run in one go; another sample begins anew."""
    monkeypatch.setattr("safelm.safety.scoring.shard.BATCH_ROWS", 10)
    monkeypatch.setattr("safelm.safety.scoring.estimate._PART_SECONDS", 0.0)
    whole = estimate(tmp_path / "whole", web, estimate=100)
    asked, real = [], scorers_for_tests.LevelScorer.score

    def score_until_stopped(scorer, texts):
        if len(texts) > 1 and len(asked) == 4:
            raise KeyboardInterrupt
        asked.extend([texts] if len(texts) > 1 else [])
        return real(scorer, texts)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("scorers_for_tests.LevelScorer.score", score_until_stopped)
        estimate(tmp_path / "out", web, estimate=100)
    kept = sum(len(json.loads(path.read_text())["scores"]) for path in (tmp_path / "out/parts").iterdir())
    assert kept == 40 and not (tmp_path / "out/estimate.json").exists()
    with contextlib.suppress(FileNotFoundError):
        assert not documents.find(str(tmp_path / "out"))
    shutil.copytree(tmp_path / "out", tmp_path / "other")
    (tmp_path / "out/parts/.writing-abc.json").write_text('{"of"')
    again = []
    monkeypatch.setattr(
        "scorers_for_tests.LevelScorer.score", lambda self, texts: again.extend(texts) or real(self, texts)
    )
    report = estimate(tmp_path / "out", web, estimate=100)
    assert len(again) == 60 and report["scores"] == whole["scores"]  # nothing twice
    assert report["speed"]["documents"] == whole["speed"]["documents"] and not (tmp_path / "out/parts").exists()
    estimate(tmp_path / "other", web, estimate=100, seed=1)
    assert len(again) == 60 + 100
    (tmp_path / "first/parts").mkdir(parents=True)
    (tmp_path / "first/parts/.writing-abc.json").write_text('{"of"')  # killed while it wrote its first part
    assert estimate(tmp_path / "first", web, estimate=100)["scores"] == whole["scores"]


class Compiling:
    """Takes a moment where a batch is the first or the third, as one that compiles does."""

    name, fingerprint = "compiling", "1"

    def __init__(self):
        self.usage = {"tokens": 0, "positions": 0, "programs": 0}
        self._seen = []

    def score(self, texts):
        from time import sleep

        from safelm.safety.scorer import Verdict

        if texts not in self._seen and len(texts) > 1:  # nothing twice
            self._seen.append(texts)
            if len(self._seen) in (1, 3):
                self.usage["programs"] += 1
                sleep(0.2)
        self.usage["tokens"] += 10 * len(texts)
        self.usage["positions"] += 125 * len(texts) // 10
        return [Verdict(0) for _ in texts]


def test_the_output_is_an_estimate_s_own_and_no_documents(web, tmp_path):
    out = tmp_path / "out"
    estimate(out, web, estimate=50)
    estimate(out, web, estimate=60)
    with contextlib.suppress(FileNotFoundError):
        assert not documents.find(str(out))
    assert side_files  # see tests/project: the manifest lists no file
    with pytest.raises(ValueError, match="it holds other files"):
        score.main(score.arguments().parse_args([f"--input={web}", f"--output={out}", f"--scorers={SCORER}"]))
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="other: it holds other files than an estimate"):
        estimate(tmp_path / "other", web, estimate=50)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"estimate": 0}, "--estimate=0: must be at least 1"),
        ({"estimate": 5, "chips": 0}, "--chips=0: must be at least 1"),
        ({"estimate": 5, "price_per_hour": -1}, "--price_per_hour=-1.0: must be a price"),
        ({"price_per_hour": 2}, "--price_per_hour goes with --estimate"),
        ({"estimate": 5, "workers": 2}, "--estimate runs in this process: leave out --runner, --workers"),
    ],
)
def test_flags_that_do_not_fit_are_one_line(web, tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        estimate(tmp_path / "out", web, **flags)
    assert not (tmp_path / "out").exists()


def test_a_damaged_file_or_one_without_text_is_named(tmp_path):
    write_rows(tmp_path / "web/part.jsonl", [{"id": "a", "body": "x"}] * 3)
    with pytest.raises(ValueError, match=r"part\.jsonl: .*'text'"):
        estimate(tmp_path / "out", tmp_path / "web", estimate=5)
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut/part.jsonl.gz").write_bytes(gzip.compress(b'{"text": "level1"}\n' * 900)[:-20])
    with pytest.raises(ValueError, match=r"part\.jsonl\.gz: damaged"):
        estimate(tmp_path / "out", tmp_path / "cut", estimate=5)
