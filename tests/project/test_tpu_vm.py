"""scripts/tpu/tpu_vm.sh against a gcloud that is a shell script: what it runs, in which order, and how it quotes."""

import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import time

import pytest
from fake_gcloud import Cloud
from fake_gcloud import run as _run

ROOT = pathlib.Path(__file__).parents[2]
TPU = ["--name=pod", "--zone=us-west4-a", "--project=my-project"]
KIND = ["--accelerator-type=v5litepod-256", "--runtime-version=v2-alpha-tpuv5-lite"]
TRAINING = ["--config=configs/smollm2_1b7.py", "--workdir=gs://BUCKET/run"]
WHERE = ["--zone=us-west4-a", "--project=my-project"]


@pytest.fixture
def cloud(tmp_path: pathlib.Path):
    cloud = Cloud(tmp_path)
    yield cloud
    cloud.run("stop", *TPU)


def _dry_run(*arguments: str) -> list[list[str]]:
    """The printed commands, as a shell splits them."""
    command, *rest = arguments
    done = _run(command, "--dry-run", *rest)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines() if not line.startswith("#")]


def _describe() -> list[str]:
    return ["gcloud", "compute", "tpus", "queued-resources", "describe", "pod", "--format=value(state.state)", *WHERE]


def _create(*tier: str) -> list[str]:
    command = ["gcloud", "compute", "tpus", "queued-resources", "create", "pod", "--node-id=pod", *KIND, *tier, *WHERE]
    return command


def test_create():
    assert _dry_run("create", *TPU, *KIND) == [_create()]
    assert _dry_run("create", *TPU, *KIND, "--spot") == [_create("--spot")]
    underscored = [flag.replace("-type", "_type").replace("-version", "_version") for flag in KIND]
    assert _run("create", "--dry_run", *TPU, *underscored).stdout == _run("create", "--dry-run", *TPU, *KIND).stdout
    assert _dry_run("create", *TPU, *KIND, "--reserved", "--wait") == [_create("--reserved"), _describe()]
    more = ["--create-flag=--network=my net", "--create-flag=--internal-ips"]
    assert _dry_run("create", *TPU, *KIND, *more) == [_create("--network=my net", "--internal-ips")]


def test_a_reservation_goes_through_the_alpha_command():
    (command,) = _dry_run("create", *TPU, *KIND, "--reservation=my-reservation")
    assert command == ["gcloud", "alpha", *_create("--reservation=my-reservation")[1:]]


def test_setup_copies_the_commit_to_all_workers_and_installs_the_lean_requirements():
    archive, copy, install = _dry_run("setup", *TPU)
    assert archive == ["git", "archive", "--format=tar.gz", "--output=safelm.tar.gz", "HEAD"]
    vm = ["gcloud", "compute", "tpus", "tpu-vm"]
    assert copy == [*vm, "scp", "safelm.tar.gz", "pod:safelm.tar.gz", "--worker=all", *WHERE]
    assert install[:7] == [*vm, "ssh", "pod", "--worker=all"] and install[8:] == WHERE
    assert '-r requirements-train.txt -c constraints.txt "jax[tpu]"' in install[7]


def test_the_other_commands():
    vm = ["gcloud", "compute", "tpus", "tpu-vm"]
    (tail,) = _dry_run("tail", *TPU, "--worker=3")
    assert tail == [*vm, "ssh", "pod", "--worker=3", "--command=tail -n 50 -F ~/safelm/train.log", *WHERE]
    (delete,) = _dry_run("delete", *TPU)
    assert delete == [*_describe()[:4], "delete", "pod", "--force", "--quiet", *WHERE]
    queued, node, workers = _dry_run("status", *TPU)
    assert queued == _describe()
    assert node == [*vm, "describe", "pod", "--format=value(state)", *WHERE]
    assert workers[4:7] == ["ssh", "pod", "--worker=all"]
    (stop,) = _dry_run("stop", *TPU)
    assert stop[4:7] == ["ssh", "pod", "--worker=all"]


