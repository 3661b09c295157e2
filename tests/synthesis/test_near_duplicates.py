"""Near-duplicates and copies are found on disk as in memory, in memory that doesn't grow with the corpus."""

import gc
import itertools
import tracemalloc

import numpy as np
import pytest
from document_files import write_rows
from synthesis_runs import data, no_charts, rows_of, run

from safelm.io import hashed
from safelm.jobs import beam_runner
from safelm.jobs.file_shards import ShardJob
from safelm.jobs.output import OutputFolder
from safelm.safety.synthesis import census
from safelm.safety.synthesis.gates import duplicate_index
from safelm.safety.synthesis.gates.duplicate_index import DuplicateIndex
from safelm.safety.synthesis.gates.duplicates import Duplicates
from safelm.safety.synthesis.sources import Selection

HERE = beam_runner.Runner()


def signatures(rng, count, families):
    """Signatures of families whose members agree in none, some or all values."""
    first_FP = rng.integers(0, 1 << 32, (families, 128), dtype=np.uint32)
    found_NP = first_FP[rng.integers(0, families, count)]
    share_N = rng.choice([0.0, 0.1, 0.25, 0.3, 0.35, 0.5, 1.0], count)
    is_other_NP = rng.random((count, 128)) < share_N[:, None]
    found_NP[is_other_NP] = rng.integers(0, 1 << 32, int(is_other_NP.sum()), dtype=np.uint32)
    return found_NP


def decided(folder, pieces, threshold):
    """What an index decides of signatures that `pieces()` gives piece by piece: the number of the first like each."""
    total = sum(map(len, pieces()))
    with DuplicateIndex(str(folder), total, threshold) as index:
        for piece in pieces():
            index.add(piece)
        index.group()
        start = 0
        for piece in pieces():
            for number, cells in index.shared(start, start + len(piece)):
                first = index.first_like(cells, piece[number - start], f"é{number}")
                if first is not None:
                    yield number, int(first[1:])
            start += len(piece)


@pytest.mark.parametrize("seed", range(12))
def test_what_is_decided_on_disk_is_what_is_decided_in_memory(tmp_path, monkeypatch, seed):
    rng = np.random.default_rng(seed)
    monkeypatch.setattr(hashed, "PART_BYTES", (300, 5_000, 64 << 20)[seed % 3])
    monkeypatch.setattr(duplicate_index, "_FIRST_ROWS", 2)
    if seed % 2:  # as on macOS
        monkeypatch.delattr(duplicate_index.os, "posix_fallocate")
        monkeypatch.setattr(duplicate_index, "_ZEROS_AT_ONCE", 100)
    threshold = float(rng.choice([0.3, 0.5, 0.7, 0.9, 1.0]))
    whole_NP = signatures(rng, int(rng.integers(1, 500)), int(rng.integers(1, 40)))
    step = int(rng.integers(1, 90))
    pieces = [whole_NP[at : at + step] for at in range(0, len(whole_NP), step)]
    found = list(decided(tmp_path, lambda: pieces, threshold))
    seen = Duplicates(threshold)
    in_memory = ((number, seen.add(number, signature)) for number, signature in enumerate(whole_NP))
    assert found == [(number, first) for number, first in in_memory if first is not None]


def test_without_documents_there_are_no_near_duplicates(tmp_path):
    assert not list(decided(tmp_path, list, 0.7))
    with pytest.raises(ValueError, match=r"duplicate_threshold=0: must be"):
        DuplicateIndex(str(tmp_path), 1, 0)
    with pytest.raises(ValueError, match="at most 4294967295 can be compared"):
        DuplicateIndex(str(tmp_path), 1 << 32, 0.7)


