"""Annotating at real size: work grows with the number of shards, not with its square; what is held is bounded."""

import sys

import numpy as np
import pytest
from annotation_runs import work_for
from document_files import write_rows
from hypothesis import given
from hypothesis import strategies as st
from scoring_runs import make_rows

from safelm import documents
from safelm.documents import DocumentFile, annotations
from safelm.jobs.array_tasks import ArrayTask
from safelm.jobs.output import OutputFolder
from safelm.safety.scoring import annotation_plan, annotation_rows
from safelm.safety.scoring.answers import Answers


def calls(function) -> int:
    """How many Python and C functions are called meanwhile: the same every time, unlike seconds."""
    count = 0

    def profile(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    former = sys.getprofile()
    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(former)
    return count


def test_many_files_are_listed_and_planned_without_quadratic_work(tmp_path, monkeypatch):
    monkeypatch.setattr(annotation_plan, "side_by_side", lambda function, values: list(map(function, values)))
    monkeypatch.setattr(annotation_plan, "split", lambda file, part_bytes: [None])
    monkeypatch.setattr(annotations, "input_facts", lambda file: {"bytes": file.bytes, "sha256": "0"})

    def plan(count, turn):
        files = [DocumentFile(f"/web/{i % 10}/part-{i:07d}.parquet", 100 + i) for i in range(count)]
        out = OutputFolder(str(tmp_path / f"{turn}-{count}"))
        work = work_for(out.root)
        once = calls(lambda: annotation_plan.make_plan(out, work, files, 1 << 20, None))
        slices = calls(lambda: annotation_plan.make_plan(out, work, files, 1 << 20, ArrayTask(1, 4)))
        return np.array([once, slices])

    plan(10, "warm")
    few, many = plan(300, "few"), plan(1200, "many")
    assert np.all(many < 4.4 * few), (few, many)

    def listed(count):
        for i in range(count):
            write_rows(tmp_path / f"web{count}/{i % 7}/{i}.jsonl", make_rows(1))
        return calls(lambda: documents.find(str(tmp_path / f"web{count}")))

    assert listed(400) < 4.4 * listed(100)


def test_what_is_remembered_of_texts_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("safelm.safety.scoring.answers.REMEMBERED", 64)
    path = write_rows(tmp_path / "web.jsonl", make_rows(3000))
    work = work_for(tmp_path / "out")
    answers = Answers(work.columns, work.load(), lambda row: None)
    monkeypatch.setattr(annotation_rows, "_BLOCK_ROWS", 16)
    monkeypatch.setattr("safelm.safety.scoring.shard.BATCH_ROWS", 16)
    blocks = annotation_rows.read(str(path), None, "text", "id", 1, lambda row: None)
    rows = sum(len(block.texts) for block, _ in answers.rows(blocks))
    assert rows == 3000 == answers.asked
    assert len(answers._slots) == 64 and len(answers._value_SC) == 1024


@given(numbers=st.lists(st.integers(0, 12), max_size=120), block_rows=st.integers(1, 5), remembered=st.integers(1, 6))
def test_every_row_gets_the_scores_of_its_own_text_whatever_is_remembered(numbers, block_rows, remembered):
    """Against the texts themselves: right in every row, and a text is asked about again only where it may be."""
    work = work_for("/nowhere")
    blocks = [
        annotation_rows.Block(
            np.arange(at, at + len(some)), None, [f"level{n % 6} {n}".encode() for n in some], np.zeros(len(some), bool)
        )
        for at in range(0, len(numbers), block_rows)
        if (some := numbers[at : at + block_rows])
    ]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("safelm.safety.scoring.answers.REMEMBERED", remembered)
        patched.setattr("safelm.safety.scoring.answers._FLUSH_ROWS", 8)
        patched.setattr("safelm.safety.scoring.shard.BATCH_ROWS", 4)
        answers = Answers(work.columns, work.load(), lambda row: None)
        found = [value for _, value_NC in answers.rows(iter(blocks)) for value in value_NC[:, 1].tolist()]
    assert found == [n % 6 for n in numbers]
    between = [_others_since(numbers, at) for at in range(len(numbers))]
    assert len(set(numbers)) <= answers.asked <= sum(others is None or others >= remembered for others in between)
    assert len(answers._slots) <= remembered


def _others_since(numbers, at):
    """How many other numbers came since the last copy of one; None where there is none."""
    earlier = [index for index in range(at) if numbers[index] == numbers[at]]
    return len(set(numbers[earlier[-1] + 1 : at])) if earlier else None
