"""progress.json: what a command writes about how far it is."""

import json
import os
import sys

import pytest

from safelm import cli
from safelm.io import progress, remote


@pytest.fixture
def now(monkeypatch):
    """Seconds that pass only when told to."""

    class Now:
        value = 1000.0

    monkeypatch.setattr(progress.time, "monotonic", lambda: Now.value)
    monkeypatch.setattr(progress.time, "time", lambda: Now.value)
    return Now


@pytest.fixture
def file(tmp_path):
    """A file that a command's bars write into."""
    progress.begin(str(tmp_path / "deep/progress.json"), "a command")
    yield lambda: json.loads((tmp_path / "deep/progress.json").read_text())
    progress.end("done")


def test_a_bar_tells_how_far_it_is_at_most_every_two_seconds(now, file):
    assert file()["state"] == "running" and file()["pid"] == os.getpid() and file()["command"] == "a command"
    now.value += 2
    with progress.Bar(total=40, initial=10, unit=" pages", desc="reading") as bar:
        now.value += 1
        bar.update(5)
        assert file()["done"] == 10  # written a second ago
        now.value += 1
        bar.update(5)
        assert (file()["done"], file()["total"], file()["stage"], file()["unit"]) == (20, 40, "reading", "pages")
        assert file()["rate"] == pytest.approx(5.0) and file()["eta_seconds"] == pytest.approx(4.0)
        assert file()["updated"] == now.value and file()["started"] == 1000.0


def test_of_bars_within_bars_the_outer_one_counts_and_the_inner_one_names_the_stage(now, file):
    seen = []
    for _ in progress.Bar(range(3), desc="models", unit="run"):
        for _ in progress.Bar(range(50), desc="answers", unit="answer"):
            now.value += 1
        seen.append((file()["stage"], file()["done"], file()["total"], file()["unit"]))
    assert seen == [("answers", 0, 3, "run"), ("answers", 1, 3, "run"), ("answers", 2, 3, "run")]
    progress.end("done")
    assert (file()["stage"], file()["done"], file()["state"], file()["eta_seconds"]) == ("models", 3, "done", None)


@pytest.mark.parametrize(
    ("error", "state", "code"),
    [
        *((None, "done", 0), (ValueError("a\nb"), "failed", 2), (KeyboardInterrupt(), "stopped", 130)),
        *((SystemExit(0), "done", 0), (SystemExit(143), "stopped", 143)),
    ],
)
def test_every_command_takes_the_flag_and_says_how_it_ended(tmp_path, capsys, monkeypatch, error, state, code):
    monkeypatch.setattr(cli.os, "_exit", sys.exit)  # where another test's threads are left in this process

    def main(flags):
        if error is not None:
            raise error

    ended = 0
    try:
        cli.run(main, cli.parser("safelm.something", "What it does."), [f"--progress_file={tmp_path}/progress.json"])
    except SystemExit as end:
        ended = end.code
    found = json.loads((tmp_path / "progress.json").read_text())
    assert ended == code and found["state"] == state and found["command"] == "python -m safelm.something"
    assert found.get("error") == ("a b" if code == 2 else None)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (KeyError("a text"), f"KeyError in {__file__}, line "),
        (SystemExit(3), "exit code 3"),
        (SystemExit("what\nis wrong"), "what is wrong"),
    ],
)
def test_a_defect_is_raised_and_its_kind_and_place_told(tmp_path, error, said):
    def main(flags):
        raise error

    with pytest.raises(type(error)) as raised:
        cli.run(main, cli.parser("safelm.something", "What it does."), [f"--progress_file={tmp_path}/progress.json"])
    found = json.loads((tmp_path / "progress.json").read_text())
    assert raised.value is error and found["state"] == "failed"
    assert found["error"].startswith(said) and "a text" not in found["error"]


def test_a_write_into_a_folder_with_a_guard_never_waits_for_its_bucket(monkeypatch):
    """A guard that may ask the bucket asks for up to ten minutes; one whose folder is lost keeps the file as it is."""
    url, asked = "memory://guarded/run/progress.json", []
    files, inner = remote.filesystem(url)
    monkeypatch.setitem(remote.guards, "memory://guarded/run/.writer", asked.append)
    written = progress.ProgressFile(url, "a command")
    written.update(done=1)
    assert asked == [False] and json.loads(files.cat_file(inner))["done"] == 1

    def lost(asks):
        raise OSError("another process writes there")

    monkeypatch.setitem(remote.guards, "memory://guarded/run/.writer", lost)
    written.end("done")
    assert json.loads(files.cat_file(inner))["state"] == "running"


def test_the_variable_names_the_file_and_a_file_that_cannot_be_written_stops_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv(progress.VARIABLE, str(tmp_path / "progress.json"))
    cli.run(lambda flags: None, cli.parser("safelm.something", "What it does."), [])
    assert json.loads((tmp_path / "progress.json").read_text())["state"] == "done"
    (tmp_path / "plain").write_text("")
    for _ in range(2):
        cli.run(lambda flags: None, cli.parser("safelm.x", "."), [f"--progress_file={tmp_path}/plain/progress.json"])
    assert not progress.is_wanted()


def test_without_a_terminal_a_line_says_every_half_minute_how_far_it_is(now, caplog):
    caplog.set_level("INFO")
    for _ in progress.Bar(range(2), desc="models", unit="run"):
        for _ in progress.Bar(range(20), desc="answers", unit=" answers"):
            now.value += 5
    assert caplog.messages == [
        "models: 0 of 2 run; answers: 6 of 20 answers, 1 min left",
        "models: 0 of 2 run; answers: 12 of 20 answers, 1 min left",
        "models: 0 of 2 run; answers: 18 of 20 answers, 0 min left",
        "models: 1 of 2 run, 2 min left; answers: 4 of 20 answers, 1 min left",
        "models: 1 of 2 run, 2 min left; answers: 10 of 20 answers, 1 min left",
        "models: 1 of 2 run, 3 min left; answers: 16 of 20 answers, 0 min left",
    ]
    caplog.clear()
    for quiet in (True, None):
        with progress.Bar(total=3, disable=quiet) as bar:
            for _ in range(3):
                assert not progress.is_wanted()
                now.value += 25
                bar.update()
    assert caplog.messages == ["2 of 3 it, 0 min left"]
    with progress.Bar(total=3, disable=None) as bar:
        now.value += 31
        assert progress.is_wanted()  # so that a bar which counts files is moved
        bar.update()
        assert not progress.is_wanted()
