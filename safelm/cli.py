"""What every command shares: one clear line for bad input, exit code 0 only on success."""

import argparse
import logging
import os
import sys
import threading
from collections.abc import Callable, Sequence

_LOG_FORMAT = "%(levelname).1s %(name)s: %(message)s"


class UserError(ValueError):
    """Input the user can mend; its message names the file, row, field or flag and the value it got."""


def parser(module: str, doc: str, example: str) -> argparse.ArgumentParser:
    """An argument parser whose `--help` shows what the command does and one runnable example."""
    return argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=doc,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def run(
    main: Callable[[argparse.Namespace], None], arguments: argparse.ArgumentParser, argv: Sequence[str] | None = None
) -> None:
    """Parses the command line and runs `main`; bad input ends the process with one line and code 2.

    A `ValueError` or `OSError` is taken for bad input (the message is the line), an interrupt ends with 130;
    anything else is a defect and keeps its traceback.
    """
    _log_to_stderr()
    parsed = arguments.parse_args(argv)
    try:
        main(parsed)
    except (ValueError, OSError) as error:
        sys.exit(_fail(f"{arguments.prog}: {error}", 2))
    except KeyboardInterrupt:
        code = _fail(f"{arguments.prog}: interrupted", 130)
        if any(not thread.daemon for thread in threading.enumerate() if thread is not threading.main_thread()):
            sys.stderr.flush()
            os._exit(code)  # threads at work, such as a Beam worker's, would keep the process until they are done
        sys.exit(code)


def _log_to_stderr() -> None:
    logging.basicConfig(level=logging.INFO, format=_LOG_FORMAT, stream=sys.stderr)
    for name in ("safelm", "__main__"):  # where Orbax was imported it has set up logging, of warnings only
        logging.getLogger(name).setLevel(logging.INFO)
    for handler in logging.root.handlers:
        if type(handler) is logging.StreamHandler:
            handler.setFormatter(logging.Formatter(_LOG_FORMAT))


def _fail(line: str, code: int) -> int:
    print(" ".join(line.split()), file=sys.stderr)
    return code
