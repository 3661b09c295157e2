"""What went wrong in practice when corpora of real size were scored, annotated and joined: a test for each incident."""

import contextlib
import json
import multiprocessing

import pyarrow
import pyarrow.parquet
import pytest
from annotation_runs import annotate, contents, find, rows, work_for
from document_files import write_rows
from scoring_runs import make_rows

from safelm import annotate as annotate_command
from safelm import documents, score
from safelm.documents import annotations
from safelm.io.files import BusyError
from safelm.jobs.array_tasks import ArrayTask
from safelm.jobs.beam_runner import Runner
from safelm.jobs.output import OutputFolder
from safelm.safety.scoring import annotation_rows, annotation_run

SLICES = 3


@pytest.fixture
def web(tmp_path):
    for index in range(7):
        write_rows(tmp_path / f"web/part-{index}.jsonl", make_rows(4 + index, index))
    return tmp_path / "web"


def joined(path, *folders):
    with contextlib.ExitStack() as files:
        found = annotations.FileAnnotations(str(path), annotations.parse(",".join(map(str, folders))), files)
        return [found.join(number, row) for number, row in documents.read_rows(str(path), text_column=None)]


def test_340_gpu_hours_lost_a_barrier_at_the_end_hung_done_markers_were_written_after_it(tmp_path, web):
    """A slice ends, with its records, while others never begin; any later call does the rest and no shard twice."""
    out = tmp_path / "out"
    assert annotate(out, web, array_task=f"1/{SLICES}") is None
    done = {path.name for path in (out / "_shards").glob("*.json")}
    assert 2 <= len(done) <= 3
    for index in range(5):
        (out / "_shards" / f".writing-{index}.json").write_text('{"files"')  # of a slice that was killed
    assert annotate(out, web, array_task=f"1/{SLICES}") is None
    before = contents(out)
    whole = annotate(out, web)
    assert whole["speed"]["shards"] == 7 - len(done) and whole["totals"]["rows"] == sum(range(4, 11))
    assert before.items() <= contents(out).items()
    annotate(tmp_path / "alone", web)
    assert contents(tmp_path / "alone") == contents(out)


def test_a_slice_that_fails_leaves_what_it_did_and_the_last_one_of_all_writes_the_manifest(tmp_path, web):
    write_rows(web / "part-0.jsonl", [{"id": "x", "text": "a page that is refused"}])
    out, failed = tmp_path / "out", []
    for index in (2, 0, 1):
        try:
            assert annotate(out, web, array_task=f"{index}/{SLICES}") is None
        except ValueError as error:
            failed.append((index, str(error)))
    ((index, message),) = failed
    assert "part-0.jsonl: scorer level: an error whose message quotes a document; finished shards are kept" in message
    assert len(list((out / "_shards").glob("*"))) == 6
    write_rows(web / "part-0.jsonl", make_rows(2))
    assert annotate(out, web, array_task=f"{index}/{SLICES}")["totals"]["rows"] == sum(range(5, 11)) + 2


@pytest.mark.parametrize("task", ["3/3", "4/3", "0/0", "1", "-1/3", "a/b", "1/3/5"])
def test_a_slice_that_there_is_not_is_refused(tmp_path, web, task):
    with pytest.raises(ValueError, match=f"--array_task={task}: "):
        annotate(tmp_path / "out", web, array_task=task)


def test_slices_share_the_shards_without_rest_and_by_size():
    sizes = [5, 1, 9, 9, 2, 7, 3]
    slices = [ArrayTask(index, 3).of(sizes, float) for index in range(3)]
    assert sorted(size for own in slices for size in own) == sorted(sizes)
    assert max(map(sum, slices)) - min(map(sum, slices)) <= max(sizes)


