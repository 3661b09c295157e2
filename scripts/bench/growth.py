"""How cost grows: seconds by model size, context, batch, sources, shards, documents, clients, chips; a law for each.

    python scripts/bench/growth.py --output=runs/growth                    # half an hour on two cores
    python scripts/bench/growth.py --output=runs/growth --curves=context,batch --rounds=5
    python scripts/bench/growth.py --small --output=runs/growth-small      # a check that the curves run
    python scripts/bench/growth.py --output=runs/growth --write=docs/results/data/cost.json

Each curve is a process of its own; its points take turns, `--rounds` times. Costs are processor seconds of the process
and its children, which other work on the machine disturbs less than the clock; those of chips are the TPU compiler's
figures in docs/results/data/slices.json, not measured here. Files of shards are links to few, so that a million fit.
The same command again does only the curves that are not done.

A curve gets a law, cost = a + b * x (a and b at least 0) by least squares of relative errors, and an exponent, the
slope of log cost over log x in its upper half (the last three points at least): 1 is proportional, 0 free. Its interval
is the bootstrap's over rounds (`safelm.stats.bootstrap`). "Off by" is the largest distance of a median from the law.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from safelm import cli
from safelm.io import files, records
from safelm.stats import bootstrap

HERE = Path(__file__).resolve().parent
SLICES = HERE.parents[1] / "docs/results/data/slices.json"
# name -> (what x is, what the cost is): in the order of the page
CURVES = {
    "model size": ("MFLOPs a token", "processor us a token"),
    "context": ("tokens a row", "processor us a token"),
    "batch": ("rows of 128 tokens", "processor ms a step"),
    "sources": ("sources", "processor ms a batch"),
    "shards listed": ("files", "processor s"),
    "shards planned": ("files", "processor s"),
    "store opened": ("shards", "processor s"),
    "shards fed": ("shards", "processor ms a batch"),
    "documents scored": ("documents", "processor s"),
    "memory of scoring": ("documents", "MiB at most"),
    "report card": ("documents", "processor s"),
    "clients": ("clients at once", "processor ms a reply"),
    "chips": ("chips", "chip-seconds a step, at best"),
}


def linear_law(x_n: np.ndarray, y_n: np.ndarray) -> tuple[float, float]:
    """(a, b) of y = a + b * x, neither below 0, by least squares of relative errors."""
    weighted_n2 = np.stack([1 / y_n, x_n / y_n], axis=1)
    a, b = np.linalg.lstsq(weighted_n2, np.ones(len(y_n)), rcond=None)[0]
    if a < 0:
        return 0.0, float((x_n / y_n).sum() / ((x_n / y_n) ** 2).sum())
    if b < 0:
        return float((1 / y_n).sum() / (1 / y_n**2).sum()), 0.0
    return float(a), float(b)


def exponent(x_n: np.ndarray, y_n: np.ndarray) -> float:
    """The slope of log y over log x."""
    return float(np.polyfit(np.log(x_n), np.log(y_n), 1)[0])


def upper(points: Sequence[float]) -> list[float]:
    """The points that the exponent is taken over: the upper half, at least three (of fewer, all)."""
    return sorted(points)[-max(3, (len(points) + 1) // 2) :]


def law_of(points: dict[float, list[float]]) -> dict[str, Any]:
    """Law, exponent with its interval and the largest deviation of a curve, given as costs by x, one a round."""
    x_n = np.array(sorted(points), float)
    middle_n = np.array([statistics.median(points[x]) for x in x_n])
    a, b = linear_law(x_n, middle_n)
    off_n = middle_n / (a + b * x_n) - 1
    worst = int(np.abs(off_n).argmax())
    flat = [(x, y, turn) for x in upper(x_n.tolist()) for turn, y in enumerate(points[x])]
    values_n, costs_n, rounds_n = (np.array(column, float) for column in zip(*flat, strict=True))
    slope = exponent(np.array(upper(x_n.tolist())), middle_n[-len(upper(x_n.tolist())) :])
    low = high = slope
    if len(set(rounds_n)) > 1:
        low, high = bootstrap.grouped_interval(exponent, values_n, costs_n, groups=rounds_n)
    interval = [round(slope, 3), round(min(low, slope), 3), round(max(high, slope), 3)]
    return {"a": a, "b": b, "exponent": interval, "off": float(off_n[worst]), "off_at": float(x_n[worst])}


def chips() -> dict[float, list[float]]:
    """Chip-seconds of a step of SmolLM2-1.7B by slice of v5e, at best, as the TPU's compiler has them."""
    found = {}
    for row in records.read(SLICES, "write it anew")["rows"]:
        if not row["name"].startswith("v5e:"):  # other chips have another speed
            continue
        rows, columns = row["name"].split(":")[1].split(" ")[0].split("x")
        count = int(rows) * int(columns)
        found[float(count)] = [count * float(row["values"][3].split(" to ")[0])]
    return found


