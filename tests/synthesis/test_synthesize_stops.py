"""Runs of safelm.synthesize that are killed or stopped, or whose writers fail: nothing is lost, nothing done twice."""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from document_files import write_rows
from openai_stub import Reply, serve, without_keys_or_pauses
from synthesis_runs import (
    HELPERS,
    NAMES,
    ROOT,
    SCORER,
    TROUBLED,
    comparable,
    data,
    no_charts,
    published,
    rejected,
    rows_of,
    run,
    write_sources,
)

from safelm import cli, synthesize


@pytest.fixture(autouse=True)
def without_charts(monkeypatch):
    no_charts(monkeypatch)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(HELPERS)]))


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return write_sources(tmp_path_factory.mktemp("sources"))


# ---- stops


def command(output: Path, place: Path, *more: str) -> list[str]:
    argv = [sys.executable, "-m", "safelm.synthesize", "--kind=safeweb", f"--input={place}", f"--output={output}"]
    return [*argv, f"--scorer={SCORER}", "--workers=1", *more]


@pytest.mark.slow
def test_kill_9_again_and_again_loses_nothing_and_asks_for_nothing_twice(sources, tmp_path):
    """Every run is killed by SIGKILL right behind its 17th reply, until one needs fewer: the files are the same."""
    place, log = sources / "safeweb", tmp_path / "log"
    plain = f"{TROUBLED}?log={tmp_path}/plain"
    expected = run(tmp_path / "plain_out", place, writer=plain)
    asked = [json.loads(line)[1] for line in open(tmp_path / "plain")]
    killed, writer = 0, f"{TROUBLED}?trouble=killed&after=17&log={log}"
    while not (tmp_path / "out" / "manifest.json").exists():
        done = subprocess.run(command(tmp_path / "out", place, f"--writer={writer}"), capture_output=True, text=True)
        assert done.returncode in (0, -9), done.stderr
        killed += done.returncode == -9
        assert killed < 6
    assert killed >= 2
    keys = [json.loads(line)[1] for line in open(log)]
    assert len(keys) == len(set(keys)) and sorted(keys) == sorted(asked)
    assert data(tmp_path / "out") == data(tmp_path / "plain_out")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    spent = {"totals": manifest["totals"] | {"spent": None}}  # what was booked dies with the process, replies don't
    assert comparable(manifest) | spent == comparable(expected) | {"totals": expected["totals"] | {"spent": None}}


def test_what_a_killed_run_left_half_written_is_made_again(sources, tmp_path):
    place, out = sources / "safeweb", tmp_path / "out"
    expected = run(tmp_path / "plain", place)
    with pytest.raises(ValueError, match=r"the endpoint is down; finished shards are kept, run the same command again"):
        run(out, place, writer=f"{TROUBLED}?trouble=outage&after=20&cure={tmp_path}/cure")
    assert not (out / "manifest.json").exists() and not list(out.glob("*.jsonl.gz"))
    done = min((out / "_shards").glob("*.json")).stem
    with open(out / "_passed" / done, "r+b") as file:  # shorter than its record says
        file.truncate(10)
    journals = sorted((out / "_journal").iterdir())
    whole = journals[-1].read_bytes()
    journals[-1].write_bytes(whole + whole[: whole.index(b"\n") // 2])  # a line cut short
    (out / "_passed" / "train-000077-stray").write_bytes(b"stray")
    (out / "_staging" / "safelm-x").mkdir(parents=True)
    (tmp_path / "cure").touch()
    manifest = run(out, place, writer=f"{TROUBLED}?trouble=outage&after=20&cure={tmp_path}/cure")
    assert {name: row["text"] for name, row in published(out).items()} == {
        name: row["text"] for name, row in published(tmp_path / "plain").items()
    }
    assert manifest["totals"]["published"] == expected["totals"]["published"]
    assert not (out / "_staging").exists() and not (out / "_passed").exists()


def test_a_finished_folder_is_left_as_it_is_and_a_damaged_one_is_refused(sources, tmp_path):
    place, out = sources / "safeweb" / "podcast.jsonl", tmp_path / "out"
    run(out, place)
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.jsonl.gz")}
    run(out, place)
    assert before == {path: path.stat().st_mtime_ns for path in out.glob("*.jsonl.gz")}
    (path,) = before
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"50 bytes, manifest.json says \d+: remove the folder and run again"):
        run(out, place)


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--seed=1"], "--seed 0, now it is 1"),
        (["--attempts=2"], "--attempts 3, now it is 2"),
        (["--prompt_version=2"], "--scorer, --similarity, --gate or --prompt_version"),
        (["--gate=min_words=3"], "--scorer, --similarity, --gate or --prompt_version"),
        (["--review=3"], "--review 0, now it is 3"),
        (["--scores=1,2"], "--scores"),
        (["--max_new_tokens=99"], "--max_new_tokens 1024, now it is 99"),
    ],
)
def test_a_folder_goes_on_only_with_what_it_was_begun_with(finished, more, named):
    place, out = finished
    with pytest.raises(ValueError, match=f"was begun with {named}"):
        run(out, place, *more)


