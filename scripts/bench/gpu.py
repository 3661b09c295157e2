"""SafeLM on one GPU in under 8 minutes: parity, training with MFU, decoding, scoring, beside PyTorch and transformers.

    scripts/bench/gpu.sh                                # on a machine with a GPU: installs what lacks, then runs this
    python scripts/bench/gpu.py --small                 # a minute on a CPU: the same parts at sizes that say nothing
    python scripts/bench/gpu.py --parts=parity,train_1b7 --seconds=300

Each part is a process with a budget of seconds; one that fails, lacks a package or runs out of time is reported so and
the others go on. What it has told by then counts: a side of training is kept as soon as it is done. The same command
again runs only what is not done. OUTPUT/results.json has every figure, OUTPUT/results.md the tables.

MFU divides by the dense bfloat16 rate in `safelm.train.metrics.PEAK_FLOPS`, not checked against data sheets; of a
device that is not in that table no MFU is told. Exit code 0: every part is done; 1: some are not; 2: bad input, or no
GPU.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safelm import cli
from safelm.io import files, records
from safelm.report import table

HERE = Path(__file__).resolve().parent
TOTAL_SECONDS = 470  # under 8 minutes, the report included
DONE, MISSING, FAILED, LATE, UNBEGUN = "done", "lacks a package", "failed", "out of time", "not begun"
SIDES = "pytorch, torch.compile;transformers"
_RIVALS = ("litgpt", "pytorch", "transformers")  # those of train.py
_KNOWN_SIDES = tuple(f"{rival}{how}" for rival in _RIVALS for how in ("", ", torch.compile"))
SMALL_NOTE = "**Small: a CPU at sizes that say nothing of a GPU.** It shows that the parts run."
_MISSING_CODE = 3


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of the run: its script and flags, and how many seconds it may take."""

    name: str
    command: tuple[str, ...]
    seconds: int


def plan(*, small: bool, sides: str = SIDES) -> list[Part]:
    """The parts in their order, without `machine`, which always runs."""
    if small:
        training = [
            Part("train_smoke", ("train.py", "--shapes=smoke", "--rounds=1", "--apart", "--sides=pytorch"), 110)
        ]
    else:
        flags = ("--device=gpu", "--rounds=3", "--apart", f"--sides={sides}")
        training = [
            Part(f"train_{shape}", ("train.py", f"--shapes={shape}", *flags), seconds)
            for shape, seconds in (("135m", 80), ("360m", 80), ("1b7", 125))
        ]
    budgets = {"parity": 110, "decode": 110, "scoring": 110} if small else {"parity": 40, "decode": 70, "scoring": 45}
    mode = ("--small",) if small else ()
    parity, *others = (Part(name, ("gpu_parts.py", name, *mode), seconds) for name, seconds in budgets.items())
    return [parity, *training, *others]


def environment(*, small: bool) -> dict[str, str]:
    """Variables of every part's process."""
    paths = [str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
    platforms = "cpu" if small else "cuda,cpu"
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "JAX_PLATFORMS": platforms,
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }


def run_part(part: Part, seconds: float, environ: Mapping[str, str], log: Path) -> dict[str, Any]:
    """Runs a part for at most so many seconds: its status, reason and result."""
    began = time.monotonic()
    with open(log, "w", encoding="utf-8") as errors:
        process = subprocess.Popen(
            [sys.executable, str(HERE / part.command[0]), *part.command[1:]],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=dict(environ),
            start_new_session=True,
        )
        try:
            told, code = process.communicate(timeout=seconds)[0], process.returncode
        except subprocess.TimeoutExpired:
            told, code = _end(process), None
        except BaseException:
            _end(process)
            raise
    record = {"seconds": round(time.monotonic() - began, 1), **outcome(told, code, log, seconds)}
    if not part.name.startswith("train_") or record["status"] != DONE:
        return record
    lacking = [line for line in told.splitlines() if " skipped: " in line]
    return record | ({"status": MISSING, "reason": "; ".join(lacking)} if lacking else {})


