"""safelm.synthesize from a bucket into a bucket: stopped in the middle, it goes on and gives the local files."""

import json

import fsspec
import gcs_server
import pytest
from document_files import write_rows
from synthesis_runs import NAMES, SCORER, TROUBLED, data, no_charts, rows_of, run

from safelm import synthesize
from safelm.safety.synthesis import journal


@pytest.fixture(autouse=True)
def without_charts(monkeypatch):
    no_charts(monkeypatch)


def test_a_bucket_in_and_out_stopped_and_resumed_gives_the_local_files(tmp_path, monkeypatch):
    rows = rows_of((1, 2, 3), 18)
    for at, name in enumerate(NAMES):
        write_rows(tmp_path / "in" / f"{name}.jsonl", rows[6 * at : 6 * at + 6])
    run(tmp_path / "local", tmp_path / "in", "--review=3", writer=TROUBLED)
    monkeypatch.setattr(journal, "_SYNC_REPLIES", {False: 1, True: 4})
    with gcs_server.emulator() as endpoint, gcs_server.clients_at(endpoint):
        bucket, files = f"gs://{gcs_server.BUCKET}", fsspec.filesystem("gs")
        for path in (tmp_path / "in").iterdir():
            files.pipe_file(f"{gcs_server.BUCKET}/in/{path.name}", path.read_bytes())
        log = tmp_path / "log"
        writer = f"{TROUBLED}?trouble=outage&after=11&cure={tmp_path}/cure&log={log}"
        argv = ["--kind=safeweb", f"--input={bucket}/in", f"--output={bucket}/out", f"--writer={writer}"]
        flags = synthesize.arguments().parse_args([*argv, f"--scorer={SCORER}", "--workers=1", "--review=3"])
        with pytest.raises(ValueError, match="the endpoint is down"):
            synthesize.main(flags)
        assert not [name for name in gcs_server.names(f"{bucket}/out") if name.endswith(".jsonl.gz")]
        assert [name for name in gcs_server.names(f"{bucket}/out") if name.startswith("_journal/")]
        (tmp_path / "cure").touch()
        synthesize.main(flags)
        keys = [json.loads(line)[1] for line in open(log)]
        assert len(keys) == len(set(keys))  # what was answered is not asked for again
        names = [name for name in gcs_server.names(f"{bucket}/out") if name.endswith(".jsonl.gz")]
        found = {name: files.cat_file(f"{gcs_server.BUCKET}/out/{name}") for name in names}
        there = gcs_server.names(f"{bucket}/out")
    expected = {name: content for name, content in data(tmp_path / "local").items() if name.endswith(".jsonl.gz")}
    assert expected and found == expected
    assert {"report/report.html", "report/report.json", "report/review_pairs.jsonl", "manifest.json"} <= set(there)
    assert not [name for name in there if name.startswith("_") and name != "_settings.json"]
