"""Files written whole, locks, and our own JSON records: what is damaged is named, with what to do."""

import errno
import json
import os
import pathlib
import subprocess
import sys

import pytest

from safelm.data import store
from safelm.data.shard import ShardInfo, StoredFile
from safelm.evaluate import journal
from safelm.evaluate.comparing import results
from safelm.io import files, records
from safelm.jobs import file_shards
from safelm.jobs.output import OutputFolder
from safelm.ladder import jobs as ladder_jobs
from safelm.ladder.plan import Job
from safelm.synthetic_web import corpus
from safelm.train import metrics as train_metrics
from safelm.train.events import Events


def full_disk(path):
    raise OSError(errno.ENOSPC, "No space left on device", str(path))


@pytest.mark.parametrize("content", ["né\n", "né\n".encode(), lambda path: path.write_text("né\n", encoding="utf-8")])
def test_a_file_is_synced_with_its_folder_before_it_has_its_name(content, tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.readlink(f"/proc/self/fd/{handle}")))
    target = tmp_path / "new" / "file.txt"
    assert files.write_whole(target, content) == target
    assert target.read_bytes() == "né\n".encode() and os.listdir(target.parent) == ["file.txt"]
    assert len(synced) == 2 and ".writing-" in synced[0] and synced[1] == str(target.parent)


def test_a_folder_is_synced_with_all_that_is_in_it_before_it_has_its_name(tmp_path, monkeypatch):
    synced, target = [], tmp_path / "out" / "model"
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.readlink(f"/proc/self/fd/{handle}")))
    with files.whole_folder(target, "--out") as folder:
        (folder / "inner").mkdir()
        for name in ("a", "inner/b"):
            (folder / name).write_text(name)
    assert set(synced[:-1]) == {str(folder), *(str(folder / name) for name in ("a", "inner", "inner/b"))}
    assert synced[-1] == str(target.parent)
    assert (target / "inner" / "b").read_text() == "inner/b" and os.listdir(target.parent) == ["model"]


def test_what_a_killed_process_left_of_a_folder_is_removed_and_two_never_write_one(tmp_path):
    target = tmp_path / "model"
    left = tmp_path / ".model.writing" / "files" / "weights"
    left.parent.mkdir(parents=True)
    left.write_text("half")
    with files.whole_folder(target, "--out") as folder:
        assert not list(folder.iterdir())
        (folder / "whole").write_text("whole")
        with pytest.raises(files.BusyError, match=f"--out={target}: another process is writing it"):
            with files.whole_folder(target, "--out"):
                pass
    assert os.listdir(tmp_path) == ["model"] and os.listdir(target) == ["whole"]
    with pytest.raises(KeyboardInterrupt), files.whole_folder(tmp_path / "other", "--out"):
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ["model"]


def test_a_lock_file_that_its_holder_removed_is_no_lock(tmp_path, monkeypatch):
    lock = tmp_path / "lock"
    take = files.try_lock

    def removed_meanwhile(file, **options):
        lock.unlink()
        return take(file, **options)

    monkeypatch.setattr(files, "try_lock", removed_meanwhile)
    with pytest.raises(files.BusyError, match="busy"), files.locked(lock, "busy"):
        pass


