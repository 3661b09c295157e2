"""Scoring on real worker processes, job services and buckets: killed, resumed, and the same files whatever ran them."""

import contextlib
import functools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import gcs_server
import pytest
from apache_beam.options.pipeline_options import (
    DirectOptions,
    FlinkRunnerOptions,
    GoogleCloudOptions,
    PortableOptions,
    SparkRunnerOptions,
    WorkerOptions,
)
from document_files import write_rows
from scoring_runs import SCORER, data, make_rows, run

from safelm import score
from safelm.jobs import beam_runner
from safelm.jobs.beam_runner import Runner

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests/helpers")]), "JAX_PLATFORMS": "cpu"}
SHARDS = 12


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Files of rows, one of them malformed in each, and the output of scoring them in this process."""
    folder = tmp_path_factory.mktemp("corpus")
    for index in range(SHARDS):
        write_rows(folder / f"web-{index:02d}.jsonl", [*make_rows(25, 100 * index), {"id": "bad"}])
    manifest = run(folder / "scored", folder / "*.jsonl")
    return folder, data(folder / "scored"), manifest


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


def comparable(manifest):
    """A manifest without what depends on the clock."""
    shards = [{key: value for key, value in shard.items() if key != "seconds"} for shard in manifest["shards"]]
    return manifest | {"shards": shards, "speed": None, "scorers": [s | {"spec": ""} for s in manifest["scorers"]]}


def test_a_run_killed_anywhere_ends_with_the_same_files(corpus, tmp_path):
    folder, expected, manifest = corpus
    wanted = random.Random(os.urandom(8)).randrange(1, SHARDS)
    argv = [sys.executable, "-m", "safelm.score", f"--input={folder}/*.jsonl", f"--output={tmp_path}/out"]
    argv += [f"--scorers={SCORER}?pause=0.02", "--workers=2"]
    process = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    records = tmp_path / "out" / "_shards"
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if records.exists() and len(list(records.glob("*.json"))) >= wanted:
            break
        time.sleep(0.01)
    time.sleep(random.random() * 0.5)
    process.kill()
    errors = process.communicate()[1]
    left = len(list(records.glob("*.json")))
    assert left >= wanted, errors
    assert left == SHARDS or not (tmp_path / "out" / "manifest.json").exists()
    again = run(tmp_path / "out", folder / "*.jsonl")
    assert data(tmp_path / "out") == expected
    assert comparable(again) == comparable(manifest)
    assert again["speed"]["shards"] < SHARDS
    assert not (tmp_path / "out" / "_staging").exists()


def test_worker_processes_load_once_and_one_that_dies_is_a_clear_error(corpus, tmp_path, capfd):
    folder, expected, manifest = corpus
    (tmp_path / "kill").touch()
    spec = f"{SCORER}?kill={tmp_path}/kill&loads={tmp_path}/loads"
    with pytest.raises(OSError, match=r"a worker process died .* finished shards are kept"):
        run(tmp_path / "out", folder / "*.jsonl", workers=2, scorers=spec)
    loads = (tmp_path / "loads").read_text().split()
    assert loads[0] == str(os.getpid())
    assert 2 <= len(loads) == len(set(loads)) <= 3
    again = run(tmp_path / "out", folder / "*.jsonl")
    assert data(tmp_path / "out") == expected
    assert comparable(again) == comparable(manifest)
    assert "Document" not in "".join(capfd.readouterr())


@contextlib.contextmanager
def job_service(folder):
    """The port of a Beam job service in a process of its own."""
    port_file = folder / "port"
    argv = [sys.executable, "-m", "apache_beam.runners.portability.local_job_service_main", f"--port_file={port_file}"]
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(argv, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 120
        while not port_file.exists() or not port_file.read_text().strip():
            assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.05)
        yield port_file.read_text().strip()
    finally:
        process.terminate()
        process.wait(30)


@pytest.mark.slow
def test_the_portable_runner_with_a_job_service_gives_the_same_files(corpus, tmp_path):
    folder, expected, manifest = corpus
    with job_service(tmp_path) as port:
        argv = [f"--input={folder}/*.jsonl", f"--output={tmp_path}/out", f"--scorers={SCORER}", "--runner=portable"]
        score.main(score.arguments().parse_args([*argv, "--", f"--job_endpoint=localhost:{port}"]))
    again = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert again["speed"]["runner"] == "portable"
    assert data(tmp_path / "out") == expected
    assert comparable(again) == comparable(manifest)
    assert "Document" not in (tmp_path / "log").read_text()


def test_a_bucket_in_and_out_gives_the_same_files_and_is_resumed(corpus, tmp_path):
    folder, expected, manifest = corpus
    with gcs_server.emulator() as endpoint, gcs_server.clients_at(endpoint):
        bucket = f"gs://{gcs_server.BUCKET}"
        for path in sorted(folder.glob("*.jsonl")):
            fsspec.filesystem("gs").pipe_file(f"{gcs_server.BUCKET}/in/{path.name}", path.read_bytes())
        argv = [f"--input={bucket}/in/*.jsonl", f"--output={bucket}/out", f"--scorers={SCORER}", "--workers=1"]
        flags = score.arguments().parse_args(argv)
        score.main(flags)
        files = fsspec.filesystem("gs")

        def scored():
            names = [name for name in gcs_server.names(f"{bucket}/out") if not name.startswith("_")]
            return {name: files.cat_file(f"{gcs_server.BUCKET}/out/{name}") for name in names}

        first = scored()
        whole = json.loads(first.pop("manifest.json"))
        rows = {name: content for name, content in expected.items() if not name.startswith("quarantine")}
        assert {name: content for name, content in first.items() if not name.startswith("quarantine")} == rows
        assert whole["totals"] == manifest["totals"]
        assert all(entry["version"] and entry["path"].startswith(bucket) for entry in whole["input"])

        files.rm(f"{gcs_server.BUCKET}/out/score=3/train-000004-web-04.jsonl.gz")
        files.rm(f"{gcs_server.BUCKET}/out/_shards/train-000007-web-07.json")
        files.pipe_file(f"{gcs_server.BUCKET}/out/unscored/000007-web-07.jsonl.gz", b"of another try")
        score.main(flags)
        second = scored()
        assert json.loads(second.pop("manifest.json"))["speed"]["shards"] == 2
        assert second == first


def test_flags_become_the_options_of_each_runner(monkeypatch):
    """Flink, Spark and Dataflow do not run here: what they are handed is all that is tested."""
    local = beam_runner.pipeline_options(Runner("local", workers=3), 100)
    assert local.view_as(DirectOptions).direct_num_workers == 3
    assert beam_runner.local_workers(Runner("local", workers=3), 2) == 2
    assert beam_runner.local_workers(Runner(), 1000) == len(os.sched_getaffinity(0))
    monkeypatch.delattr(os, "sched_getaffinity")  # as on macOS
    assert beam_runner.local_workers(Runner(), 1000) == os.cpu_count()

    portable = beam_runner.pipeline_options(Runner("portable"), 1).view_as(PortableOptions)
    assert (portable.job_endpoint, portable.environment_type) == ("embed", "LOOPBACK")
    flags = ("--job_endpoint=h:1", "--environment_type=EXTERNAL", "--environment_config=h:2")
    portable = beam_runner.pipeline_options(Runner("portable", 4, flags), 1).view_as(PortableOptions)
    assert (portable.job_endpoint, portable.environment_type) == ("h:1", "EXTERNAL")
    assert portable.sdk_worker_parallelism == "4"

    flags = ("--flink_master=h:8081", "--environment_type=DOCKER", "--environment_config=registry/safelm")
    flink = beam_runner.pipeline_options(Runner("flink", 16, flags), 1)
    assert flink.view_as(FlinkRunnerOptions).flink_master == "h:8081"
    assert flink.view_as(FlinkRunnerOptions).parallelism == 16
    assert flink.view_as(PortableOptions).environment_config == "registry/safelm"

    spark = beam_runner.pipeline_options(Runner("spark", 0, ("--spark_master_url=spark://h:7077",)), 1)
    assert spark.view_as(SparkRunnerOptions).spark_master_url == "spark://h:7077"

    flags = ("--project=p", "--region=r", "--temp_location=gs://b/tmp", "--sdk_container_image=registry/safelm")
    dataflow = beam_runner.pipeline_options(Runner("dataflow", 8, flags), 1)
    assert dataflow.view_as(GoogleCloudOptions).project == "p"
    assert dataflow.view_as(WorkerOptions).max_num_workers == 8
    assert dataflow.view_as(WorkerOptions).sdk_container_image == "registry/safelm"

    for runner, message in [
        (Runner("spark"), "--runner=spark needs --spark_master_url=... or --job_endpoint"),
        (Runner("dataflow", 0, ("--project=p", "--region=r")), "--runner=dataflow needs --temp_location"),
    ]:
        with pytest.raises(ValueError, match=message):
            beam_runner.pipeline_options(runner, 1)
    with pytest.raises(ValueError, match="Spark decides"):
        Runner("spark", 2)


@pytest.mark.slow
def test_an_interrupt_ends_the_workers(corpus, tmp_path):
    folder, _, _ = corpus
    argv = [sys.executable, "-m", "safelm.score", f"--input={folder}/*.jsonl", f"--output={tmp_path}/out"]
    argv += [f"--scorers={SCORER}?pause=0.5&loads={tmp_path}/loads", "--workers=2"]
    listens = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # tests in the background ignore it
    process = subprocess.Popen(
        argv, stderr=subprocess.PIPE, text=True, cwd=ROOT, preexec_fn=listens, start_new_session=True
    )
    loads = tmp_path / "loads"
    deadline = time.monotonic() + 120
    while (not loads.exists() or len(loads.read_text().split()) < 3) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers too
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == 130, errors
    assert errors.splitlines()[-1].endswith("interrupted")
    assert "Traceback" not in errors