def test_merge_by_id_failed_an_id_twice_with_different_scores_one_none(tmp_path):
    given = [
        {"id": identity, "text": f"level{level}", "n": level}
        for identity, level in [("a", 0), ("a", 5), (None, 3), ("b", 1), (None, 4), ("a", 2)]
    ]
    for name in ("web.parquet", "lines.jsonl"):
        path = write_rows(tmp_path / name, given, row_group_size=2)
        annotate(tmp_path / f"out_{path.stem}", path)
        found = joined(path, tmp_path / f"out_{path.stem}")
        assert [row["harm_score"] for row in found] == [row["n"] for row in given]
        assert [row["id"] for row in found] == [row["id"] for row in given]


def test_source_null_in_some_files_source_string_in_others(tmp_path):
    kinds = {"null": pyarrow.null(), "string": pyarrow.string(), "struct": pyarrow.struct([("x", pyarrow.null())])}
    for name, kind in kinds.items():
        table = pyarrow.table(
            {"text": ["level1", "level2"], "source": pyarrow.array([None, None], kind), "extra": [[1], None]}
        )
        pyarrow.parquet.write_table(table, tmp_path / f"{name}.parquet")
    annotate(tmp_path / "out", tmp_path / "*.parquet")
    join(tmp_path / "joined", tmp_path / "*.parquet", tmp_path / "out")
    for name, kind in kinds.items():
        found = pyarrow.parquet.read_table(tmp_path / f"joined/{name}.parquet")
        assert found.schema.field("source").type == kind
        assert found.column("harm_score").to_pylist() == [1, 2]


def test_only_the_columns_asked_for_are_read(tmp_path, monkeypatch):
    path = write_rows(tmp_path / "web.parquet", make_rows(5))
    asked = []
    real = documents.iter_parquet

    def watched(path, columns, **options):
        return real(path, lambda table: asked.append(columns(table)) or asked[-1], **options)

    monkeypatch.setattr(documents, "iter_parquet", watched)
    list(annotation_rows.read(str(path), None, "text", "id", 1, lambda row: None))
    assert asked == [["text", "id"]]


def test_a_single_huge_parquet_file_stalled_a_node_for_an_hour_nodes_ran_out_of_memory_at_20_workers(tmp_path):
    """One file is many shards; what is held of it depends on bytes, not on rows."""
    given = [{"id": str(i), "text": f"level{i % 6} " * (4000 if i % 100 else 400_000)} for i in range(400)]
    path = write_rows(tmp_path / "web.parquet", given, row_group_size=100)
    (file,) = find(path)
    manifest = annotation_run.annotate([file], work_for(tmp_path / "out"), Runner(workers=1), 1)
    assert manifest["speed"]["shards"] == 4 and manifest["totals"]["rows"] == 400
    blocks = annotation_rows.read(str(path), None, "text", "id", 512, lambda row: None)
    held = [sum(map(len, block.texts)) for block in blocks]
    assert max(held) <= (8 << 20) + 3 * max(len(row["text"]) for row in given)


KINDS = {
    "large_string": pyarrow.large_string(),
    "string_view": pyarrow.string_view(),
    "dictionary": pyarrow.dictionary(pyarrow.int32(), pyarrow.large_string()),
}


@pytest.mark.parametrize("kind", KINDS)
def test_arrow_offsets_overflowed_beyond_2_gb_of_strings(tmp_path, kind):
    """large_string in, large_string out; 2.2 GB of text in 70 rows, which a dictionary makes cheap to write."""
    long, short = "level4 " + "x" * (32 << 20), "level2"
    if kind == "dictionary":
        column = pyarrow.DictionaryArray.from_arrays(
            pyarrow.array([0] * 69 + [1], pyarrow.int32()), pyarrow.array([long, short], pyarrow.large_string())
        )
    else:
        column = pyarrow.array([long[:1000], None, short], KINDS[kind])
    table = pyarrow.table({"text": column, "meta": pyarrow.array([["a"]] * len(column))})
    pyarrow.parquet.write_table(table, tmp_path / "web.parquet")
    annotate(tmp_path / "out", tmp_path / "web.parquet")
    found = pyarrow.parquet.read_table(tmp_path / "out/web.parquet")
    if kind == "dictionary":
        assert found["harm_score"].to_pylist() == [4] * 69 + [2] and found["flags"].to_pylist()[:2] == ["cut"] * 2
        return
    join(tmp_path / "joined", tmp_path / "web.parquet", tmp_path / "out")
    whole = pyarrow.parquet.read_table(tmp_path / "joined/web.parquet")
    assert whole.schema.field("text").type == KINDS[kind] and whole.column("text").to_pylist() == column.to_pylist()
    assert whole.column("harm_score").to_pylist() == [4, None, 2]


