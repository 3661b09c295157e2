"""lm-evaluation-harness's own command line (0.4.13) with our checkpoints as the model `safelm`.

All arguments go to `lm_eval` unchanged: tasks by name with --include_path=DIR, or task files by path. --model_args:
checkpoint=DIR, and step, dtype, tokens_at_once, max_length, max_gen_toks, seed.
The harness doesn't look for models in other packages, so its own command knows `safelm` only if a task file given by
path names one of our functions, like those in safelm/evaluate/capability/tasks:
`lm_eval --model safelm --model_args checkpoint=DIR --tasks .../tasks/piqa.yaml --metadata '{"data": "DIR"}'`.
"""

import argparse
import logging
import os
import sys

from safelm import cli, documents
from safelm.io import remote


def main(argv: list[str] | None = None) -> None:
    """Runs the harness; `--help` shows this module's own text, `run --help` the harness's flags."""
    argv = sys.argv[1:] if argv is None else argv
    parser = _parser()
    if not argv or argv[0] in ("-h", "--help"):
        parser.print_help()
        return
    logging.getLogger("absl").setLevel(logging.WARNING)
    cli.run(lambda _: _run(argv), parser, [])


def _run(argv: list[str]) -> None:
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument("--output_path", "-o", default="")
    folder = own.parse_known_args(argv)[0].output_path
    remote.check_local_output(folder, "--output_path")
    try:
        from lm_eval.__main__ import cli_evaluate

        from safelm.evaluate.capability import lm_eval_model  # noqa: F401  registers `safelm`
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "lm_eval":
            raise
        raise ValueError("lm-evaluation-harness is not installed: scripts/install.sh eval") from error
    sys.argv = ["lm_eval", *argv]
    cli_evaluate()
    if os.path.isdir(folder):  # its samples_*.jsonl would be taken for documents
        documents.declare_no_documents(folder, "safelm.lm_eval")


def _parser() -> argparse.ArgumentParser:
    return cli.parser(
        "safelm.lm_eval",
        __doc__,
        "python -m safelm.lm_eval --model safelm --model_args checkpoint=/tmp/run --tasks my_task --include_path tasks",
    )


if __name__ == "__main__":
    main()
