"""Token stores behind a URL give what the local ones give: by blocks, from copies, through damage, waits and kills.

The URLs are `file://` here; tests/io/test_gcs_faults.py has the same over HTTP.
"""

import contextlib
import gc
import logging
import multiprocessing
import os
import pickle
import time
from pathlib import Path

import numpy as np
import pytest
from token_stores import assert_equal_batches, write_store

from safelm.data import remote_shards
from safelm.data.arrays import BLOCK_BYTES
from safelm.data.loader import eval_batches, make_loader
from safelm.data.schedule import MixtureSchedule, Phase
from safelm.data.store import TokenStore
from safelm.io import cache, remote
from safelm.io.files import file_sha256


def documents(count: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [np.append(rng.integers(2, 900, rng.integers(20, 900)), 0) for _ in range(count)]


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """About 230,000 tokens in three shards: two to three blocks each."""
    return write_store(tmp_path_factory.mktemp("local") / "store", documents(500), num_shards=3)


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv(cache.CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def only_blocks(monkeypatch):
    """A cache with no room, and no shard small enough to be copied at once."""
    monkeypatch.setenv(cache.SIZE_VARIABLE, "0")
    monkeypatch.setattr(remote_shards, "_WHOLE_AT_ONCE_BYTES", 0)


@pytest.fixture
def in_background(monkeypatch):
    monkeypatch.setattr(remote_shards, "_WHOLE_AT_ONCE_BYTES", 0)


def url_of(store: TokenStore) -> str:
    return f"file://{store.directory}"


def moved(store: TokenStore, folder: Path) -> TokenStore:
    """A copy of a store that a test may damage."""
    folder.mkdir()
    for name in os.listdir(store.directory):
        (folder / name).write_bytes((Path(store.directory) / name).read_bytes())
    return TokenStore.open(folder)


def damage(path: str | Path) -> None:
    """Changes a byte in the middle; the size stays."""
    data = bytearray(Path(path).read_bytes())
    data[len(data) // 2] ^= 0xFF
    Path(path).write_bytes(data)


def batches(store: TokenStore, *, packing: str = "concat", steps: int = 6, **options):
    schedule = MixtureSchedule([Phase(0.0, {"web": 1.0})], batch_size=8, seq_len=64, total_steps=steps)
    return list(make_loader({"web": store}, schedule, seed=3, batch_size=8, seq_len=64, packing=packing, **options))


def assert_same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert_equal_batches(x, y)


@pytest.mark.parametrize("way", ["copied at once", "by blocks", "copied in the background"])
def test_everything_reads_as_from_the_local_store(local, way, request):
    if way != "copied at once":
        request.getfixturevalue("only_blocks" if way == "by blocks" else "in_background")
    store = TokenStore.open(url_of(local))
    assert store.manifest == local.manifest
    for start, stop in ((0, 5), (32_760, 32_780), (0, local.num_tokens), (local.num_tokens - 3, local.num_tokens + 9)):
        np.testing.assert_array_equal(store.tokens(start, stop), local.tokens(start, stop))
    for index in (0, 166, 167, 499):
        np.testing.assert_array_equal(store.document(index), local.document(index))
    for packing in ("concat", "fit"):
        assert_same(batches(store, packing=packing), batches(local, packing=packing))
    assert_same(*(list(eval_batches(s, batch_size=4, seq_len=64, max_batches=5)) for s in (store, local)))
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(store)).tokens(7, 99), local.tokens(7, 99))
    assert len(pickle.dumps(store)) < 5_000
    store.verify_checksums()


def test_empty_shards_and_uint32(tmp_path):
    small = write_store(tmp_path / "store", [[5, 0], [70_000, 0]], num_shards=4, vocab_size=70_001)
    store = TokenStore.open(url_of(small))
    assert store.tokens(0, 9).tolist() == [5, 0, 70_000, 0] and store.tokens(0, 9).dtype == np.uint32
    assert store.document(1).tolist() == [70_000, 0]
    store.verify_checksums()


def test_the_first_batch_reads_a_few_blocks_and_copies_no_shard(local, only_blocks, monkeypatch, cache_folder):
    asked = []
    original = remote.read_ranges
    monkeypatch.setattr(remote, "read_ranges", lambda ranges: asked.append(list(ranges)) or original(ranges))
    store = TokenStore.open(url_of(local))
    assert not asked
    (batch,) = batches(store, steps=1)
    assert batch.inputs_BT.shape == (8, 64)
    tokens = [ranges for ranges in asked if "tokens-" in ranges[0][0]]
    assert len(tokens) == 1  # all rows' blocks at once
    assert sum(stop - start for _, start, stop in tokens[0]) <= 8 * 2 * BLOCK_BYTES
    assert not [path for path in cache_folder.rglob("*.npy*")]


def wait_for(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_shard_that_was_read_from_comes_to_the_cache_in_the_background(local, tmp_path, in_background, cache_folder):
    source = moved(local, tmp_path / "source")
    store = TokenStore.open(url_of(source))
    store.tokens(0, 10)
    wait_for(lambda: list(cache_folder.rglob("tokens-00000-*.npy")) and not list(cache_folder.rglob("*.part")))
    assert not list(cache_folder.rglob("tokens-00001-*"))
    (Path(source.directory) / "tokens-00000-of-00003.npy").unlink()
    first = local.manifest.shards[0].num_tokens
    wait_for(lambda: store._remote.whole("tokens", 0) is not None)
    np.testing.assert_array_equal(store.tokens(0, first), local.tokens(0, first))


def test_a_damaged_shard_is_named_after_it_was_fetched_again(local, tmp_path, only_blocks, monkeypatch):
    source = moved(local, tmp_path / "source")
    damage(Path(source.directory) / "tokens-00001-of-00003.npy")
    store = TokenStore.open(url_of(source))
    np.testing.assert_array_equal(store.document(0), local.document(0))
    named = r"source/tokens-00001-of-00003\.npy: damaged between bytes \d+ and \d+: wrong checksum \(fetched twice\)"
    with pytest.raises(ValueError, match=named):
        store.tokens(0, store.num_tokens)
    monkeypatch.delenv(cache.SIZE_VARIABLE)
    with pytest.raises(ValueError, match=r"source/tokens-00001-of-00003\.npy: damaged: checksum .* \(fetched twice\)"):
        TokenStore.open(url_of(source), verify_checksums=True)
    for name, room in (("other", "0"), ("third", "1")):  # into memory, into the cache
        monkeypatch.setenv(cache.SIZE_VARIABLE, room)
        source = moved(local, tmp_path / name)
        damage(Path(source.directory) / "bounds-00002-of-00003.npy")
        with pytest.raises(ValueError, match=rf"{name}/bounds-00002-of-00003\.npy: damaged: checksum"):
            TokenStore.open(url_of(source)).document(499)


def test_a_copy_that_is_found_damaged_in_the_background_stops_the_next_read(local, tmp_path, in_background):
    source = moved(local, tmp_path / "source")
    damage(Path(source.directory) / "tokens-00000-of-00003.npy")
    store = TokenStore.open(url_of(source))
    store.tokens(0, 10)  # a block that is whole

    def fails() -> bool:
        with contextlib.suppress(ValueError):
            store.tokens(0, 10)
            return False
        return True

    wait_for(fails)


@pytest.mark.parametrize("way", ["copied at once", "by blocks"])
def test_damage_on_the_way_is_mended_by_fetching_again(local, way, request, monkeypatch):
    if way == "by blocks":
        request.getfixturevalue("only_blocks")
    original, spoiled = remote.read_ranges, []

    def spoil_once(ranges):
        found = original(ranges)
        if ranges[0][0] not in spoiled:
            spoiled.append(ranges[0][0])
            found[0] = bytes(len(found[0]))
        return found

    store = TokenStore.open(url_of(local))
    monkeypatch.setattr(remote, "read_ranges", spoil_once)
    np.testing.assert_array_equal(store.tokens(0, 50_000), local.tokens(0, 50_000))
    assert any("tokens-" in url for url in spoiled)
    assert any("sums-" in url for url in spoiled) == (way == "by blocks")


def test_a_damaged_copy_is_fetched_again(local, cache_folder, caplog):
    store = TokenStore.open(url_of(local), verify_checksums=True)
    copies = [next(cache_folder.rglob(f"{kind}-00001-*.npy")) for kind in ("tokens", "bounds", "sums")]
    for copy in copies:
        damage(copy)
    os.truncate(next(cache_folder.rglob("tokens-00002-*.npy")), 50)
    with caplog.at_level(logging.WARNING):
        again = TokenStore.open(url_of(local))
        np.testing.assert_array_equal(again.tokens(0, 10**9), local.tokens(0, 10**9))
        assert_same(batches(again), batches(local))
    assert sum("is damaged; fetching it again" in message for message in caplog.messages) == 3
    assert file_sha256(str(copies[0])) == local.manifest.shards[1].files["tokens"].sha256
    assert again.directory == store.directory


def test_missing_and_cut_files_are_named_when_the_store_is_opened(local, tmp_path):
    source = moved(local, tmp_path / "source")
    path = Path(source.directory) / "sums-00002-of-00003.npy"
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"source/sums-00002-of-00003\.npy: shard is missing"):
        TokenStore.open(url_of(source))
    path.write_bytes(b"1")
    with pytest.raises(ValueError, match=r"source/sums-00002-of-00003\.npy: truncated or replaced: 1 bytes"):
        TokenStore.open(url_of(source))


def obtain(folder: str, name: str, payload: bytes, sha256: str, log: str, *, die: bool = False) -> None:
    """What one of several processes does; notes each download in the log."""

    def download(file) -> None:
        with open(log, "a") as notes:
            notes.write("x")
        file.seek(0)
        file.write(payload[: len(payload) // 2])
        file.flush()
        time.sleep(0.3)
        if die:
            os._exit(9)
        file.write(payload[len(payload) // 2 :])
        file.flush()

    path = cache.CacheFolder("file:///x", "m").obtain(name, len(payload), sha256, download)
    assert Path(path).read_bytes() == payload


def test_processes_share_a_copy_and_a_killed_one_leaves_nothing_that_looks_whole(tmp_path, cache_folder):
    payload = np.random.default_rng(0).bytes(100_000)
    (tmp_path / "payload").write_bytes(payload)
    sha256, log = file_sha256(str(tmp_path / "payload")), str(tmp_path / "log")
    context = multiprocessing.get_context("fork")
    arguments = (str(tmp_path), "a.npy", payload, sha256, log)
    killed = context.Process(target=obtain, args=arguments, kwargs={"die": True})
    killed.start()
    killed.join(30)
    assert killed.exitcode == 9
    assert not list(cache_folder.rglob("a.npy")) and list(cache_folder.rglob("a.npy.part"))
    others = [context.Process(target=obtain, args=arguments) for _ in range(4)]
    for process in others:
        process.start()
    for process in others:
        process.join(30)
    assert [process.exitcode for process in others] == [0] * 4
    assert Path(log).read_text() == "xx"  # the killed one and one of the four
    assert not list(cache_folder.rglob("*.part"))


def test_stores_that_nobody_has_open_make_room_the_longest_unused_first(tmp_path, monkeypatch, cache_folder):
    stores = [write_store(tmp_path / f"s{i}", documents(120, seed=i)) for i in range(4)]
    size = sum(path.stat().st_size for path in (tmp_path / "s0").glob("*.npy"))
    monkeypatch.setenv(cache.SIZE_VARIABLE, str(2.6 * size / 1e9))
    open_ones = [TokenStore.open(url_of(store), verify_checksums=True) for store in stores[:2]]
    for age, store in enumerate(open_ones):
        os.utime(Path(store.directory) / ".in-use", (1000 + age, 1000 + age))
    folders = [store.directory for store in open_ones]

    third = TokenStore.open(url_of(stores[2]), verify_checksums=True)  # both are open: nothing is removed
    assert all(list(Path(folder).glob("tokens-*.npy")) for folder in folders)
    assert not list(Path(third.directory).glob("tokens-*.npy"))
    np.testing.assert_array_equal(third.tokens(0, 10**9), stores[2].tokens(0, 10**9))

    del open_ones, store
    gc.collect()
    fourth = TokenStore.open(url_of(stores[3]), verify_checksums=True)
    assert list(Path(fourth.directory).glob("tokens-*.npy"))
    assert not Path(folders[0]).exists() and Path(folders[1]).exists()
    assert sum(path.stat().st_size for path in cache_folder.rglob("*") if path.is_file()) <= 2.6 * size


@pytest.mark.parametrize("value", ["many", "-1", "nan GB"])
def test_bad_cache_size_names_the_variable(local, monkeypatch, value):
    monkeypatch.setenv(cache.SIZE_VARIABLE, value)
    with pytest.raises(ValueError, match=f"SAFELM_CACHE_GB must be a number of gigabytes, got '{value}'"):
        TokenStore.open(url_of(local)).tokens(0, 5)


def test_slow_reads_change_neither_content_nor_order(local, only_blocks, monkeypatch):
    original, rng = remote.read_ranges, np.random.default_rng(0)

    def slow(ranges):
        time.sleep(rng.uniform(0.0, 0.2))
        return original(ranges)

    monkeypatch.setattr(remote, "read_ranges", slow)
    assert_same(batches(TokenStore.open(url_of(local)), steps=4), batches(local, steps=4))


def test_a_read_that_fails_for_good_ends_the_loader_with_the_error(local, only_blocks, monkeypatch):
    store = TokenStore.open(url_of(local))
    store.fetch_documents(np.arange(len(store.manifest.shards)))
    store._remote.bring(range(3), "sums")

    def refuse(ranges):
        raise OSError(f"{ranges[0][0]}: reading failed")

    monkeypatch.setattr(remote, "read_ranges", refuse)
    with pytest.raises(OSError, match=r"tokens-0000\d-of-00003\.npy: reading failed"):
        batches(store)