def test_resume_is_delete_create_wait_setup_run():
    expected = [_describe(), *_dry_run("delete", *TPU), _create("--spot"), _describe(), *_dry_run("setup", *TPU)]
    expected += _dry_run("run", *TPU, "--", *TRAINING)
    assert _dry_run("resume", *TPU, *KIND, "--spot", "--", *TRAINING) == expected


SLICES = [*TPU, "--node-count=3"]


def test_several_slices_are_one_request_and_every_command_reaches_them_all():
    queued = ["gcloud", "compute", "tpus", "queued-resources"]
    nodes = ["--node-count=3", "--node-prefix=pod"]
    assert _dry_run("create", *SLICES, *KIND, "--spot") == [
        [*queued, "create", "pod", *nodes, *KIND, "--spot", *WHERE],
    ]
    _, copy, install = _dry_run("setup", *SLICES)
    assert copy == [*queued, "scp", "safelm.tar.gz", "pod:safelm.tar.gz", "--worker=all", "--node=all", *WHERE]
    assert install == [*queued, "ssh", "pod", "--worker=all", install[7], "--node=all", *WHERE]
    assert install[7] == _dry_run("setup", *TPU)[2][7]
    (start,) = _dry_run("run", *SLICES, "--", *TRAINING)
    assert start[:7] == install[:7] and start[8:] == install[8:]
    (tail,) = _dry_run("tail", *SLICES, "--worker=1", "--node=2")
    assert tail[4:] == ["ssh", "pod", "--worker=1", "--command=tail -n 50 -F ~/safelm/train.log", "--node=2", *WHERE]
    described = [command[5] for command in _dry_run("status", *SLICES) if command[3:5] == ["tpu-vm", "describe"]]
    assert described == ["pod-0", "pod-1", "pod-2"]


def test_one_preempted_slice_makes_resume_ask_for_all_of_them_again(cloud: Cloud):
    cloud.answer("ACTIVE", "ACTIVE")
    (cloud.folder / "node-pod-1").write_text("PREEMPTED\n")
    done = cloud.run("resume", *SLICES, *RESUME[4:])
    assert done.returncode == 0, done.stderr
    states = [f"{QUEUED} describe", f"{VM} describe", f"{VM} describe"]
    after = ["delete", "create", "describe", "scp", "ssh", "ssh"]
    assert cloud.verbs() == [*states, *(f"{QUEUED} {verb}" for verb in after)]
    (cloud.folder / "node-pod-1").write_text("READY\n")
    cloud.answer("ACTIVE")
    assert "was not preempted" in cloud.run("resume", *SLICES, *RESUME[4:]).stderr
    assert cloud.run("stop", *SLICES).stdout.count("stopped") == 2


def test_a_dry_run_needs_no_gcloud_and_runs_none(cloud: Cloud):
    for command in ("create", "setup", "tail", "status", "stop", "delete"):
        assert cloud.run(command, "--dry-run", *TPU, *KIND).returncode == 0
    for command in ("run", "resume"):
        assert cloud.run(command, "--dry-run", *TPU, *KIND, "--", *TRAINING).returncode == 0
    assert cloud.calls() == []


