"""The console command: `safelm NAME FLAG...` is `python -m safelm.NAME FLAG...`."""

import ast
import os
import pathlib
import sys

COMMANDS = (  # in the order of a document's way through them
    "synthetic_web",
    "score",
    "annotate",
    "label",
    "report_card",
    "select",
    "synthesize",
    "train_classifier",
    "train_tokenizer",
    "cache_tasks",
    "canaries",
    "convert_tokens",
    "train",
    "generate",
    "calibrate_knob",
    "serve",
    "evaluate",
    "lm_eval",
    "ladder",
    "robustness",
    "dashboard",
    "release_gate",
    "convert",
    "aot",
)


def main() -> None:
    """Replaces this process by the command's; lists the commands without one."""
    name, arguments = "".join(sys.argv[1:2]).replace("-", "_"), sys.argv[2:]
    if name in COMMANDS:
        os.execv(sys.executable, [sys.executable, "-m", f"safelm.{name}", *arguments])
    if name in ("", "_h", "__help", "help"):
        print(_overview())
        return
    print(f"safelm: no command {sys.argv[1]!r}: there are {', '.join(COMMANDS)}", file=sys.stderr)
    sys.exit(2)


def _overview() -> str:
    """Every command with the first line of its module, read from the file: nothing is imported."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {_first_line(name)}" for name in COMMANDS]
    return "\n".join(["usage: safelm COMMAND [FLAG...]    safelm COMMAND --help", "", *lines])


def _first_line(name: str) -> str:
    path = pathlib.Path(__file__).parent / name
    file = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
    line = (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").splitlines()[0]
    return line.rstrip(".")


if __name__ == "__main__":
    main()