CHANGED = {
    "text_column": ("n", "--text_column text, now it is n"),
    "max_chunks": (7, "--max_chunks 512, now it is 7"),
    "part_mb": (1, "--part_mb, in bytes: 268435456, now it is 1048576"),
    "scorers": ("python:scorers_for_tests:LevelScorer?offset=1", "--scorers {'fingerprint': 'level-0'"),
    "id_column": ("n", "--id_column id, now it is n"),
}


@pytest.mark.parametrize("flag", CHANGED)
@pytest.mark.parametrize("task", [{}, {"array_task": "1/2"}])
def test_a_run_s_parameters_changed_between_submits(tmp_path, web, flag, task):
    annotate(tmp_path / "out", web, array_task="0/2")
    value, message = CHANGED[flag]
    with pytest.raises(ValueError, match="was begun with") as caught:
        annotate(tmp_path / "out", web, **task, **{flag: value})
    assert message in str(caught.value)


def _hold(root, slice_, held, end):
    out = OutputFolder(root)
    with out.only_writer_of_slice(*slice_) if slice_ else out.only_writer():
        held.set()
        end.wait(60)


@pytest.mark.parametrize(
    ("other", "own", "message"),
    [
        (None, {}, "another process is writing there"),
        (None, {"array_task": "0/2"}, "another process is writing there"),
        ((0, 2), {"array_task": "0/2"}, "writing there, slice 0 of 2"),
        ((0, 2), {"array_task": "0/3"}, r"a slice of another count \(0-of-2\)"),
        ((0, 2), {}, "another process is writing there"),
        ((0, 2), {"array_task": "1/2"}, ""),
    ],
)
def test_two_pollers_wrote_one_output(tmp_path, web, other, own, message):
    fork = multiprocessing.get_context("fork")
    held, end = fork.Event(), fork.Event()
    holder = fork.Process(target=_hold, args=(str(tmp_path / "out"), other, held, end))
    holder.start()
    try:
        assert held.wait(60)
        with pytest.raises(BusyError, match=message) if message else contextlib.nullcontext():
            assert annotate(tmp_path / "out", web, **own) is None
    finally:
        end.set()
        holder.join(60)
    assert bool(contents(tmp_path / "out")) == (not message)


def test_a_dry_run_prints_the_plan_and_a_script_and_writes_nothing(tmp_path, web, capsys, monkeypatch):
    command = ["score.py", f"--input={web}", f"--output={tmp_path}/out", "--output_rows=annotations", "--dry-run"]
    monkeypatch.setattr("sys.argv", [*command, "--array_task=0/4"])
    score.main(score.arguments().parse_args([*command[1:], "--array_task=0/4"]))
    printed = capsys.readouterr().out
    assert "7 files" in printed and "#SBATCH --array=0-3" in printed and "--dry" not in printed
    assert "--array_task=$SLURM_ARRAY_TASK_ID/4\n" in printed and not (tmp_path / "out").exists()


def join(output, pattern, *folders):
    argv = ["--join", f"--input={pattern}", f"--output={output}", "--workers=1"]
    argv += [f"--annotations={','.join(map(str, folders))}"]
    annotate_command.main(annotate_command.arguments().parse_args(argv))
    return json.loads((output / "manifest.json").read_text())


def test_rows_of_all_files_are_counted_once(tmp_path, web):
    manifest = annotate(tmp_path / "out", web)
    assert manifest["totals"]["rows"] == sum(len(rows(tmp_path / "out" / name)) for name in contents(tmp_path / "out"))
    assert sum(manifest["scores"].values()) == manifest["totals"]["rows"]
