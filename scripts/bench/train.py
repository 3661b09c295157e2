"""The training step against LitGPT and transformers: milliseconds, tokens/s, ratios with their spread, in one run.

    scripts/bench/rivals.sh                             # once: .venv-bench with LitGPT
    python scripts/bench/train.py                       # CPU: 1.84M parameters at 16 x 256, SmolLM2-135M at 1 x 512
    python scripts/bench/train.py --shapes=tiny --rounds=7
    python scripts/bench/train.py --dtype=bfloat16
    python scripts/bench/train.py --rivals_large_pages  # theirs by the C library too, as ours asks for by itself
    python scripts/bench/train.py --device=gpu --apart  # 135M, 360M and 1.7B in bfloat16 at length 2048, with MFU

All sides do the same work on the same weights and batch: forward, mean cross-entropy, backward, clip to norm 1, AdamW.
Their losses before the first three updates must agree, or the run ends with an error. SafeLM's step is the one that
`safelm.train` compiles for such a config; each row is one document, and its mask is computed all the same, which the
others do not have. Each rival runs eagerly and through torch.compile, with PyTorch's fused AdamW: quote the faster.
"safelm, small pages" is ours without large pages of memory; it runs where it is named.
"pytorch" is a plain Llama that needs no more than PyTorch (`scripts/bench/plain_torch.py`); it runs where it is named.
Every side is a process of its own on the same cores, one at work at a time; in every round each does its steps in turn,
so load on the machine hits all alike. A ratio is theirs / ours by medians within a round; the table gives the median
over rounds and the smallest and largest. With --apart a side does all its rounds and ends before the next one starts:
for models of which a device's memory holds one, on a machine that does nothing else.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from safelm import cli

HERE = Path(__file__).resolve().parent
OURS = "safelm"
SMOLLM2_135M = {"vocab_size": 49_152, "num_layers": 30, "d_model": 576, "d_ff": 1536, "num_heads": 9, "num_kv_heads": 3}
SMOLLM2_360M = {
    "vocab_size": 49_152,
    "num_layers": 32,
    "d_model": 960,
    "d_ff": 2560,
    "num_heads": 15,
    "num_kv_heads": 5,
}
SMOLLM2_1B7 = {"vocab_size": 49_152, "num_layers": 24, "d_model": 2048, "d_ff": 8192, "num_heads": 32}
TINY = {"vocab_size": 8192, "num_layers": 4, "d_model": 128, "d_ff": 384, "num_heads": 4, "num_kv_heads": 2}
SMOKE = {"vocab_size": 256, "num_layers": 2, "d_model": 32, "d_ff": 64, "num_heads": 2, "num_kv_heads": 1}
# name -> (sizes, head_dim, batch, length, dtype, steps in a turn, remat). Layers are unrolled on a CPU, as
# configs/quickstart.py has it, and scanned on a GPU, as the SmolLM2 configs have it.
SHAPES: dict[str, dict[str, tuple]] = {
    "cpu": {
        "tiny": (TINY, 32, 16, 256, "float32", 3, "none"),
        "135m": (SMOLLM2_135M, 64, 1, 512, "float32", 1, "none"),
        "smoke": (SMOKE, 16, 2, 16, "float32", 2, "none"),
    },
    "gpu": {
        "135m": (SMOLLM2_135M, 64, 16, 2048, "bfloat16", 5, "dots"),
        "360m": (SMOLLM2_360M, 64, 8, 2048, "bfloat16", 5, "dots"),
        "1b7": (SMOLLM2_1B7 | {"num_kv_heads": 32}, 64, 4, 2048, "bfloat16", 5, "full"),
    },
}


class Side:
    """A process that does training steps when told to."""

    def __init__(self, name: str, command: list[str], environment: dict[str, str]):
        self.name, self.rounds = name, []
        self._log = tempfile.TemporaryFile(mode="w+")
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=os.environ | environment,
        )
        try:
            self.about = self._read()
        except RuntimeError:
            self.close()
            raise

    def turn(self, steps: int) -> None:
        """Does steps and notes their seconds."""
        print(steps, file=self._process.stdin, flush=True)
        self.rounds.append(self._read()["seconds"])

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):  # it ended by itself
            self._process.stdin.close()
        self._process.wait()
        self._log.close()

    def _read(self) -> dict[str, Any]:
        for line in self._process.stdout:
            if line.startswith("BENCH "):
                return json.loads(line.removeprefix("BENCH "))
        self._process.wait()
        self._log.seek(0)
        last = self._log.read().strip().splitlines()[-1:] or ["no message"]
        raise RuntimeError(f"{self.name} ended with {self._process.returncode}: {last[0]}")


def commands(folder: str, device: str, threads: int, rivals_python: str) -> dict[str, list[str] | str]:
    """Every side's command, or why it can't run here."""
    ours = [sys.executable, str(HERE / "train_safelm.py"), folder]
    torch_device = "cuda" if device == "gpu" else "cpu"
    options = [str(HERE / "train_torch.py"), folder, f"--threads={threads}", f"--device={torch_device}"]
    sides: dict[str, list[str] | str] = {OURS: ours, f"{OURS}, small pages": [*ours, "--small_pages"]}
    torch_here = importlib.util.find_spec("torch") is not None
    here = torch_here and importlib.util.find_spec("transformers") is not None
    pythons = {
        "litgpt": (
            rivals_python,
            os.access(rivals_python, os.X_OK),
            f"no {rivals_python}: scripts/bench/rivals.sh",
        ),
        "pytorch": (sys.executable, torch_here, "torch is not installed"),
        "transformers": (sys.executable, here, "torch and transformers are not installed: the extra `parity`"),
    }
    for kind, (python, exists, reason) in pythons.items():
        command = [python, *options, f"--kind={kind}"]
        sides[kind] = command if exists else reason
        sides[f"{kind}, torch.compile"] = [*command, "--compile"] if exists else reason
    return sides


def settings_of(shape: tuple, device: str, dtype: str | None = None) -> dict[str, Any]:
    """What all sides are told of a shape, in its own dtype when none is given."""
    sizes, head_dim, batch_size, seq_len, own_dtype, _, remat = shape
    return {
        "model": sizes | {"head_dim": head_dim},
        "batch_size": batch_size,
        "seq_len": seq_len,
        "dtype": dtype or own_dtype,
        "remat": remat,
        "scan_layers": device == "gpu",
    }


def race(name: str, shape: tuple, args: argparse.Namespace) -> None:
    """Measures all sides at one shape and prints the table."""
    settings, environment = settings_of(shape, args.device, args.dtype), {"JAX_PLATFORMS": "cpu"}
    if args.device == "gpu":
        environment = {"JAX_PLATFORMS": "cuda", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    with tempfile.TemporaryDirectory() as folder:
        writer = [sys.executable, str(HERE / "train_safelm.py"), folder, "--write", json.dumps(settings)]
        subprocess.run(writer, check=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
        settings = json.loads(Path(folder, "settings.json").read_text())
        sides: list[Side] = []
        try:
            tolerance = 2e-4 if settings["dtype"] == "float32" else 2e-2
            for side, command in commands(folder, args.device, args.threads, args.rivals_python).items():
                around = environment if side == OURS else environment | rivals_environment(args)
                if start(sides, side, command, around, args) and args.apart:
                    check_losses(sides, tolerance)
                    for _ in range(args.rounds):
                        sides[-1].turn(shape[5])
                    sides[-1].close()
                    tell(name, settings, sides[0], sides[-1])
            check_losses(sides, tolerance)
            for number in range(0 if args.apart else args.rounds):
                first = number % len(sides)
                for side in sides[first:] + sides[:first]:
                    side.turn(shape[5])
        finally:
            for side in sides:
                side.close()
    report(name, settings, sides, args)


def tell(shape: str, settings: dict[str, Any], ours: Side, side: Side) -> None:
    """One JSON line as soon as a side is done, so that a run that is cut short has told of those before."""
    about = {name: ours.about[name] for name in ("device", "flops_per_token", "peak_flops")}
    sizes = {"tokens": settings["batch_size"] * settings["seq_len"], "num_params": settings["num_params"]}
    milliseconds = [round(value * 1e3, 2) for seconds in side.rounds for value in seconds]
    record = {"shape": shape, "side": side.name, **sizes, **about, "ms": milliseconds, "losses": side.about["losses"]}
    print(json.dumps(record), flush=True)


def rivals_environment(args: argparse.Namespace) -> dict[str, str]:
    """What glibc reads: large pages where the kernel gives them to those that ask."""
    return {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"} if args.rivals_large_pages else {}


def is_wanted(name: str, args: argparse.Namespace) -> bool:
    """Whether a side takes part: ours always, others by `--sides` or `--only`."""
    if args.sides is not None:
        return name == OURS or name in args.sides.split(";")
    return name == OURS or name.startswith(tuple(args.only.split(",")))


def start(
    sides: list[Side], name: str, command: list[str] | str, environment: dict[str, str], args: argparse.Namespace
) -> bool:
    """Adds a side that has compiled and done three steps; where it can't, says why and returns False."""
    if not is_wanted(name, args):
        return False
    try:
        if isinstance(command, str):
            raise RuntimeError(f"{name} skipped: {command}")
        began = time.perf_counter()
        sides.append(Side(name, command, environment))
        print(f"{name}: compiled after {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
        return True
    except RuntimeError as error:
        if name == OURS:
            raise
        print(error, flush=True)
        return False


def check_losses(sides: list[Side], tolerance: float) -> None:
    """Raises SystemExit unless all sides' losses before the first three updates agree."""
    expected = sides[0].about["losses"]
    for side in sides:
        for mine, theirs in zip(expected, side.about["losses"], strict=True):
            if abs(mine - theirs) > tolerance * abs(mine):
                raise SystemExit(
                    f"not the same work: losses {expected} of {OURS}, {side.about['losses']} of {side.name}"
                )


def report(name: str, settings: dict[str, Any], sides: list[Side], args: argparse.Namespace) -> None:
    """The table and one JSON line."""
    about, ours = sides[0].about, [statistics.median(seconds) for seconds in sides[0].rounds]
    tokens = settings["batch_size"] * settings["seq_len"]
    print(
        f"\n{name}: {settings['num_params']:,} parameters, {settings['batch_size']} x {settings['seq_len']}, "
        f"{settings['dtype']}, {about['device']}, {args.threads} threads, losses {about['losses'][0]:.4f} to "
        f"{about['losses'][-1]:.4f} on all sides"
    )
    print(f"{'side':32s} {'ms':>9s} {'min':>9s} {'max':>9s} {'tokens/s':>9s} {'MFU':>6s}  theirs/ours (spread)")
    record = {}
    for side in sides:
        medians = [statistics.median(seconds) for seconds in side.rounds]
        every = [value for seconds in side.rounds for value in seconds]
        middle = statistics.median(every)
        ratios = [theirs / mine for theirs, mine in zip(medians, ours, strict=True)]
        peak = about["peak_flops"]
        mfu = f"{tokens / middle * about['flops_per_token'] / peak:6.1%}" if peak else f"{'-':>6s}"
        print(
            f"{side.name:32s} {middle * 1e3:9.1f} {min(every) * 1e3:9.1f} {max(every) * 1e3:9.1f} "
            f"{tokens / middle:9.0f} {mfu}  {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        )
        record[side.name] = {"ms": [round(value * 1e3, 2) for value in every], "losses": side.about["losses"]}
    print(json.dumps({"shape": name, "tokens": tokens, "sides": record}), flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = cli.parser("scripts.bench.train", __doc__)
    parser.add_argument("--device", choices=tuple(SHAPES), default="cpu")
    parser.add_argument("--shapes", help="cpu: tiny,135m (default) or smoke; gpu: 135m,360m,1b7 (default: all)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="instead of the shapes' own, for all sides")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="cores for every side")
    parser.add_argument("--only", default="litgpt,transformers", help="rivals whose name starts so; 'none' for none")
    parser.add_argument("--sides", help="the rivals by their whole names, as 'pytorch, torch.compile;transformers'")
    parser.add_argument("--rivals_large_pages", action="store_true", help="glibc asks for them on rivals' behalf")
    parser.add_argument("--apart", action="store_true", help="one side after the other, never two in memory")
    parser.add_argument("--rivals_python", default=str(HERE.parents[1] / ".venv-bench/bin/python"))
    args = parser.parse_args(arguments)
    shapes = (args.shapes or ",".join(name for name in SHAPES[args.device] if name != "smoke")).split(",")
    if unknown := [name for name in shapes if name not in SHAPES[args.device]]:
        parser.error(f"--shapes={args.shapes}: {unknown[0]} is not one of {', '.join(SHAPES[args.device])}")
    cores = sorted(os.sched_getaffinity(0))
    if not 1 <= args.threads <= len(cores):
        parser.error(f"--threads={args.threads}: this process may use {len(cores)} cores")
    if args.device == "cpu":  # JAX takes as many threads as it may use cores; the sides inherit this
        os.sched_setaffinity(0, cores[: args.threads])
    for name in shapes:
        race(name, SHAPES[args.device][name], args)


if __name__ == "__main__":
    main()
