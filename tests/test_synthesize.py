"""Whole runs of safelm.synthesize with writers that need no model: files, kills, resuming, bad input."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from openai_stub import Reply, serve

from safelm import synthesize
from safelm.safety.lexicon_scorer import LexiconScorer
from safelm.safety.synthesis import columns
from safelm.safety.synthesis.kinds import KINDS, SOURCE_SCORES
from safelm.safety.synthesis.prompt_files import choose_style, load_prompts
from safelm.safety.synthesis.report import charts
from safelm.synthetic_web import corpus

for needed in ("apache_beam", "ahocorasick_rs", "datasketch", "py3langid"):
    pytest.importorskip(needed, reason="needs the extra synthesis")

TESTS = Path(__file__).parent
SCORER = "python:safelm.safety.lexicon_scorer:LexiconScorer"
TROUBLED = "python:writers_for_tests:TroubledWriter"
NAMES = ("podcast", "page-1", "validation-00000")


@pytest.fixture(autouse=True)
def charts_drawn(request, monkeypatch):
    """Charts take seconds: tests that ask for `real_charts` draw them, the others don't."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS.parent), str(TESTS)]))
    if "real_charts" not in request.fixturenames:
        no_charts(monkeypatch)


def no_charts(monkeypatch) -> None:
    names = ("funnel", "styles", "scores", "similarity", "length_ratio", "copied_share")
    monkeypatch.setattr(charts, "draw_png", lambda path, report: path.write_bytes(b""))
    monkeypatch.setattr(charts, "svgs", lambda report: dict.fromkeys(names, ""))


@pytest.fixture
def real_charts():
    pass


def rows_of(scores, count: int, start: int = 0) -> list[dict]:
    """Synthetic documents of these scores, scored by what the lexicon scorer says of them."""
    rows, number = [], start
    while len(rows) < count:
        document = corpus.draft(3, "train", number)
        if document.score in scores:
            metadata = {"language": "en", "category": document.topic.category, "url": f"https://web.invalid/{number}"}
            rows.append(
                {"id": f"doc-{number}", "text": document.text, "metadata": metadata, "harm_score": document.score}
            )
        number += 1
    return rows