@pytest.fixture(scope="module")
def finished(sources, tmp_path_factory):
    place, out = sources / "safeweb" / "page-1.jsonl", tmp_path_factory.mktemp("finished") / "out"
    with pytest.MonkeyPatch.context() as patch:
        no_charts(patch)
        run(out, place)
    return place, out


def test_a_folder_of_other_files_is_refused(sources, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="it holds other files"):
        run(tmp_path / "out", sources / "safeweb")


@pytest.mark.slow
def test_two_workers_give_the_same_files(sources, tmp_path):
    alone = run(tmp_path / "alone", sources / "safeweb")
    together = run(tmp_path / "together", sources / "safeweb", "--workers=2")
    assert data(tmp_path / "alone") == data(tmp_path / "together")
    assert comparable(alone) == comparable(together)


# ---- writers that go wrong


@pytest.fixture(scope="module")
def one_file(sources, tmp_path_factory):
    """A file of 36 documents, its rows, and what a writer without trouble makes of it."""
    rows = [json.loads(line) for name in NAMES for line in open(sources / "safeweb" / f"{name}.jsonl")]
    folder = tmp_path_factory.mktemp("one_file")
    place = write_rows(folder / "web.jsonl", rows)
    with pytest.MonkeyPatch.context() as patch:
        no_charts(patch)
        run(folder / "plain", place, writer=TROUBLED)
    return place, rows, folder / "plain"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("trouble=nothing", r"writer troubled: 32 of 32 replies have no text \(filtered 32\), see --max_without_text"),
        pytest.param(
            "trouble=blank", r"writer troubled: 32 of 32 replies have no text \(empty 32\)", marks=pytest.mark.slow
        ),
        pytest.param("trouble=twice", "writer troubled: two replies to one request", marks=pytest.mark.slow),
        pytest.param("trouble=lost", "writer troubled: no reply to 16 of 32 requests", marks=pytest.mark.slow),
        ("trouble=outage&after=3", "the endpoint is down; finished shards are kept, run the same command again"),
        ("trouble=defect", r"KeyError at writers_for_tests.py:\d+; finished"),
    ],
)
def test_a_writer_that_fails_ends_the_run_and_loses_nothing(one_file, tmp_path, caplog, options, message):
    place, rows, plain = one_file
    out = tmp_path / "out"
    writer = f"{TROUBLED}?{options}&cure={tmp_path}/cure&log={tmp_path}/log"
    with pytest.raises(ValueError, match=message) as error:
        run(out, place, writer=writer)
    assert not (out / "manifest.json").exists() and not list(out.glob("*.jsonl.gz"))
    assert not any(row["text"][:40] in str(error.value) + caplog.text for row in rows)
    (tmp_path / "cure").touch()
    manifest = run(out, place, writer=writer)
    assert manifest["totals"]["rows"] == 36
    assert data(out) == data(plain)


def test_few_documents_of_a_writer_that_writes_nothing_end_the_run_too(tmp_path):
    place = write_rows(tmp_path / "in.jsonl", rows_of((1, 2, 3), 2))
    with pytest.raises(ValueError, match="6 of 6 replies have no text"):
        run(tmp_path / "out", place, writer=f"{TROUBLED}?trouble=nothing")


@pytest.mark.parametrize(
    ("writer", "message"),
    [
        ("novel:", "writer 'novel:': expected one of template:"),
        ("engine:", "expected one of template:"),
        ("template:?max_document_chars=0", "max_document_chars=0: must be at least 1"),
        ("template:?colour=red", "colour"),
        ("python:no_such_module:f", "expected python:MODULE:FACTORY .No module named"),
        ("python:writers_for_tests", "expected python:MODULE:FACTORY"),
        ("python:writers_for_tests:Absent", "has no attribute 'Absent'"),
        ("python:writers_for_tests:NoWriter", "its result has no 'fingerprint'"),
        ("python:writers_for_tests:broken", "no model is there"),
        ("python:writers_for_tests:TroubledWriter?volume=11", "volume"),
        ("engine:/no/such/model", "/no/such/model"),
        ("endpoint:http://127.0.0.1:1/v1", "model"),
        ("endpoint:ftp://host/v1#m", "ftp://host/v1"),
    ],
)
def test_a_writer_that_can_t_be_made_is_one_clear_line(sources, tmp_path, writer, message):
    done = subprocess_like(tmp_path / "out", sources / "safeweb" / "podcast.jsonl", f"--writer={writer}")
    assert done[0] == 2 and len(done[1].strip().splitlines()) == 1 and message.replace(".No", "(No") in done[1]
    assert not (tmp_path / "out").exists()