def test_without_gcloud_the_error_says_so(tmp_path: pathlib.Path):
    for program in ("bash", "env", "dirname"):
        (tmp_path / program).symlink_to(shutil.which(program))
    done = _run("status", *TPU, path=str(tmp_path))
    assert done.returncode == 1
    assert done.stderr == "tpu_vm.sh status: gcloud is not on PATH: install the Google Cloud CLI\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["create", "--zone=z"], "create: missing --name, --project"),
        (["create", *TPU], "create: missing --accelerator-type, --runtime-version"),
        (["resume", *TPU, "--", *TRAINING], "resume: missing --accelerator-type, --runtime-version"),
        (["status", "--name", "--zone=z"], "status: --name has no value"),
        (["status", "--name=", "--zone=z"], "status: --name has no value"),
        (["status", *TPU, "--zome=z"], "status: unknown flag --zome (flags of the training go after --)"),
        (["status", *TPU, "--zome"], "status: unknown flag --zome (flags of the training go after --)"),
        (["status", *TPU, "pod"], "status: unexpected argument 'pod' (flags of the training go after --)"),
        (["create", *TPU, *KIND, "--spot", "--reserved"], "create: --spot and --reserved exclude each other"),
        (["run", *TPU], "run: missing --config=FILE after --"),
        (["run", *TPU, "--", "--config=a.py"], "run: missing --workdir=gs://... after --"),
        (
            ["run", *TPU, "--", "--config=a.py", "--workdir=runs/a"],
            "run: --workdir must be gs://..., which all workers see and a preemption leaves alone",
        ),
        (["setup", *TPU, "--", *TRAINING], "setup: takes no flags of the training"),
        (["tail", *TPU, "--worker=all"], "tail: --worker is no whole number: 'all'"),
        (["create", *TPU, *KIND, "--node-count=0"], "create: --node-count is no whole number from 1: '0'"),
        (["tail", *TPU, "--node=all"], "tail: --node is no whole number: 'all'"),
        (["create", *TPU, *KIND, "--poll-seconds=1m"], "create: --poll-seconds is no whole number: '1m'"),
    ],
)
def test_bad_input_is_one_line_that_names_the_flag(cloud: Cloud, arguments: list[str], message: str):
    done = cloud.run(*arguments)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"tpu_vm.sh {message}\n")
    assert cloud.calls() == []


def test_help_shows_an_example_and_no_command_is_an_error():
    for arguments in (["--help"], ["help"], ["create", "--help"]):
        done = _run(*arguments)
        assert done.returncode == 0 and "example\n" in done.stdout and "gs://BUCKET" in done.stdout
    for arguments in ([], ["creat"]):
        done = _run(*arguments)
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.splitlines()[-1].endswith("one of create, setup, run, tail, status, stop, resume, delete")


def test_setup_and_run_on_the_workers_carry_every_argument_through_both_shells(cloud: Cloud):
    assert cloud.run("run", *TPU, "--", *TRAINING).returncode == 1  # nothing is installed yet
    done = cloud.run("setup", *TPU)
    assert done.returncode == 0, done.stderr
    odd = ["--config.note=two  words", '--config.quote=it\'s "$HOME" `id` \\ * ~ & ; #', "--config.lines=a\nb", ""]
    done = cloud.run("run", *TPU, "--", *TRAINING, *odd)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("started, pid") == 2

    logs = [cloud.folder / home / "safelm/train.log" for home in ("home0", "home1")]
    _wait_for(lambda: all(log.exists() and "step 1" in log.read_text() for log in logs))
    for home in ("home0", "home1"):
        worker = cloud.folder / home
        assert (worker / "safelm/checkout/safelm/train/run.py").exists()
        venv, lean, package = cloud.calls(f"{home}/uv_calls")
        assert venv == ["venv", "--quiet", "--python", ">=3.11,<3.13", "../venv"]
        assert lean[-5:] == ["-r", "requirements-train.txt", "-c", "constraints.txt", "jax[tpu]"]
        assert package[-3:] == ["--no-deps", "-e", "."]
        check, training = cloud.calls(f"{home}/python_calls")
        assert check == ["-c", "import safelm.train"]
        assert training == ["-u", "-m", "safelm.train", "--distributed", *TRAINING, *odd]
        pid = int((worker / "safelm/train.pid").read_text())
        assert os.getsid(pid) == pid  # detached: the end of the ssh session is not its end

    for command in (["run", *TPU, "--", *TRAINING], ["setup", *TPU]):
        done = cloud.run(*command)
        assert done.returncode == 1 and "already training" in done.stderr
    cloud.answer("ACTIVE")
    status = cloud.run("status", *TPU).stdout.splitlines()
    assert status[:2] == ["queued resource: ACTIVE", "TPU: READY"]
    assert [line.split(": ", 1)[1] for line in status[2:]] == ["training: step 1"] * 2
    assert cloud.run("stop", *TPU).stdout.count("stopped") == 2
    _wait_for(lambda: cloud.run("stop", *TPU).stdout.count("not training") == 2)


