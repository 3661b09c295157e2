"""What goes wrong around a scoring run: odd columns, folders within each other, damaged files, a full disk, flags."""

import gzip
import json
import logging
import os
import socket
import subprocess
import sys
from typing import ClassVar

import apache_beam
import embedding_folders
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from annotation_runs import annotate
from document_files import write_rows
from scoring_runs import SCORER, data, make_rows, rows_of, run, score_one

from safelm import documents, score
from safelm.documents import annotations
from safelm.jobs import beam_jobs, beam_runner
from safelm.jobs.beam_runner import Runner
from safelm.jobs.output import OutputFolder, failures_in_a_line
from safelm.safety.classifier import calibration, checkpoint
from safelm.safety.embedding import load_backbone
from safelm.safety.report_card.counting import CountSettings, Piece, count_piece
from safelm.safety.scorer import Verdict, load_scorer
from safelm.safety.scoring import joining, shard


def test_columns_of_string_views_are_kept(tmp_path):
    views = pyarrow.string_view()
    schema = pyarrow.schema([("text", views), ("tags", pyarrow.list_(views)), ("more", pyarrow.struct([("a", views)]))])
    rows = [{"text": f"level{i % 2}", "tags": [str(i)], "more": {"a": "b" * 20} if i else None} for i in range(6)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), tmp_path / "web.parquet")
    score_one(tmp_path / "out", tmp_path / "web.parquet")
    for level in (0, 1):
        (path,) = (tmp_path / "out" / f"score={level}").iterdir()
        found = pyarrow.parquet.ParquetFile(path)
        assert found.schema_arrow.types[:3] == schema.types
        assert found.read().select(schema.names).to_pylist() == rows[level::2]


def test_two_text_columns_are_refused(tmp_path):
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "web.parquet")
    with pytest.raises(ValueError, match=r"web.parquet: has 2 columns 'text'"):
        run(tmp_path / "out", tmp_path / "web.parquet")


@pytest.mark.parametrize(
    ("pattern", "output", "is_taken_in"),
    [
        ("web", "web/scored", True),
        ("web/", "web", True),
        ("web/**/*.gz", "web/scored", True),
        ("web/*/*/*.jsonl.gz", "web/scored", True),
        ("memory://b/web", "memory://b/web/scored/", True),
        ("web/*.jsonl", "web/scored", False),
        ("web", "web/_scored", False),
        ("web", "web2", False),
        ("web/a.jsonl", "web/scored", False),
        ("memory://b/web", "web/scored", False),
    ],
)
def test_an_output_that_the_input_would_take_in_is_refused(tmp_path, monkeypatch, pattern, output, is_taken_in):
    monkeypatch.chdir(tmp_path)
    if not is_taken_in:
        documents.check_apart([pattern], output)
        return
    with pytest.raises(ValueError, match=f"--output {output} lies in --input"):
        documents.check_apart([pattern], output)


def test_a_damaged_file_is_mended_in_its_place_and_costs_no_other_its_scores(tmp_path):
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz", tmp_path / "c.jsonl"]
    write_rows(files[0], make_rows(9))
    write_rows(files[2], make_rows(9, first=20))
    whole = gzip.compress("".join(json.dumps(row) + "\n" for row in make_rows(4, first=10)).encode())
    files[1].write_bytes(whole[:-12])
    with pytest.raises(ValueError, match=r"b\.jsonl\.gz: damaged or cut short .*when that is mended"):
        run(tmp_path / "out", *files)
    before = data(tmp_path / "out")
    files[1].write_bytes(whole)
    manifest = run(tmp_path / "out", *files)
    assert (manifest["speed"]["shards"], manifest["totals"]["rows"]) == (1, 22)
    assert before.items() < data(tmp_path / "out").items()
    files[1].write_bytes(whole[:-12])  # one that is scored is another thing
    with pytest.raises(ValueError, match=r"begun with --input .*b\.jsonl\.gz"):
        run(tmp_path / "out", *files)


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_a_damaged_file_may_be_emptied_where_it_lies(tmp_path, form):
    whole, broken = write_rows(tmp_path / f"a.{form}", make_rows(9)), tmp_path / f"b.{form}.gz"
    broken = broken if form == "jsonl" else tmp_path / "b.parquet"
    broken.write_bytes(b"\x1f\x8b damaged")
    with pytest.raises(ValueError, match=r"b\.(jsonl\.gz|parquet): .*damaged"):
        run(tmp_path / "out", whole, broken)
    before = data(tmp_path / "out")
    broken.write_bytes(b"")
    manifest = run(tmp_path / "out", whole, broken)
    assert (manifest["speed"]["shards"], manifest["totals"]["rows"]) == (1, 9)
    assert data(tmp_path / "out") == before

    annotate(tmp_path / "notes", whole, broken)  # the same files go through annotations, a join and the card
    folders = annotations.parse(str(tmp_path / "notes"))
    assert joining.join_file(str(broken), folders, str(tmp_path / f"joined.{form}")) == 0
    assert list(documents.read_rows(str(tmp_path / f"joined.{form}"))) == []
    assert count_piece(Piece(None, str(broken), 0), CountSettings(annotations=folders))[0].rows == 0