def test_no_room_on_the_disk_is_an_error_that_names_the_file(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(duplicate_index.os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"No space left on device: .*members"):
        list(decided(tmp_path, lambda: [np.ones((3, 128), np.uint32)], 0.7))


@pytest.mark.parametrize("stop", ["first_like", "group"])
def test_a_run_stopped_while_it_compares_ends_as_if_it_had_not_been(tmp_path, monkeypatch, stop):
    no_charts(monkeypatch)
    rows = rows_of((1, 2, 3), 6)
    place = write_rows(tmp_path / "in.jsonl", [*rows, *(row | {"id": f"{row['id']}-copy"} for row in rows)])
    run(tmp_path / "whole", place, "--gate=duplicate_threshold=0.3")

    def stopped(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(DuplicateIndex, stop, stopped)
        run(tmp_path / "out", place, "--gate=duplicate_threshold=0.3")
    assert not (tmp_path / "out/_staging").exists() and not (tmp_path / "out/manifest.json").exists()
    run(tmp_path / "out", place, "--gate=duplicate_threshold=0.3")
    assert data(tmp_path / "out") == data(tmp_path / "whole")
    assert any(name.endswith("near_duplicates.rejected") for name in data(tmp_path / "out"))


def peak(work):
    """The most bytes (of numpy's arrays too) that are held at once."""
    gc.collect()
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(hashed, "PART_BYTES", 1 << 18)
    monkeypatch.setattr(hashed, "_BUFFER_BYTES", 1 << 18)
    monkeypatch.setattr(duplicate_index, "_AT_ONCE", 256)


def test_the_memory_of_near_duplicates_does_not_grow_with_the_corpus(tmp_path, small_parts):
    def work(count):
        def pieces():
            for at in range(0, count, 500):
                yield signatures(np.random.default_rng(at % 4_000), 500, 100)  # pieces repeat each other

        assert sum(1 for _ in decided(tmp_path / str(count), pieces, 0.7)) > count / 5

    list(decided(tmp_path / "first", lambda: [np.ones((2, 128), np.uint32)], 0.7))  # what is kept for all
    few, many = (peak(lambda count=count: work(count)) for count in (10_000, 25_000))
    assert few < 8 << 20 and many - few < 15_000 * 50  # bytes each; in memory they took 7 KB


# ---- copies


def shards(folder, sizes, identities):
    jobs = []
    for index, size in enumerate(sizes):
        rows = [{"text": f"x{next(identities)}", "harm_score": 1} for _ in range(size)]
        path = write_rows(folder / f"{index}.jsonl", rows) if rows else folder / f"{index}.jsonl"
        path.touch()
        jobs.append(ShardJob(index, f"train-{index:06d}", str(path)))
    return jobs


@pytest.mark.parametrize("part_bytes", [100, 64 << 20])
def test_all_but_the_first_of_equal_texts_are_copies(tmp_path, monkeypatch, part_bytes):
    monkeypatch.setattr(hashed, "PART_BYTES", part_bytes)
    rng = np.random.default_rng(0)
    numbers = rng.integers(0, 60, 210).tolist()
    for name in ("in", "out"):
        (tmp_path / name).mkdir()
    sizes = (50, 0, 1, 99, 60)
    jobs = shards(tmp_path / "in", sizes, iter(numbers))
    out = OutputFolder(str(tmp_path / "out"))
    counts = census.take(out, jobs, Selection("safeweb", (1,)), HERE, 1)
    seen, given, expected = set(), iter(numbers), []
    for size in sizes:
        own = list(itertools.islice(given, size))
        expected.append({row for row, number in enumerate(own, 1) if number in seen or number in own[: row - 1]})
        seen |= set(own)
    assert [set(census.copies(out, job)) for job in jobs] == expected
    assert counts == [size - len(own) for size, own in zip(sizes, expected, strict=True)]
    assert not list((tmp_path / "out/_staging").iterdir())


@pytest.mark.parametrize("part_bytes", [50, 64 << 20])
def test_two_rows_with_one_id_are_refused_with_both_places(tmp_path, monkeypatch, part_bytes):
    monkeypatch.setattr(hashed, "PART_BYTES", part_bytes)
    (tmp_path / "out").mkdir()
    ids = [f"a{number}" for number in range(40)]
    for name, more in (("0", []), ("1", ["a7", "a9"])):
        rows = [{"id": each, "text": "x", "harm_score": 1} for each in (more or ids)]
        write_rows(tmp_path / f"{name}.jsonl", rows)
    jobs = [ShardJob(index, f"train-{index}", str(tmp_path / f"{index}.jsonl")) for index in range(2)]
    with pytest.raises(ValueError, match=r"0.jsonl: row (8|10) and .*1.jsonl: row (1|2) have one id.*\(2 such pairs\)"):
        census.take(OutputFolder(str(tmp_path / "out")), jobs, Selection("safeweb", (1,)), HERE, 1)


def test_the_memory_of_the_census_does_not_grow_with_the_corpus(tmp_path, small_parts):
    def work(count):
        rng, out = np.random.default_rng(0), OutputFolder(str(tmp_path / str(count)))
        jobs = [ShardJob(index, f"train-{index:06d}", "none.jsonl") for index in range(count)]
        for job in jobs:
            hash_N = hashed.mixed(rng.integers(0, 1000 * count, 2_000).astype(np.uint64))
            path = tmp_path / "made.npy"
            np.save(path, np.array([np.arange(1, 2_001), hash_N, np.ones(2_000)], np.uint64))
            out.publish(str(path), census._file(job))
        assert sum(census.take(out, jobs, Selection("safeweb", (1,)), HERE, 1)) < 1_800 * count

    work(1)
    few, many = (peak(lambda count=count: work(count)) for count in (20, 100))
    assert few < 8 << 20 and many - few < 160_000 * 5  # bytes each; in memory they took 57
