"""Makes one page over checkpoints and stages: a matrix with intervals, frontiers, training curves, cases by id.

RUNS are folders or files, each as PATH or NAME=PATH; below a folder it finds

    results.json           of safelm.evaluate, over any checkpoints, stages (MODEL@STAGE), seeds and methods; of
                           safelm.release_gate and safelm.ladder
    capability.json        of safelm.evaluate capability
    metrics.jsonl          of training runs: curves over tokens, in-loop measures among them
    results_*.json         of lm-evaluation-harness (as `safelm lm_eval --output_path` writes them)
    2026-*.json, *.eval    logs of Inspect; .eval where inspect_ai is installed

and lists what it leaves out. NAME is put before the models' names (NAME/MODEL); for a file of another harness it is the
model's own name, so that its numbers stand in that model's row. Numbers of different protocols get different columns
and are never compared; the page shows in which settings protocols differ. A stage that is called by its tokens, such as
raw@20M, is a point of a curve over pretraining.

    OUTPUT/dashboard.html  one self-contained page: it works from a disk or a bucket and asks for nothing
    OUTPUT/dashboard.json  the same numbers; the page's button saves it too

Ids, labels and numbers only: prompts and answers are in the page under --show_texts alone, where safelm.evaluate has
stored them with its own --show_texts.
"""

import argparse
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from safelm import cli, documents
from safelm.dashboard import page
from safelm.dashboard.reading import LEFT_OUT, parse_place, read_board
from safelm.io.files import write_whole


def main(arguments: argparse.Namespace) -> None:
    """Reads everything, then writes the page and its JSON."""
    board = read_board(
        [parse_place(flag) for flag in arguments.runs],
        may_differ=[name.strip() for name in arguments.may_differ.split(",") if name.strip()],
        show_texts=arguments.show_texts,
    )
    values = page.to_json(board, arguments.title)
    folder = pathlib.Path(arguments.output)
    paths = [
        write_whole(folder / "dashboard.html", page.render(values)),
        write_whole(folder / "dashboard.json", json.dumps(values, allow_nan=False) + "\n"),
    ]
    documents.declare_no_documents(str(folder), "safelm.dashboard")
    print(_told(values))
    print("\n".join(map(str, paths)))


def _told(values: Mapping[str, Any]) -> str:
    counts = {
        "row": len(values["rows"]),
        "measure": len(values["columns"]),
        "protocol": len(values["protocols"]),
        "training run": len(values["curves"]),
    }
    left_out = sum(source["kind"] == LEFT_OUT for source in values["sources"])
    text = ", ".join(f"{count} {name}{'' if count == 1 else 's'}" for name, count in counts.items())
    files = "file" if left_out == 1 else "files"
    return text + (f"; {left_out} {files} left out (listed on the page)" if left_out else "")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = cli.parser(
        "safelm.dashboard",
        __doc__,
        "python -m safelm.dashboard runs/quickstart --output=runs/dashboard\n"
        "  python -m safelm.dashboard runs/study base=runs/base/results.json safety@instruct=logs/inspect "
        "--output=runs/dashboard",
    )
    add = made.add_argument
    add("runs", nargs="+", metavar="RUNS", help="PATH or NAME=PATH: a folder or a file")
    add("--output", required=True, metavar="DIR", help="folder for dashboard.html and dashboard.json")
    add("--title", default="Safety dashboard", help="(default %(default)s)")
    add("--may_differ", default="", metavar="FIELDS", help="comma-separated protocol fields that may differ")
    add("--show_texts", action="store_true", help="put prompts and answers into the page, each folded")
    return made


if __name__ == "__main__":
    cli.run(main, parser())