def test_every_file_that_failed_is_named_up_to_ten(tmp_path):
    whole = write_rows(tmp_path / "00.jsonl", make_rows(2))  # the first is read before all others
    files = [tmp_path / f"{i:02}.jsonl.gz" for i in range(1, 14)]
    for each in files:
        each.write_bytes(b"\x1f\x8b damaged")
    for count in (3, 13):
        with pytest.raises(ValueError) as error:
            run(tmp_path / f"out{count}", whole, *files[:count])
        named = [each.name for each in files if each.name in str(error.value)]
        assert named == [each.name for each in files[: min(count, 10)]]
        assert ("(and 3 more shards failed)" in str(error.value)) == (count == 13)
    assert (
        failures_in_a_line(["b: not begun after 3 shards", "a: gone", "a: gone"])
        == "a: gone (and 2 more shards failed)"
    )


@pytest.mark.parametrize("command", [run, annotate])
def test_an_input_without_a_usable_row_is_an_error_and_can_be_mended(tmp_path, command):
    path, empty = tmp_path / "web.jsonl", tmp_path / "empty.jsonl"
    bad = '{"id": "x", "text": null}\n{"id": "y", "text": 5}\n'
    path.write_text(bad)
    empty.write_text("")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"empty.jsonl and 1 more files: 2 of 2 rows are malformed, none is left"):
            command(tmp_path / "out", path, empty)
        assert not (tmp_path / "out" / "manifest.json").exists()
    path.write_text(bad + '{"id": "z", "text": "level2"}\n')
    assert command(tmp_path / "out", path, empty)["totals"]["rows"] == 3
    assert command(tmp_path / "nothing", empty)["totals"]["rows"] == 0
    path.write_text(bad)
    assert command(tmp_path / "all", path, max_malformed_fraction=1)["totals"]["rows"] == 2