def test_a_full_disk_leaves_the_former_file_and_names_it(tmp_path):
    target = files.write_whole(tmp_path / "file.json", "former")
    with pytest.raises(OSError, match=r"cannot write: No space left.*file\.json") as error:
        files.write_whole(target, full_disk)
    assert error.value.errno == errno.ENOSPC
    with pytest.raises(KeyboardInterrupt):
        files.write_whole(target, lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
    assert target.read_text() == "former" and os.listdir(tmp_path) == ["file.json"]


def test_a_lock_is_one_process_s_and_ends_with_it(tmp_path):
    lock = tmp_path / "lock"
    hold = "with files.locked(sys.argv[1], 'busy'): print('mine', flush=True); input()"
    code = f"import sys; from safelm.io import files\n{hold}"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "mine\n"
    with pytest.raises(ValueError, match="busy"), files.locked(lock, "busy"):
        pass
    holder.kill()
    holder.wait()
    with files.locked(lock, "busy"):
        pass


@pytest.mark.parametrize("damage", ["", "{", "[]", "null", "\0\0", '"a"', "[" * 100_000, "\udcff"])
def test_a_damaged_record_is_named_with_what_to_do(damage, tmp_path):
    data = damage.encode("utf-8", "surrogateescape")
    job = Job(0, "raw", "pretrain")
    places = {
        tmp_path / "run.json": lambda: records.read(tmp_path / "run.json", "remove it"),
        ladder_jobs.done_file(tmp_path, job): lambda: ladder_jobs.read_done(tmp_path, job),
        tmp_path / "results.json": lambda: results.read_runs([str(tmp_path)]),
        tmp_path / "corpus.json": lambda: corpus.write_corpus(str(tmp_path), corpus.Recipe()),
        tmp_path / "manifest.json": lambda: store.read_manifest(tmp_path),
    }
    for path, read in places.items():
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        with pytest.raises(ValueError, match=f"^{path}: damaged, .*; .+") as error:
            read()
        assert "\n" not in str(error.value)


def test_a_manifest_with_any_value_of_another_kind_is_named(tmp_path):
    shard = ShardInfo(0, 1, 2, 0, 0, {kind: StoredFile(10, kind) for kind in ("tokens", "bounds", "sums")})
    manifest = store.Manifest("t", "train", "h", 300, 0, 3, "uint16", (shard,), 1, 2, 0)
    whole = json.loads(json.dumps(manifest, default=vars))
    path = tmp_path / store.MANIFEST_NAME
    refused = 0
    for where in (whole, whole["shards"][0]):
        for name, value in list(where.items()):
            for wrong in (None, "x", -5):
                where[name] = wrong
                path.write_text(json.dumps(whole))
                try:
                    store.read_manifest(tmp_path)
                except ValueError as error:
                    assert str(error).startswith(str(path))
                    refused += 1
            where[name] = value
    assert refused > 30


def test_the_cut_last_line_of_metrics_is_left_out_and_any_other_damage_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.5}\n{"step": 2}\n{"step": 3}\n{"st')
    assert train_metrics._former_lines(str(path)) == [{"step": 1, "loss": 2.5}, {"step": 2}, {"step": 3}]
    with train_metrics.MetricsLog(str(tmp_path), start_step=2):
        pass
    assert path.read_text() == '{"step": 1, "loss": 2.5}\n{"step": 2}\n'
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: damaged, not JSON.*; remove that line"):
        train_metrics._former_lines(str(path))


def test_a_damaged_record_of_a_shard_is_made_again_and_damaged_settings_are_named(tmp_path):
    out = OutputFolder(str(tmp_path))
    for record in (
        None,
        [],
        {"files": []},
        {"files": {"a": None}},
        {"files": {"a": {}}},
        {"files": {"a": {"bytes": 2}}},
    ):
        assert not file_shards.is_whole(record, {"a": 1})
    assert file_shards.is_whole({"files": {"a": {"bytes": 1}}}, {"a": 1})
    (tmp_path / file_shards.SETTINGS_NAME).write_text('{"format": 1')
    with pytest.raises(ValueError, match=r"json: damaged, not JSON; choose another --output, or remove that folder"):
        file_shards.check_settings(out, {"format": 1}, {})


def test_half_written_files_are_no_files_of_an_output_and_go_with_their_folder(tmp_path):
    """As a killed process leaves them, with the suffix of the file that they would have become."""
    out = OutputFolder(str(tmp_path / "out"))
    out.write_json("_shards/a.json", {"files": {}})
    (tmp_path / "out/_shards/.writing-abc.json").write_text('{"fi')
    assert list(out.sizes("_shards")) == ["a.json"]
    (tmp_path / "out/_shards/kept").mkdir()
    out.remove_folder("_shards")
    assert [path.name for path in (tmp_path / "out/_shards").iterdir()] == ["kept"]
    (tmp_path / "out/_shards/kept").rmdir()
    out.remove_folder("_shards")
    assert not (tmp_path / "out/_shards").exists()
    out.remove_folder("_shards")


def test_damaged_events_hold_no_run_up(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'[]\n{"event": "a\xff"}\n{"event": "launch", "pi')
    with Events(str(tmp_path)) as events:
        events.write("mark")
    lines = path.read_bytes().split(b"\n")
    assert lines[1] == b'{"event": "a\xff"}' and json.loads(lines[-2])["event"] == "mark" and lines[-1] == b""


def test_a_journal_keeps_what_stands_behind_a_damaged_line(tmp_path):
    path = tmp_path / "journal.jsonl"
    with journal.open_journal(path) as kept:
        kept.add({"a": {"n": 1}, "b": {"n": 2}, "c": {"n": 3}})
    whole = path.read_bytes()
    path.write_bytes(whole[:-4])
    with journal.open_journal(path) as kept:
        assert kept.rows == {"a": {"n": 1}, "b": {"n": 2}}
    damaged = whole.replace(b'"b"', b"\0\0\0")
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"journal\.jsonl, line 2: damaged, and whole lines follow it"):
        with journal.open_journal(path):
            pass
    assert path.read_bytes() == damaged


def test_files_are_written_and_locked_in_one_place():
    """Others than `safelm.io` call neither flock nor rename, but where a comment there says why."""
    root = pathlib.Path(__file__).parents[2]
    found = {
        str(path.relative_to(root))
        for path in [*root.glob("safelm/**/*.py"), *root.glob("data_tasks/**/*.py")]
        if any(call in path.read_text() for call in ("fcntl.flock(", "os.replace(", "os.fsync("))
    }
    assert found == {"safelm/io/files.py", *_OTHERS}


# Appended logs that are synced, arrays and downloads that are renamed together, a lock that is let go of at once.
_OTHERS = {
    "safelm/safety/synthesis/journal.py",
    "safelm/data/shard.py",
    "safelm/io/cache.py",
    "safelm/jobs/output.py",
}
