"""One writer at a time in a folder of a bucket: leases against fake-gcs-server, with Cloud Storage's conditions."""

import json
import logging
import os
import pathlib
import subprocess
import sys
import threading
import time

import gcs_server
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from safelm import cache_tasks
from safelm.checkpoints import checkpoint
from safelm.io import cache, lease, remote
from safelm.io.files import BusyError
from safelm.jobs.output import OutputFolder
from safelm.train.events import Events

BUCKET = f"gs://{gcs_server.BUCKET}"


@pytest.fixture(scope="module")
def server():
    with gcs_server.behind_proxy() as up:
        yield up


@pytest.fixture(autouse=True)
def quick(server, monkeypatch):
    server[0].reset()
    monkeypatch.setattr(lease, "STALE_SECONDS", 4.0)
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.3)
    monkeypatch.setattr(lease, "POLL_SECONDS", 0.1)
    yield server[0]
    server[0].reset()


def elsewhere(folder, name=lease.WRITER, **claim):
    """A lease of a process on another machine, which is renewed only by `_renew`."""
    made = lease._Lease(folder, name)
    made._claim |= {"host": "other-host", "machine": "another", "pid": "77"} | claim
    made._generation = made._write("0")
    assert made._generation
    return made


def test_a_second_writer_is_refused_by_name_and_the_object_goes_at_the_end():
    folder = f"{BUCKET}/twice"
    with lease.held(folder):
        began = time.monotonic()
        with pytest.raises(BusyError, match=rf"^{folder}: in use by process {os.getpid()} on .*, which said so \d+ s"):
            with lease.held(folder):
                pass
        assert time.monotonic() - began < lease.STALE_SECONDS / 2
        said = json.loads(remote.read_text(f"{folder}/.writer"))
        time.sleep(3 * lease.RENEW_SECONDS)
        assert json.loads(remote.read_text(f"{folder}/.writer"))["token"] == said["token"]
    assert gcs_server.names(folder) == []
    with lease.held(folder):
        pass


def test_of_many_that_begin_at_once_one_writes():
    folder, entered, refused = f"{BUCKET}/many", [], []
    start, end = threading.Barrier(6), threading.Event()

    def begin():
        start.wait()
        try:
            with lease.held(folder):
                entered.append(1)
                end.wait()
        except BusyError:
            refused.append(1)
        if len(refused) == 5:
            end.set()

    threads = [threading.Thread(target=begin) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(entered), len(refused)) == (1, 5)