def outcome(told: str, code: int | None, log: Path, seconds: float) -> dict[str, Any]:
    """What a part's output and exit code (None: it was ended) say."""
    lines = told.splitlines()
    result: dict[str, Any] = {}
    for line in lines:
        if line.startswith("RESULT "):
            result = json.loads(line.removeprefix("RESULT "))
        elif line.startswith('{"shape": ') and '"side": ' in line:
            side = json.loads(line)
            result.setdefault("sides", {})[side["side"]] = side
    if code == 0:
        return {"status": DONE, "result": result}
    if code is None:
        return {"status": LATE, "reason": f"ended after {seconds:.0f} s", "result": result}
    if code == _MISSING_CODE:
        reason = next((line.removeprefix("MISSING ") for line in lines if line.startswith("MISSING ")), "")
        return {"status": MISSING, "reason": reason, "result": result}
    last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:] or ["no message"]
    return {"status": FAILED, "reason": f"code {code}: {last[0][:300]}", "result": result}


def _end(process: subprocess.Popen) -> str:
    """Ends the part and the processes that it started; what it had told."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.communicate(timeout=5)[0] or ""
    return ""


def run(args: argparse.Namespace) -> int:
    """Runs what is not done yet and writes the report; the exit code."""
    parts = _chosen(plan(small=args.small, sides=args.sides), args.parts)
    folder, environ, began = Path(args.output), environment(small=args.small), time.monotonic()
    (folder / "parts").mkdir(parents=True, exist_ok=True)
    with files.locked(folder / ".lock", f"--output={folder}: another process is measuring into it"):
        about = _machine(args, folder, environ)
        done: dict[str, dict[str, Any]] = {}
        for part in plan(small=args.small, sides=args.sides):
            place = folder / "parts" / f"{part.name}.json"
            key = records.fingerprint([part.command, about["device"]])
            if former := _former(place, key):
                done[part.name] = former
            if part not in parts:
                continue
            if former.get("status") == DONE:
                print(f"{part.name}: done before", file=sys.stderr, flush=True)
                continue
            left = args.seconds - (time.monotonic() - began)
            if left < 5:
                reason = f"--seconds={args.seconds} are over"
                done[part.name] = {"status": UNBEGUN, "reason": reason, "seconds": 0.0, "result": {}}
                continue
            print(f"{part.name}: at most {min(left, part.seconds):.0f} s ...", file=sys.stderr, flush=True)
            found = run_part(part, min(left, part.seconds), environ, folder / "parts" / f"{part.name}.log")
            done[part.name] = found | {"key": key}
            records.write(place, done[part.name])
            print(f"{part.name}: {found['status']} {found.get('reason', '')}", file=sys.stderr, flush=True)
        results = {"small": args.small, "machine": about, "parts": done}
        records.write(folder / "results.json", results)
        files.write_whole(folder / "results.md", markdown(results) + "\n")
    print(markdown(results))
    return 0 if all(done[part.name]["status"] == DONE for part in parts) else 1


def _chosen(parts: Sequence[Part], wanted: str) -> list[Part]:
    names = [part.name for part in parts]
    asked = wanted.split(",") if wanted else names
    if unknown := [name for name in asked if name not in names]:
        raise ValueError(f"--parts={wanted}: {unknown[0]!r} is not one of {', '.join(names)}")
    return [part for part in parts if part.name in asked]


def _machine(args: argparse.Namespace, folder: Path, environ: Mapping[str, str]) -> dict[str, Any]:
    """The machine as JAX sees it. Raises ValueError where there is no GPU, or another one than the folder's."""
    mode = ("--small",) if args.small else ()
    found = run_part(Part("machine", ("gpu_parts.py", "machine", *mode), 60), 60, environ, folder / "parts/machine.log")
    about = found.get("result") or {}
    if found["status"] != DONE or (about["platform"] != "gpu" and not args.small):
        seen = about.get("device") or found.get("reason")
        raise ValueError(f"no GPU: JAX says {seen}; --small runs on the CPU")
    place = folder / "machine.json"
    with contextlib.suppress(FileNotFoundError):
        former = records.read(place, "remove the folder")
        if former["device"] != about["device"]:
            here = about["device"]
            raise ValueError(f"--output={folder}: begun on {former['device']}, this is {here}; choose another folder")
    records.write(place, about)
    return about


def _former(place: Path, key: str) -> dict[str, Any]:
    with contextlib.suppress(FileNotFoundError):
        former = records.read(place, "remove it: the part is run again")
        return former if former.get("key") == key else {}
    return {}