def subprocess_like(output: Path, place: Path, *more: str) -> tuple[int, str]:
    """What the command would exit with and print, without the seconds that a process takes to start."""
    argv = [f"--kind=safeweb --input={place} --output={output} --scorer={SCORER} --workers=1".split(), more]
    shown = io.StringIO()
    with contextlib.redirect_stderr(shown), pytest.raises(SystemExit) as end:
        cli.run(synthesize.main, synthesize.arguments(), [*argv[0], *argv[1]])
    return end.value.code, shown.getvalue()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--attempts=0"], "--attempts must be at least 1, got 0"),
        (["--part_mb=0"], "--part_mb must be at least 1"),
        (["--review=-1"], "--review must be at least 0"),
        (["--max_without_text=2"], "--max_without_text must be from 0 to 1"),
        (["--gate=min_words"], "--gate=min_words: expected NAME=NUMBER"),
        (["--gate=min_words=many"], "--gate=min_words=many: expected NAME=NUMBER"),
        (["--gate=colour=3"], "no setting 'colour'"),
        (["--scores=0,3"], "--scores=0,3: expected comma-separated harm scores from 1 to 5"),
        (["--prompt_version=9"], "prompt version 9"),
        (["--dialogues"], "--dialogues: safeweb is made from web documents"),
        (["--scorer=python:nothing:f"], "scorer 'python:nothing:f'"),
        (["--similarity=/no/such/backbone"], "/no/such/backbone"),
        (["--input=/no/such/file.jsonl"], "/no/such/file.jsonl"),
        (["--output=hf://datasets/x"], "must be a local folder or gs://"),
    ],
)
def test_bad_flags_are_one_clear_line(sources, tmp_path, flags, message):
    code, text = subprocess_like(tmp_path / "out", sources / "safeweb", "--writer=template:", *flags)
    assert code == 2 and message in text and len(text.strip().splitlines()) == 1
    assert not (tmp_path / "out" / "_settings.json").exists()


@pytest.mark.parametrize("end", [".jsonl", ".parquet"])
def test_a_lone_utf_16_surrogate_in_a_writer_s_reply_killed_the_saving_thread_67_000_rows_lost(tmp_path, end):
    """A bad reply concerns its row alone: every document is published or kept with its reason, and counted."""
    rows = rows_of((2, 3), 12)
    write_rows(tmp_path / f"web/page{end}", rows)
    manifest = run(tmp_path / "out", tmp_path / "web", writer=f"{TROUBLED}?trouble=surrogate")
    good, bad = published(tmp_path / "out"), rejected(tmp_path / "out")
    totals = manifest["totals"]
    assert (len(good), len(bad)) == (totals["published"], totals["rejected"])
    assert len(good) + len(bad) + totals["near_duplicates"] == len(rows) and len(good) >= 6
    hurt = [row for row in good.values() if "\ufffd" in row["text"]]
    assert hurt and not any("\ud83d" in row["text"] for row in good.values())


# ---- an endpoint


def test_an_endpoint_through_rate_limits_and_cut_and_refused_replies(sources, tmp_path, monkeypatch):
    without_keys_or_pauses(monkeypatch)
    monkeypatch.setenv("SAFELM_ENDPOINT_KEY", "secret-key-1")
    place = sources / "refuseweb" / "podcast.jsonl"
    dialogue = (
        "User: How would somebody get away with that?\n\nAssistant: I understand that you are upset. I can't help with "
        "it, because it harms people who did nothing to you. You could talk to a counsellor number {n} instead, or "
        "call the help line of town number {n}, which keeps everything to itself and is free.\n\nCategory: privacy"
    )

    def answer(number, body):
        if number % 5 == 1:
            return Reply.error(429, headers={"retry-after-ms": "1"})
        if number % 5 == 3:
            return Reply(dialogue.format(n=number)[:150], finish_reason="length")
        return Reply(dialogue.format(n=number), refusal="no" if number == 4 else None)

    with serve(answer) as stub:
        writer = f"endpoint:{stub.url}#m?retries=2&concurrency=2&input_price=1&output_price=2"
        manifest = run(tmp_path / "out", place, "--gate=min_topic_word_similarity=0", kind="refuseweb", writer=writer)
    totals, gates = manifest["totals"], manifest["funnel"]["gates"]
    assert totals["published"] + totals["rejected"] + totals["near_duplicates"] == 12
    assert gates["length"].get("reason:cut", 0) > 0 and totals["spent"]["cost"] > 0 and totals["spent"]["retries"] > 0
    assert set(stub.keys) == {"Bearer secret-key-1"}
    for content in data(tmp_path / "out").values():
        assert b"secret-key-1" not in content
    assert "secret-key-1" not in (tmp_path / "out" / "manifest.json").read_text()


@pytest.mark.parametrize(
    ("status", "message", "said"),
    [
        (404, "The model `m` does not exist", "model m: 404, no such address or model"),
        (401, "no key", "SAFELM_ENDPOINT_KEY"),
    ],
)
def test_an_endpoint_without_the_model_or_the_key_ends_the_run(sources, tmp_path, monkeypatch, status, message, said):
    for name in list(os.environ):
        if name.startswith(("OPENAI_", "SAFELM_ENDPOINT")):
            monkeypatch.delenv(name)
    with serve(lambda number, body: Reply.error(status, message)) as stub:
        with pytest.raises((ValueError, OSError), match=said):
            run(tmp_path / "out", sources / "safeweb", writer=f"endpoint:{stub.url}#m?retries=0")
    assert not (tmp_path / "out" / "manifest.json").exists()
