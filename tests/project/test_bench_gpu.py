"""The benchmark of a GPU: what parts come to, what is run again, that its budgets add up, and two parts on the CPU."""

import argparse
import json
import runpy
import sys

import documented
import pytest

BENCH = documented.ROOT / "scripts/bench"
gpu = argparse.Namespace(**runpy.run_path(str(BENCH / "gpu.py")))
MACHINE = {
    "device": "chip",
    "platform": "cpu",
    "peak_flops": 1e6,
    "product_flops": 5e8,
    "driver": None,
    "cores": 2,
    "system": "s",
    "python": "3",
    "versions": {"jax": "0"},
    "torch_cuda": None,
}
SIDE = {"tokens": 1000, "num_params": 10, "flops_per_token": 60, "peak_flops": 1e6, "losses": [1.0]}


def script(folder, name: str, text: str) -> "gpu.Part":
    (folder / f"{name}.py").write_text(text)
    return gpu.Part(name, (str(folder / f"{name}.py"),), 60)


def side(name: str, milliseconds: float, **changes) -> str:
    return json.dumps({"shape": "x", "side": name, **SIDE, "ms": [milliseconds], **changes})


def test_the_budgets_of_all_parts_end_under_eight_minutes():
    for small in (False, True):
        assert sum(part.seconds for part in gpu.plan(small=small)) <= gpu.TOTAL_SECONDS < 480


def test_a_part_that_fails_lacks_or_hangs_is_told_with_what_it_had_said(tmp_path):
    said = f"print({side('safelm', 20)!r}, flush=True)\n"
    parts = {
        gpu.FAILED: script(tmp_path, "train_a", said + "raise ValueError('no such product')"),
        gpu.MISSING: script(
            tmp_path, "train_b", said + "print('MISSING PyTorch is not installed')\nraise SystemExit(3)"
        ),
        gpu.LATE: script(tmp_path, "train_c", said + "import time\ntime.sleep(60)"),
        gpu.DONE: script(tmp_path, "train_d", said),
    }
    found = {status: gpu.run_part(part, 3, {}, tmp_path / "log") for status, part in parts.items()}
    assert {status: part["status"] for status, part in found.items()} == {status: status for status in parts}
    assert "no such product" in found[gpu.FAILED]["reason"] and "PyTorch" in found[gpu.MISSING]["reason"]
    assert all(part["result"]["sides"]["safelm"]["ms"] == [20] for part in found.values())
    lacking = script(tmp_path, "train_e", said + "print('litgpt skipped: no litgpt')")
    assert gpu.run_part(lacking, 3, {}, tmp_path / "log")["status"] == gpu.MISSING


def test_the_report_has_ratios_and_utilisation_and_says_when_a_peak_is_unknown():
    sides = {name: json.loads(side(name, ms)) for name, ms in (("safelm", 100), ("pytorch", 150))}
    parts = {"train_x": {"status": gpu.DONE, "seconds": 1.0, "result": {"sides": sides}}}
    page = gpu.markdown({"small": True, "machine": MACHINE, "parts": parts})
    assert gpu.SMALL_NOTE in page
    assert "| pytorch | 6,667 | 40.0% | 150.0 [150.0, 150.0] | 1.50 |" in page
    for record in sides.values():
        record["peak_flops"] = None
    page = gpu.markdown({"small": False, "machine": MACHINE | {"peak_flops": None}, "parts": parts})
    assert "| pytorch | 6,667 | – |" in page and "no MFU" in page and gpu.SMALL_NOTE not in page


def test_what_is_done_is_not_run_again_and_the_exit_code_tells(tmp_path, monkeypatch):
    ran = []

    def run_part(part, seconds, environ, log):
        if part.name == "machine":
            return {"status": gpu.DONE, "result": MACHINE, "seconds": 1}
        ran.append(part.name)
        status = gpu.FAILED if part.name == "decode" and ran.count("decode") == 1 else gpu.DONE
        return {"status": status, "result": {}, "seconds": 1}

    monkeypatch.setitem(gpu.run.__globals__, "run_part", run_part)
    args = gpu.argument_parser().parse_args(["--small", f"--output={tmp_path}"])
    assert (gpu.run(args), gpu.run(args), gpu.run(args)) == (1, 0, 0)
    assert ran == ["parity", "train_smoke", "decode", "scoring", "decode"]
    assert json.loads((tmp_path / "results.json").read_text())["parts"]["decode"]["status"] == gpu.DONE
    monkeypatch.setitem(MACHINE, "device", "another")
    with pytest.raises(ValueError, match="begun on chip, this is another"):
        gpu.run(args)


@pytest.mark.slow
def test_the_parts_run_on_a_cpu_and_are_marked_small(tmp_path):
    args = gpu.argument_parser().parse_args(["--small", f"--output={tmp_path}", "--parts=scoring"])
    assert gpu.run(args) == 0
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["small"] and found["parts"]["scoring"]["result"]["sides"]["MiniLM-L6"]["tokens_per_s"] > 0
    assert sys.version.startswith(found["machine"]["python"])