def test_a_dead_process_of_this_machine_is_not_waited_for(server, monkeypatch):
    monkeypatch.setattr(lease, "STALE_SECONDS", 600.0)
    folder = f"{BUCKET}/dead"
    code = f"import os; from safelm.io import lease; held = lease.held({folder!r}); held.__enter__(); os._exit(9)"
    env = os.environ | {"STORAGE_EMULATOR_HOST": server[1], "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}
    assert subprocess.run([sys.executable, "-c", code], env=env, timeout=120).returncode == 9
    assert gcs_server.names(folder) == [".writer"]
    began = time.monotonic()
    with lease.held(folder):
        assert time.monotonic() - began < 30
        assert json.loads(remote.read_text(f"{folder}/.writer"))["pid"] == str(os.getpid())


def test_a_preempted_run_of_another_machine_is_waited_for_and_a_live_one_refuses(caplog):
    folder = f"{BUCKET}/preempted"
    gone = elsewhere(folder)
    began = time.monotonic()
    with caplog.at_level(logging.WARNING), lease.held(folder):
        assert lease.STALE_SECONDS - 1.5 <= time.monotonic() - began < lease.STALE_SECONDS + 5
    assert f"{folder}: process 77 on other-host wrote there; waiting up to" in caplog.text
    assert "process 77 on other-host has left it" in caplog.text
    gone._generation = gone._write("0")
    gone._thread.start()
    began = time.monotonic()
    with pytest.raises(BusyError, match="in use by process 77 on other-host, which said so"):
        with lease.held(folder):
            pass
    assert time.monotonic() - began < lease.STALE_SECONDS
    gone._ended.set()
    gone._thread.join()


def taken_over(folder, name=lease.WRITER):
    """Another machine takes the lease over, as it may once this process was stopped for long."""
    other = lease._Lease(folder, name)
    other._claim |= {"host": "other-host", "machine": "another", "pid": "77"}
    assert other._write(other._read().generation)
    return other


def test_who_has_lost_the_lease_writes_no_more(monkeypatch, tmp_path):
    monkeypatch.setattr(lease, "RENEW_SECONDS", 600.0)
    folder, now = f"{BUCKET}/lost", lease._now()
    out = OutputFolder(folder)
    (tmp_path / "file").write_text("mine")
    with lease.held(folder):
        remote.write_text(f"{folder}/file", "mine")
        other = taken_over(folder)
        remote.write_text(f"{BUCKET}/elsewhere", "mine")
        monkeypatch.setattr(lease, "_now", lambda: now + 600)
        for write in (
            lambda: remote.write_text(f"{folder}/file", "again"),
            lambda: out.publish(str(tmp_path / "file"), "deep/file"),
            lambda: out.remove("file"),
        ):
            with pytest.raises(lease.LeaseLostError, match="process 77 on other-host has taken it over, since"):
                write()
        remote.write_text(f"{BUCKET}/elsewhere", "again")
    assert remote.read_text(f"{folder}/file") == "mine" and gcs_server.names(folder) == [".writer", "file"]
    assert other._read().claim["host"] == "other-host"


def test_the_thread_finds_out_that_the_lease_is_lost():
    folder = f"{BUCKET}/found"
    with lease.held(folder):
        taken_over(folder)
        with pytest.raises(lease.LeaseLostError):
            for _ in range(100):
                remote.check_guards(folder, asks=False)
                time.sleep(0.1)


def test_failures_of_the_bucket_lose_no_lease(quick):
    quick.fail_first(2, 503, "reset")
    folder = f"{BUCKET}/failing"
    with lease.held(folder):
        quick.fail_first(3, 503, 429)
        time.sleep(2)
        remote.write_text(f"{folder}/file", "text")
    assert gcs_server.names(folder) == ["file"]


def test_a_second_run_leaves_the_first_ones_history_and_checkpoints():
    folder, values = f"{BUCKET}/run", {"w": jnp.ones((300, 300))}
    with Events(folder) as events, checkpoint.Checkpoints(folder, is_only_writer=True) as first:
        events.write("resume", 0)
        first.save(1, {"a": 1}, values)
        with pytest.raises(ValueError, match=f"{folder}: in use by process {os.getpid()} "), Events(folder):
            pass
        with checkpoint.Checkpoints(folder):
            time.sleep(2)  # Orbax removes in the background
        first.wait()
        first.reload()
        assert first.steps() == [1] and first.read_meta(1)["step"] == 1
        target = {"w": jax.ShapeDtypeStruct((300, 300), jnp.float32)}
        np.testing.assert_array_equal(first.restore(1, target)[0]["w"], values["w"])
    lines = [json.loads(line) for line in remote.read_text(f"{folder}/events.jsonl").splitlines()]
    assert [line["event"] for line in lines] == ["launch", "resume"]


def test_half_written_steps_are_removed_only_by_the_only_writer():
    folder, piece = f"{BUCKET}/half", "checkpoints/3/params/piece"
    remote.write_text(f"{folder}/{piece}", "cut")
    with checkpoint.Checkpoints(folder):
        time.sleep(2)  # Orbax removes in the background
    assert piece in gcs_server.names(folder)
    with checkpoint.Checkpoints(folder, is_only_writer=True):
        deadline = time.monotonic() + 30
        while piece in gcs_server.names(folder) and time.monotonic() < deadline:
            time.sleep(0.1)
    assert piece not in gcs_server.names(folder)


def test_a_run_that_has_lost_its_lease_ends_without_writing():
    folder = f"{BUCKET}/stalled"
    with pytest.raises(lease.LeaseLostError), Events(folder) as events:
        events.write("resume", 0)
        events.flush()
        taken_over(folder)
        remote.guards[f"{folder}/.writer"].__self__._renewed -= 600
        events.flush()
    assert '"error"' not in remote.read_text(f"{folder}/events.jsonl")


def test_output_folders_and_slices():
    out = OutputFolder(f"{BUCKET}/output")
    busy = pytest.raises(BusyError, match=f"{out.root}: in use by process {os.getpid()} ")
    with out.only_writer():
        assert out.is_empty()
        for second in (out.only_writer(), out.only_writer_of_slice(0, 2)):
            with busy, second:
                pass
    with out.only_writer_of_slice(0, 2), out.only_writer_of_slice(1, 2):
        for second in (out.only_writer(), out.only_writer_of_slice(0, 2), out.only_writer_of_slice(2, 3)):
            with busy, second:
                pass
        assert gcs_server.names(out.root) == [".slice-0-of-2", ".slice-1-of-2"]
    elsewhere(out.root, ".slice-0-of-3")
    with out.only_writer():
        assert gcs_server.names(out.root) == [".writer"]
    assert gcs_server.names(out.root) == []


def test_unfinished_files_lie_in_the_cache_folder_until_the_next_writer(tmp_path, monkeypatch):
    monkeypatch.setenv(cache.CACHE_VARIABLE, str(tmp_path / "cache"))
    out = OutputFolder(f"{BUCKET}/staged")
    with out.staging() as folder:
        assert folder.startswith(f"{cache.staging_folder(out.root)}/") and folder.startswith(str(tmp_path / "cache"))
    left = pathlib.Path(folder) / "index"
    left.mkdir(parents=True)  # of a run that was killed
    with out.only_writer():
        assert not left.exists()
        with out.staging() as folder:
            pathlib.Path(folder, "file").write_text("")
    assert not list((tmp_path / "cache/staging").iterdir())


def test_a_second_cache_tasks_is_refused(tmp_path, monkeypatch):
    import tiny_runs

    monkeypatch.setenv(cache.CACHE_VARIABLE, str(tmp_path / "cache"))
    tiny_runs.tokenizer().save(str(tmp_path / "tokenizer"))
    flags = cache_tasks.arguments().parse_args(
        [f"--output={BUCKET}/tokens", f"--tokenizer={tmp_path}/tokenizer", f"--data_dir={tmp_path}", "--tasks=raw_web"]
    )
    (tmp_path / "raw_web").mkdir()
    (tmp_path / "raw_web/train-0.jsonl").write_text('{"text": "a page"}\n')
    other = elsewhere(f"{BUCKET}/tokens/raw_web/train")
    other._thread.start()
    with pytest.raises(BusyError, match=f"{BUCKET}/tokens/raw_web/train: in use by process 77 on other-host"):
        cache_tasks.main(flags)
    other._ended.set()
    other._thread.join()
    staging = cache.staging_folder(f"{BUCKET}/tokens")
    assert not os.path.exists(os.path.join(staging, "raw_web", "train", "settings.json"))


def test_other_stores_say_that_nobody_is_kept_out(caplog):
    with caplog.at_level(logging.WARNING), lease.held("memory://folder"), lease.held("memory://folder"):
        pass
    assert "memory://folder: this kind of store has no locks" in caplog.text