def test_a_file_of_many_shards_is_not_exchanged(tmp_path):
    rows = [{"text": f"level{i} {'x' * 600_000}"} for i in range(3)]
    files = [write_rows(tmp_path / name, rows) for name in ("a.jsonl", "b.jsonl")]
    (tmp_path / "c.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"c\.parquet: not Parquet"):
        run(tmp_path / "out", *files, tmp_path / "c.parquet", part_mb=1)
    (tmp_path / "out/_shards/train-000002-b.json").unlink()
    write_rows(files[1], make_rows(20))
    with pytest.raises(ValueError, match=r"begun with --input .*b\.jsonl"):
        run(tmp_path / "out", *files, tmp_path / "c.parquet", part_mb=1)


def test_a_shard_that_cannot_even_say_why_it_failed_ends_in_clear_lines(tmp_path, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "cannot write: No space left on device")

    monkeypatch.setattr(OutputFolder, "record_failure", full)
    write_rows(tmp_path / "web.jsonl", [{"text": "refused"}])
    with pytest.raises(ValueError, match=r"1 shards have no record, the first is train-000000-web"):
        run(tmp_path / "out", tmp_path / "web.jsonl")
    (line,) = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert line.startswith("scorer level:")
    assert line.endswith("No space left on device)")


def test_a_failure_names_the_file(tmp_path):
    write_rows(tmp_path / "web.jsonl", [{"text": "an abstract crash"}])
    with pytest.raises(ValueError, match=r"web\.jsonl: scorer level: RuntimeError|web\.jsonl: scorer level: an error"):
        run(tmp_path / "out", tmp_path / "web.jsonl")


def test_a_flag_that_beam_does_not_know_is_refused_or_left_to_the_service(caplog):
    for runner in (Runner("local", 1, ("--direct_workers=3",)), Runner("portable", 0, ("--job_endpont=h:1",))):
        with pytest.raises(ValueError, match=r"^--(direct_workers|job_endpont): Beam has no such flag"):
            beam_runner.pipeline_options(runner, 1)
    beam_runner.pipeline_options(Runner("flink", 0, ("--job_endpoint=h:1", "--object_reuse=true")), 1)
    assert "--object_reuse" in caplog.text


def test_a_job_service_that_is_not_there_is_said_at_once(tmp_path):
    with socket.socket() as unused:
        unused.bind(("localhost", 0))
        endpoint = f"localhost:{unused.getsockname()[1]}"
        path = write_rows(tmp_path / "web.jsonl", make_rows(3))
        argv = [f"--input={path}", f"--output={tmp_path}/out", f"--scorers={SCORER}", "--runner=portable"]
        with pytest.raises(OSError, match=f"--job_endpoint={endpoint}: no job service answers there"):
            score.main(score.arguments().parse_args([*argv, "--", f"--job_endpoint={endpoint}"]))


def test_several_files_may_stand_behind_one_flag(tmp_path):
    files = [write_rows(tmp_path / name, make_rows(6)) for name in ("a.jsonl", "b.jsonl")]
    argv = ["--input", *map(str, files), f"--output={tmp_path}/out", f"--scorers={SCORER}", "--workers=1"]
    score.main(score.arguments().parse_args(argv))
    assert len(rows_of(tmp_path / "out", "score=5")) == 2


class Unloadable:
    """Work whose model can't be loaded; keeps what failed, by job."""

    failures: ClassVar[dict] = {}

    def load(self):
        raise KeyError("a text")

    def run(self, job, loaded):
        raise AssertionError

    def failed(self, job, message):
        self.failures[job] = message


def test_a_worker_never_raises_nor_says_what_a_defect_says():
    beam_jobs.Worker(Unloadable())("job")
    assert Unloadable.failures["job"].startswith("KeyError at test_score_faults.py")


class Unreachable:
    name = fingerprint = "far"
    is_down = True

    def score(self, texts):
        if self.is_down:
            raise OSError("nobody answers")
        return [Verdict(0)] * len(texts)


def test_a_scorer_that_stays_unreachable_is_not_asked_for_every_shard():
    scorer = Unreachable()
    loaded = shard.LoadedScorers([scorer])
    for is_down in (True, True, False, True, True, True):
        loaded.raise_if_unreachable()
        scorer.is_down = is_down
        if not is_down:
            loaded.ask(["a text"])
            continue
        with pytest.raises(OSError, match="scorer far: nobody answers"):
            loaded.ask(["a text"])
    with pytest.raises(OSError, match="not begun after 3 shards that ended so: scorer far: nobody answers"):
        loaded.raise_if_unreachable()


def test_a_backbone_that_lies_elsewhere_now_is_named(tmp_path):
    embedding_folders.write(tmp_path / "then", pooling="mean_tokens")
    backbone = load_backbone(str(tmp_path / "then"), max_tokens=16)
    head, values = {"kernel": np.zeros((backbone.dim, 6)), "bias": np.zeros(6)}, {1: 0.5, 3: 0.5}
    checkpoint.save(str(tmp_path / "c"), backbone, head, calibration.Calibration(values, values, values), {})
    before = load_scorer(f"classifier:{tmp_path}/c").fingerprint
    (tmp_path / "then").rename(tmp_path / "now")
    with pytest.raises(FileNotFoundError, match="c: its backbone is not there"):
        load_scorer(f"classifier:{tmp_path}/c")
    assert load_scorer(f"classifier:{tmp_path}/c?backbone={tmp_path}/now").fingerprint == before
    embedding_folders.write(tmp_path / "other", pooling="mean_tokens", max_position_embeddings=8)
    with pytest.raises(ValueError, match=r"c: its backbone .*other can't be used: max_tokens=16"):
        load_scorer(f"classifier:{tmp_path}/c?backbone={tmp_path}/other")


def test_rows_of_a_shard_under_way_are_counted_for_the_bar(tmp_path, monkeypatch):
    monkeypatch.setattr(shard, "BATCH_ROWS", 2)
    out, seen = OutputFolder(str(tmp_path / "out")), []
    path = write_rows(tmp_path / "web.jsonl", make_rows(5))
    ask = shard.LoadedScorers.ask

    def look(self, texts):
        seen.append(shard.rows_under_way(out))
        return ask(self, texts)

    monkeypatch.setattr(shard.LoadedScorers, "ask", look)
    run(tmp_path / "out", path)
    assert seen == [0, 2, 4]
    assert shard.rows_under_way(out) == 0


def test_a_runner_that_can_not_be_started_says_why(tmp_path, monkeypatch):
    def run_pipeline(self):
        raise LookupError("no program to start it\nand more")

    monkeypatch.setattr(apache_beam.Pipeline, "run", run_pipeline)
    path = write_rows(tmp_path / "web.jsonl", make_rows(3))
    argv = [f"--input={path}", f"--output={tmp_path}/out", f"--scorers={SCORER}", "--runner=flink"]
    with pytest.raises(OSError, match=r"could not be started: LookupError: no program to start it$"):
        score.main(score.arguments().parse_args([*argv, "--", "--flink_master=h:1"]))


def test_a_file_written_after_it_was_scored_is_named(tmp_path, caplog):
    files = [write_rows(tmp_path / name, [{"text": "x" * 200_000}] * 2) for name in ("a.jsonl", "b.jsonl")]
    run(tmp_path / "out", *files)
    run(tmp_path / "out", *files)
    assert "written after" not in caplog.text
    later = (tmp_path / "out" / "_shards" / "train-000001-b.json").stat().st_mtime_ns + 1_000_000_000
    files[1].write_bytes(files[1].read_bytes().replace(b"x" * 1000 + b'"', b"y" * 1000 + b'"', 1))
    os.utime(files[1], ns=(later, later))
    run(tmp_path / "out", *files)
    assert f"1 input files were written after they were scored, the first is {files[1]}" in caplog.text


INTERRUPTED = """
import threading
from safelm import cli
def main(flags):
    threading.Thread(target=threading.Event().wait).start()
    raise KeyboardInterrupt
cli.run(main, cli.parser("safelm.x", "doc", "x"), [])
"""


def test_an_interrupt_ends_a_process_whose_threads_are_still_at_work():
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (130, "python -m safelm.x: interrupted\n")


def test_too_many_malformed_rows_stop_the_run_and_the_corrected_file_is_scored(tmp_path):
    rows, path = make_rows(300), tmp_path / "web.jsonl"
    bad = ['{"id": "x", "text": null}'] * 101
    path.write_text("\n".join([*map(json.dumps, rows), *bad]))
    message = r"web.jsonl: 101 of 401 rows are malformed, more than 100 rows and 1.00%; the first is row 301: field"
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "out", path)
    assert not (tmp_path / "out" / "manifest.json").exists() and not list((tmp_path / "out").rglob("*.jsonl.gz"))
    assert run(tmp_path / "out", path, max_malformed_fraction=0.5)["totals"]["quarantine"] == 101
    path.write_text("\n".join(bad[:21]))
    with pytest.raises(ValueError, match=r"web.jsonl: 21 of 21 rows are malformed, more than half of them"):
        run(tmp_path / "few", path)
    path.write_text("\n".join(map(json.dumps, rows)))
    assert run(tmp_path / "few", path)["totals"]["rows"] == 300