def _wait_for(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


RESUME = ["resume", *TPU, *KIND, "--spot", "--poll-seconds=0", "--", *TRAINING]
QUEUED, VM = "queued-resources", "tpu-vm"
SET_UP_AND_RUN = [f"{VM} scp", f"{VM} ssh", f"{VM} ssh"]


@pytest.mark.parametrize(
    ("states", "node", "first"),
    [
        (["SUSPENDED", "WAITING_FOR_RESOURCES", "ACTIVE"], "READY", ["describe", "delete", "create", "describe"]),
        (["SUSPENDING", "SUSPENDED", "ACTIVE"], "READY", ["describe", "describe", "delete", "create"]),
        (["FAILED", "ACTIVE"], "READY", ["describe", "delete", "create"]),
        (["NOT_FOUND", "ACTIVE"], "READY", ["describe", "create"]),
        (["PROVISIONING", "ACTIVE"], "READY", ["describe"]),
        (["ACTIVE", "ACTIVE"], "PREEMPTED", ["describe", f"{VM} describe", "delete", "create"]),
    ],
)
def test_resume_does_what_the_state_asks_for(cloud: Cloud, states: list[str], node: str, first: list[str]):
    cloud.answer(*states, node=node)
    done = cloud.run(*RESUME)
    assert done.returncode == 0, done.stderr
    expected = [verb if " " in verb else f"{QUEUED} {verb}" for verb in [*first, "describe"]]
    assert cloud.verbs() == [*expected, *SET_UP_AND_RUN]
    for call in cloud.calls():
        if call[3] == "create":
            assert ["gcloud", *call] == _create("--spot")


def test_resume_leaves_a_tpu_that_is_there_alone(cloud: Cloud):
    cloud.answer("ACTIVE")
    done = cloud.run(*RESUME)
    assert done.returncode == 0 and "was not preempted" in done.stderr
    assert cloud.verbs() == [f"{QUEUED} describe", f"{VM} describe"]
    cloud.answer("ACTIVE", node="REPAIRING")
    done = cloud.run(*RESUME)
    assert done.returncode == 1 and "REPAIRING" in done.stderr
    assert "delete" not in " ".join(cloud.verbs())


def test_resume_ends_where_the_new_request_fails(cloud: Cloud):
    cloud.answer("SUSPENDED", "PROVISIONING", "FAILED")
    done = cloud.run(*RESUME)
    assert done.returncode == 1 and "became FAILED while waiting" in done.stderr
    assert f"{VM} scp" not in cloud.verbs()


@pytest.mark.parametrize(
    "failing", [f"{QUEUED} describe", f"{QUEUED} delete", f"{QUEUED} create", f"{VM} scp", f"{VM} ssh"]
)
def test_a_gcloud_that_fails_ends_the_command(cloud: Cloud, failing: str):
    cloud.answer("SUSPENDED", "ACTIVE")
    cloud.fail_at(failing)
    done = cloud.run(*RESUME)
    (cloud.folder / "fails").unlink()
    assert done.returncode == 1 and "PERMISSION_DENIED" in done.stderr
    assert cloud.verbs()[-1] == failing and cloud.verbs().count(failing) == 1


def test_shellcheck_finds_nothing():
    beside_python = pathlib.Path(sys.executable).parent / "shellcheck"
    program = str(beside_python) if beside_python.exists() else shutil.which("shellcheck")
    assert program, "shellcheck is not installed: the extra dev brings it"
    scripts = [str(path) for path in [*sorted((ROOT / "scripts").rglob("*.sh")), ROOT / ".ci" / "run"]]
    done = subprocess.run([program, "--format=json", *scripts], capture_output=True, text=True, timeout=60)
    assert json.loads(done.stdout) == []