def markdown(results: Mapping[str, Any]) -> str:
    """The report: machine, what each part came to, and a table of figures."""
    about, parts = results["machine"], results["parts"]
    peak, versions = about["peak_flops"], about["versions"]
    rate = f"{peak / 1e12:.0f} TFLOP/s dense bfloat16, by SafeLM's table" if peak else "unknown, so no MFU"
    lines = ["# SafeLM on one GPU", "", *([SMALL_NOTE, ""] if results["small"] else [])]
    lines += [
        f"- {about['device']}, driver {about['driver'] or 'none'}; {about['cores']} CPU cores, {about['system']}",
        f"- Python {about['python']}, {', '.join(f'{name} {version}' for name, version in versions.items())}; "
        f"CUDA of PyTorch: {about['torch_cuda'] or 'none'}",
        f"- peak: {rate}; a large bfloat16 product reaches {about['product_flops'] / 1e12:.2f} TFLOP/s",
        "",
    ]
    rows = [[name, part["status"], part.get("seconds", ""), part.get("reason", "")] for name, part in parts.items()]
    lines += [table.markdown(["part", "status", "seconds", "why"], rows), ""]
    for heads, body in (_training(parts), _others(parts)):
        lines += [table.markdown(heads, body), ""] if body else []
    return "\n".join(lines).rstrip()


def _training(parts: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    rows = []
    for name, part in parts.items():
        sides = part["result"].get("sides", {}) if name.startswith("train_") else {}
        ours = statistics.median(sides["safelm"]["ms"]) if "safelm" in sides else None
        for side, record in sides.items():
            middle = statistics.median(record["ms"])
            rate = record["tokens"] / middle * 1e3
            peak = record["peak_flops"]
            mfu = f"{rate * record['flops_per_token'] / peak:.1%}" if peak else "–"
            spread = f"{middle:.1f} [{min(record['ms']):.1f}, {max(record['ms']):.1f}]"
            ratio = f"{middle / ours:.2f}" if ours else "–"
            shape = f"{record['num_params'] / 1e6:,.1f}M, {record['tokens']:,} tokens"
            rows.append([shape, side, f"{rate:,.0f}", mfu, spread, ratio])
    return ["model, batch", "side", "tokens/s", "MFU", "ms a step", "theirs / ours"], rows


def _others(parts: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    rows = []
    if found := parts.get("parity", {}).get("result"):
        text = (
            f"{found['largest_difference']:.1e} of the largest logit; next tokens equal: {found['same_next_token']:.1%}"
        )
        rows.append(["parity, float32", f"against {found['against']}", text, ""])
    found = parts.get("decode", {}).get("result") or {}
    ratios = {f"{name} {found['weights']}": ratio for name, ratio in found.get("ours_over_theirs", {}).items()}
    for name, rate in found.get("tokens_per_s", {}).items():
        rows.append(["decoding", name, f"{rate:,.1f} new tokens/s", _times(ratios.get(name))])
    for name, side in ((parts.get("scoring", {}).get("result") or {}).get("sides", {})).items():
        share = f", {side['share_of_peak']:.1%} of peak" if side["share_of_peak"] else ""
        rate = f"{side['tokens_per_s']:,.0f} tokens/s{share}"
        rows.append(["scoring", f"{name}, {side['dtype']}", rate, _times(side.get("ours_over_theirs"))])
    return ["what", "how", "found", "times transformers"], rows


def _times(ratio: float | None) -> str:
    return f"{ratio:.2f}x" if ratio else ""


def argument_parser() -> argparse.ArgumentParser:
    parser = cli.parser("scripts.bench.gpu", __doc__)
    parser.add_argument("--output", help="folder of the results (default: runs/gpu, with --small runs/gpu-small)")
    parser.add_argument("--parts", default="", help="comma-separated; default: all")
    parser.add_argument("--seconds", type=int, default=TOTAL_SECONDS, help="of all parts (default %(default)s)")
    parser.add_argument("--sides", default=SIDES, help="rivals in training, by scripts/bench/train.py (%(default)s)")
    parser.add_argument("--small", action="store_true", help="on the CPU, at sizes that say nothing of a GPU")
    return parser


def main(args: argparse.Namespace) -> None:
    args.output = args.output or ("runs/gpu-small" if args.small else "runs/gpu")
    if args.seconds < 1:
        raise ValueError(f"--seconds={args.seconds}: must be at least 1")
    if unknown := set(args.sides.split(";")) - {*_KNOWN_SIDES, ""}:
        raise ValueError(f"--sides={args.sides}: {min(unknown)!r} is none of {'; '.join(_KNOWN_SIDES)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that a part ends with it
    if code := run(args):
        sys.exit(code)


if __name__ == "__main__":
    cli.run(main, argument_parser())