def measure(name: str, flags: argparse.Namespace) -> dict[str, Any]:
    """A curve's record, from its own process or what was written before."""
    place = Path(flags.output) / f"{name.replace(' ', '_')}.json"
    wanted = {"rounds": flags.rounds, "small": flags.small}
    if place.exists() and (former := records.read(place, "remove it"))["settings"] == wanted:
        return former
    if name == "chips":
        return {"name": name, "points": [[x, *y] for x, y in chips().items()], "load": None, "settings": wanted}
    began = os.getloadavg()[0]
    command = [sys.executable, str(HERE / "growth_curves.py"), name, f"--rounds={flags.rounds}"]
    done = subprocess.run([*command, *(["--small"] if flags.small else [])], stdout=subprocess.PIPE, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("CURVE ")]
    if done.returncode or not lines:
        raise ValueError(f"the curve {name!r} ended with code {done.returncode}; what it said is above")
    record = {"name": name, **json.loads(lines[-1].removeprefix("CURVE "))}
    record |= {"load": [round(began, 1), round(os.getloadavg()[0], 1)], "settings": wanted}
    records.write(place, record)
    return record


def study(curves: Sequence[dict[str, Any]], flags: argparse.Namespace) -> dict[str, Any]:
    """The figures as `scripts/studies/draw_results.py` reads them."""
    rows, drawn = [], []
    for curve in curves:
        points = {x: costs for x, *costs in curve["points"]}
        found, (axis, cost) = law_of(points), CURVES[curve["name"]]
        span = f"{min(points):,g} to {max(points):,g} {axis}"
        law = f"{found['a']:.3g} + {found['b']:.3g} x" if found["a"] else f"{found['b']:.3g} x"
        off = f"{100 * found['off']:+.0f}% at {found['off_at']:,g}"
        rows.append({"name": curve["name"], "values": [span, cost, law, off, found["exponent"]]})
        measured = [[x, statistics.median(y), min(y), max(y)] for x, y in sorted(points.items())]
        drawn.append({"name": curve["name"], "x": axis, "y": cost, "points": measured, "law": [found["a"], found["b"]]})
    chosen = f' --curves="{flags.curves}"' if flags.curves else ""
    heads = [{"head": head} for head in ("x", "cost", "law", "off by")]
    return {
        "title": "How cost grows: measured costs (dots) and their laws (lines), both axes logarithmic",
        "command": f"python scripts/bench/growth.py --output=runs/growth --rounds={flags.rounds}{chosen}",
        "machine": f"{flags.machine}; loads {loads(curves)}",
        "axis": "x",
        "scale": "linear",
        "head": "curve",
        "columns": [*heads, {"head": "exponent", "digits": 2, "drawn": True}],
        "rows": rows,
        "curves": drawn,
    }


def loads(curves: Sequence[dict[str, Any]]) -> str:
    found = [load for curve in curves for load in curve["load"] or ()]
    return f"{min(found)} to {max(found)}" if found else "none"


def main(flags: argparse.Namespace) -> None:
    names = flags.curves.split(",") if flags.curves else list(CURVES)
    if unknown := [name for name in names if name not in CURVES]:
        raise ValueError(f"--curves={flags.curves}: {unknown[0]!r} is not one of {', '.join(CURVES)}")
    if flags.rounds < 1:
        raise ValueError(f"--rounds={flags.rounds}: must be at least 1")
    os.makedirs(flags.output, exist_ok=True)
    with files.locked(Path(flags.output) / ".lock", f"--output={flags.output}: another process is measuring into it"):
        curves = []
        for name in names:
            print(f"{name} ...", file=sys.stderr, flush=True)
            curves.append(measure(name, flags))
            found = law_of({x: costs for x, *costs in curves[-1]["points"]})
            print(json.dumps({"curve": name, **found}), flush=True)
    if flags.write:
        text = json.dumps(study(curves, flags), indent=1)
        files.write_whole(flags.write, text + "\n")


def argument_parser() -> argparse.ArgumentParser:
    parser = cli.parser("scripts.bench.growth", __doc__)
    parser.add_argument("--output", required=True, help="folder of the curves' records")
    parser.add_argument("--curves", default="", help="comma-separated names (default: all)")
    parser.add_argument("--rounds", type=int, default=5, help="(default %(default)s)")
    parser.add_argument("--small", action="store_true", help="a few small points: a check, no result")
    parser.add_argument("--machine", default="this machine", help="how --write calls it")
    parser.add_argument("--write", metavar="FILE", help="the figures for scripts/studies/draw_results.py")
    return parser


if __name__ == "__main__":
    cli.run(main, argument_parser())