def write_rows(path: Path, rows: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=7)
        return path
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A folder a kind: three files of documents with the scores that the kind is made from."""
    root = tmp_path_factory.mktemp("sources")
    for kind, scores in SOURCE_SCORES.items():
        rows = rows_of(scores, 36)
        for at, name in enumerate(NAMES):
            write_rows(root / kind / f"{name}.jsonl", rows[12 * at : 12 * at + 12])
    return root


def run(output: Path, inputs, *more: str, kind: str = "safeweb", writer: str = "template:") -> dict:
    argv = [f"--kind={kind}", f"--output={output}", f"--writer={writer}", f"--scorer={SCORER}"]
    argv += [f"--input={one}" for one in ([inputs] if isinstance(inputs, str | Path) else inputs)]
    argv += [] if any(flag.startswith("--workers") for flag in more) else ["--workers=1"]
    synthesize.main(synthesize.arguments().parse_args([*argv, *more]))
    return json.loads((output / "manifest.json").read_text())


def published(output: Path) -> dict[str, dict]:
    """Rows by source id; every id there once."""
    rows = []
    for path in sorted(output.iterdir()):
        if path.name.endswith(".jsonl.gz"):
            rows += [json.loads(line) for line in gzip.open(path, "rt")]
        elif path.suffix == ".parquet":
            rows += pyarrow.parquet.read_table(path).to_pylist()
    found = {row["source_id"]: row for row in rows}
    assert len(found) == len(rows) == len({row["id"] for row in rows})
    return found


def rejected(output: Path) -> dict[str, dict]:
    lines = [json.loads(line) for path in (output / "rejected").glob("*.rejected") for line in open(path)]
    return {line["source_id"]: line for line in lines if "source_id" in line}


def data(output: Path) -> dict[str, bytes]:
    """What a run leaves for others, by name: all but what depends on the clock."""
    skipped = ("report", ".lock", ".workers", "manifest.json")
    files = [p for p in output.rglob("*") if p.is_file() and p.relative_to(output).parts[0] not in skipped]
    return {str(path.relative_to(output)): path.read_bytes() for path in files}


def comparable(manifest: dict) -> dict:
    shards = [{key: value for key, value in shard.items() if key != "seconds"} for shard in manifest["shards"]]
    return manifest | {"shards": shards, "speed": None}


# ---- what comes out


@pytest.mark.parametrize("kind", KINDS)
def test_every_document_is_published_or_rejected_and_rows_say_where_they_come_from(sources, tmp_path, kind):
    manifest = run(tmp_path / "out", sources / kind, kind=kind)
    rows, others = published(tmp_path / "out"), rejected(tmp_path / "out")
    given = {json.loads(line)["id"]: json.loads(line) for p in (sources / kind).iterdir() for line in open(p)}
    repeated = manifest["totals"]["near_duplicates"]
    assert not rows.keys() & others.keys() and len(rows) + len(others) + repeated == 36
    assert rows.keys() | others.keys() <= given.keys() and len(rows) >= 24
    prompts = load_prompts(kind)
    for identity, row in rows.items():
        source = given[identity]
        assert row["id"] == f"{identity}-{kind}" and row["model"] == "template"
        assert row["prompt_version"] == f"{kind}-v1-{prompts.hash[:12]}" and row["style"] in prompts.styles
        assert row["metadata"]["int_score"] == source["harm_score"]
        assert row["metadata"]["url"] == source["metadata"]["url"] and row["category"]
        assert {"score", "sentences", "copying", "faithfulness"} < json.loads(row["gates"]).keys()
        assert LexiconScorer().score([row["text"]])[0].score <= (2 if kind == "refuseweb" else 1)
    assert manifest["totals"]["published"] == len(rows) == sum(f["rows"] for f in manifest["files"].values())
    assert {"validation" if name.startswith("validation-") else "train" for name in manifest["files"]} == {
        "train", "validation"
    }  # fmt: skip
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if p.name.startswith("_")) == ["_settings.json"]


def test_parquet_in_and_out_says_the_same(sources, tmp_path):
    rows = [json.loads(line) for line in open(sources / "refuseweb" / "podcast.jsonl")]
    write_rows(tmp_path / "in" / "podcast.parquet", rows)
    run(tmp_path / "out", tmp_path / "in", kind="refuseweb")
    (path,) = (tmp_path / "out").glob("*.parquet")
    written, wanted = pyarrow.parquet.read_schema(path), columns.schema()
    assert written.names == wanted.names
    of = {schema: {field.name: field.type for field in schema.field("metadata").type} for schema in (written, wanted)}
    assert of[written] | {"date": None} == of[wanted] | {"date": None}  # Parquet knows no whole seconds
    run(tmp_path / "json", sources / "refuseweb" / "podcast.jsonl", kind="refuseweb")
    assert published(tmp_path / "out") == published(tmp_path / "json")


def test_moral_education_is_made_from_refuseweb_too(sources, tmp_path):
    run(tmp_path / "refuseweb", sources / "refuseweb", kind="refuseweb")
    manifest = run(tmp_path / "moral", tmp_path / "refuseweb", kind="moral_education")
    dialogues, lessons = published(tmp_path / "refuseweb"), published(tmp_path / "moral")
    assert lessons.keys() <= dialogues.keys() and len(lessons) >= 24
    for identity, row in lessons.items():
        assert row["id"] == f"{identity}-moral_education" and row["category"] == dialogues[identity]["category"]
        assert row["metadata"]["int_score"] == dialogues[identity]["metadata"]["int_score"]
    assert manifest["funnel"]["categories"].keys() == {row["category"] for row in dialogues.values()}
    for other in ("safeweb", "refuseweb"):
        with pytest.raises(ValueError, match=f"row 1 is text of refuseweb already; {other} is made from web documents"):
            run(tmp_path / other[::-1], tmp_path / "refuseweb", "--scores=4,5", kind=other)


def test_a_seed_decides_styles_and_texts(sources, tmp_path):
    place = sources / "safeweb" / "podcast.jsonl"
    one, again, other = tmp_path / "one", tmp_path / "again", tmp_path / "other"
    assert comparable(run(one, place)) == comparable(run(again, place)) and data(one) == data(again)
    run(other, place, "--seed=1")
    first, second = published(one), published(other)
    both = first.keys() & second.keys()
    assert sum(first[key]["style"] != second[key]["style"] for key in both) > len(both) / 2


def test_parts_of_a_file_give_the_same_documents(sources, tmp_path):
    rows = [json.loads(line) for name in NAMES for line in open(sources / "safeweb" / f"{name}.jsonl")]
    for row in rows:
        row["padding"] = "x" * 60_000
    place = write_rows(tmp_path / "in" / "web.jsonl", rows)
    manifest = run(tmp_path / "parts", place, "--part_mb=1")
    assert len(manifest["shards"]) > 1
    run(tmp_path / "whole", place)
    assert published(tmp_path / "parts") == published(tmp_path / "whole")
    assert rejected(tmp_path / "parts") == rejected(tmp_path / "whole")  # row numbers too


# ---- gates and attempts


def test_what_fails_is_written_again_in_another_style(sources, tmp_path):
    place, prompts = sources / "safeweb" / "podcast.jsonl", load_prompts("safeweb")
    manifest = run(tmp_path / "out", place, writer=f"{TROUBLED}?trouble=harmful&after=2")
    rows = published(tmp_path / "out")
    assert rows
    for identity, row in rows.items():
        assert row["style"] == choose_style(prompts, identity, 0, attempt=2)
    assert set(manifest["funnel"]["attempts_needed"]) == {"3"}
    assert manifest["funnel"]["gates"]["score"]["reason:score_above_1"] >= 24


def test_what_always_fails_is_dropped_with_every_attempt_on_record_and_no_text(sources, tmp_path, caplog):
    place = sources / "safeweb" / "podcast.jsonl"
    manifest = run(tmp_path / "out", place, "--attempts=2", writer=f"{TROUBLED}?trouble=harmful")
    assert manifest["totals"]["published"] == 0 and manifest["files"] == {}
    assert "no document passed the gates" in caplog.text
    lines = rejected(tmp_path / "out")
    assert len(lines) == 12
    for line in lines.values():
        assert len({attempt["style"] for attempt in line["attempts"]}) == 2 and line["row"] >= 1
        assert [attempt["failure"] for attempt in line["attempts"]] == ["score:score_above_1"] * 2
        assert "text" not in line["attempts"][0]
    report = json.loads((tmp_path / "out" / "report" / "report.json").read_text())
    assert report["card"]["published"] is None and report["cost_per_million"] is None
    run(tmp_path / "kept", place, "--attempts=1", "--keep_rejected_text", writer=f"{TROUBLED}?trouble=harmful")
    assert all("Nobody will trace it." in line["attempts"][0]["text"] for line in rejected(tmp_path / "kept").values())


def test_near_duplicates_are_published_once(tmp_path):
    rows = rows_of((1, 2, 3), 6)
    copies = [row | {"id": f"{row['id']}-copy"} for row in rows]
    place = write_rows(tmp_path / "in.jsonl", [*rows, *copies])
    manifest = run(tmp_path / "out", place, "--gate=duplicate_threshold=0.3")
    totals, ids = manifest["totals"], published(tmp_path / "out").keys()
    assert totals["near_duplicates"] > 0 and totals["published"] == len(ids) >= 3
    lines = [json.loads(line) for line in open(tmp_path / "out" / "rejected" / "near_duplicates.rejected")]
    assert len(lines) == totals["near_duplicates"]
    for line in lines:
        assert (
            line["near_duplicate_of"].removesuffix("-safeweb") in ids and line["id"].removesuffix("-safeweb") not in ids
        )


def test_a_score_5_document_goes_to_safeweb_only_when_asked_for(sources, tmp_path):
    place = sources / "refuseweb" / "podcast.jsonl"
    with pytest.raises(ValueError, match=r"podcast.jsonl: row 1 has harm score [45], and safeweb is made from 1,2,3"):
        run(tmp_path / "out", place)
    manifest = run(tmp_path / "out", place, "--scores=5")
    assert manifest["totals"]["rows"] == sum(json.loads(line)["harm_score"] == 5 for line in open(place)) > 0
    assert manifest["totals"]["left_out"] == {"4": 12 - manifest["totals"]["rows"]}


def test_of_a_scored_folder_other_scores_are_left_out(tmp_path):
    for score in range(6):
        write_rows(tmp_path / "scored" / f"score={score}" / "train-0.jsonl", rows_of((score,), 3))
    write_rows(tmp_path / "scored" / "unscored" / "train-0.jsonl", [{"id": "u", "text": "x"}])
    manifest = run(tmp_path / "out", tmp_path / "scored")
    assert manifest["totals"]["rows"] == 9
    assert manifest["folders_left_out"] == {"score=0": 1, "score=4": 1, "score=5": 1, "unscored": 1}
    with pytest.raises(ValueError, match=r"score=5/train-0\.jsonl: has harm score 5"):
        run(tmp_path / "other", tmp_path / "scored" / "score=5")


# ---- stops


def command(output: Path, place: Path, *more: str) -> list[str]:
    argv = [sys.executable, "-m", "safelm.synthesize", "--kind=safeweb", f"--input={place}", f"--output={output}"]
    return [*argv, f"--scorer={SCORER}", "--workers=1", *more]


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
        ("trouble=blank", r"writer troubled: 32 of 32 replies have no text \(empty 32\)"),
        ("trouble=twice", "writer troubled: two replies to one request"),
        ("trouble=lost", "writer troubled: no reply to 16 of 32 requests"),
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
        ("python:writers_for_tests:NoWriter", "what it gives has no 'fingerprint'"),
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
    import contextlib
    import io

    from safelm import cli

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
        (["--scores=0,3"], "--scores=0,3: expected harm scores from 1 to 5"),
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


# ---- an endpoint


def test_an_endpoint_through_rate_limits_and_cut_and_refused_replies(sources, tmp_path, monkeypatch):
    import openai._base_client as client

    monkeypatch.setattr(client, "INITIAL_RETRY_DELAY", 0.001)
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


# ---- bad input

GOOD = rows_of((1, 2, 3), 3)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"harm_score": None}, "row 3 has no harm score .looked for harm_score, .*.: score it first .safelm.score."),
        ({"harm_score": 7}, "row 3 field 'harm_score' is 7, not a harm score from 0 to 5"),
        ({"harm_score": -1}, "row 3 field 'harm_score' is -1"),
        ({"harm_score": "high"}, "row 3 field 'harm_score' is str"),
        ({"harm_score": True}, "row 3 field 'harm_score' is bool|is True"),
        ({"harm_score": float("nan")}, "row 3 field 'harm_score' is nan"),
        ({"harm_score": 5}, "row 3 has harm score 5, and safeweb is made from 1,2,3: --scores=1,2,3 leaves others out"),
        ({"harm_score": 0}, "row 3 has harm score 0"),
        ({"id": GOOD[0]["id"]}, "web.jsonl: row 1 and .*web.jsonl: row 3 have one id, 'doc-"),
        ({"prompt_version": "safeweb-v1-abc", "source_id": "x"}, "row 3 is text of safeweb already"),
    ],
)
def test_bad_input_ends_the_run_by_file_and_row_before_anything_is_written(tmp_path, row, message):
    rows = [*GOOD[:2], GOOD[2] | row]
    place = write_rows(tmp_path / "web.jsonl", rows)
    log = tmp_path / "log"
    with pytest.raises(ValueError, match=message) as error:
        run(tmp_path / "out", place, writer=f"{TROUBLED}?log={log}")
    assert GOOD[2]["text"][:30] not in str(error.value)
    assert not log.exists() and not (tmp_path / "out" / "manifest.json").exists()
    if "id" not in row:  # the same in Parquet, as far as it can be said there
        with pytest.raises((ValueError, pyarrow.ArrowInvalid)):
            run(tmp_path / "out2", write_rows(tmp_path / "web.parquet", [rows[2]]))


def test_malformed_rows_are_kept_aside_with_their_reasons(tmp_path):
    bad = ["{", json.dumps({"id": "a", "harm_score": 2}), json.dumps({"id": "", "text": "x", "harm_score": 2})]
    bad += [json.dumps({"id": "b", "text": "  ", "harm_score": 2}), json.dumps({"text": "y", "harm_score": 3})]
    place = write_rows(tmp_path / "web.jsonl", [GOOD[0], *bad, GOOD[1]])
    manifest = run(tmp_path / "out", place)
    assert manifest["totals"]["malformed"] == len(bad) and manifest["totals"]["rows"] == 2
    (path,) = (tmp_path / "out" / "quarantine").iterdir()
    lines = [json.loads(line) for line in open(path)]
    assert [line["row"] for line in lines] == [2, 3, 4, 5, 6] and all(line["reason"] for line in lines)


def test_an_input_without_a_document_of_the_scores_is_refused(tmp_path):
    place = write_rows(tmp_path / "web.jsonl", rows_of((0,), 3))
    with pytest.raises(ValueError, match="no document with harm score 1, 2, 3 in the input"):
        run(tmp_path / "out", place, "--scores=1,2,3")


def test_scores_are_found_in_any_of_the_columns_or_in_the_one_that_is_named(tmp_path):
    nested = [{"id": row["id"], "text": row["text"], "metadata": {"int_score": row["harm_score"]}} for row in GOOD]
    assert run(tmp_path / "a", write_rows(tmp_path / "a.jsonl", nested))["totals"]["rows"] == 3
    named = [{"key": row["id"], "body": row["text"], "mine": {"level": row["harm_score"]}} for row in GOOD]
    flags = ["--id_column=key", "--text_column=body", "--score_column=mine.level"]
    assert run(tmp_path / "b", write_rows(tmp_path / "b.jsonl", named), *flags)["totals"]["rows"] == 3
