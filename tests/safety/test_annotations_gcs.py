"""Annotations in a bucket of a corpus in a bucket: by workers and by slices, stopped and resumed, the local files."""

import json

import fsspec
import gcs_server
import pytest
from annotation_runs import annotate, contents
from document_files import write_rows
from scoring_runs import make_rows

from safelm import score
from safelm.documents import annotations, iter_rows
from safelm.io import remote

SCORER = "python:scorers_for_tests:LevelScorer"


def run(bucket, output, *flags):
    argv = [f"--input={bucket}/web", f"--output={bucket}/{output}", "--output_rows=annotations", f"--scorers={SCORER}"]
    score.main(score.arguments().parse_args([*argv, "--part_mb=1", *flags]))


def in_bucket(name):
    files, url = fsspec.filesystem("gs"), f"gs://{gcs_server.BUCKET}/{name}"
    return {
        each: files.cat_file(f"{gcs_server.BUCKET}/{name}/{each}")
        for each in gcs_server.names(url)
        if each.endswith(".parquet")
    }


def test_a_bucket_in_and_out_by_slices_or_stopped_and_resumed_gives_the_local_files(tmp_path, monkeypatch):
    rows = [row | {"text": f"{row['text']} " + "x" * 9000} for row in make_rows(300)]
    write_rows(tmp_path / "web/large.jsonl", rows)  # in parts, which are put together
    write_rows(tmp_path / "web/a.parquet", make_rows(20))
    write_rows(tmp_path / "web/sub/b.jsonl.gz", make_rows(20))
    annotate(tmp_path / "local", tmp_path / "web", part_mb=1)
    wanted = contents(tmp_path / "local")
    with gcs_server.emulator() as endpoint, gcs_server.clients_at(endpoint):
        bucket = f"gs://{gcs_server.BUCKET}"
        gcs_server.upload(tmp_path / "web", f"{bucket}/web")
        real, uploads = remote.upload, []

        def breaks_off(local, target):
            uploads.append(target)
            if len(uploads) == 3:
                raise OSError(f"{target}: can't write")
            real(local, target)

        monkeypatch.setattr(remote, "upload", breaks_off)
        with pytest.raises((ValueError, OSError), match="can't write"):
            run(bucket, "out", "--workers=1")
        assert "manifest.json" not in gcs_server.names(f"{bucket}/out")
        first, uploads[:] = list(uploads), []
        monkeypatch.setattr(remote, "upload", lambda local, target: (uploads.append(target), real(local, target))[1])
        run(bucket, "out", "--workers=1")
        again = {name for name in uploads if name.endswith(".parquet")}
        assert again == {first[2], f"{bucket}/out/large.parquet"}  # what failed, and the parts put together
        for index in range(3):
            run(bucket, "slices", f"--array_task={index}/3")
        found, slices = in_bucket("out"), in_bucket("slices")
        manifests = [
            json.loads(fsspec.filesystem("gs").cat_file(f"{gcs_server.BUCKET}/{name}/manifest.json"))
            for name in ("out", "slices")
        ]
        folders = annotations.parse(f"{bucket}/out")
        joined = [
            row.values for row in iter_rows(f"{bucket}/web/a.parquet", print, text_column="text", annotated=folders)
        ]
    assert wanted and found == wanted == slices
    assert [manifest["totals"]["rows"] for manifest in manifests] == [340, 340]
    assert [row["harm_score"] for row in joined] == [at % 6 for at in range(20)]
