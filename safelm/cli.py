"""What every command shares: how flags are written, one clear line for bad input, exit code 0 only on success.

Flags: `--max_prompts` and `--max-prompts` are the same flag, in every command. `--checkpoint` is `NAME=DIR` or `DIR`,
in every command: DIR is the folder of a training run, of `safelm.convert` or of a Hugging Face model, a GGUF file, or a
model of a hub by name, `hf:ORG/NAME[@REVISION]`; NAME is what results call the model: MODEL, MODEL@STAGE or
MODEL@STAGE#SEED. Without a name it is the folder's own; a relative folder with `=` in its first part is written
`./DIR`.
"""

import argparse
import difflib
import inspect
import logging
import os
import re
import sys
import threading
import traceback
import types
from collections.abc import Callable, Collection, Sequence
from typing import Any, NoReturn

from safelm.io import host_memory, progress, remote

_LOG_FORMAT = "%(levelname).1s %(name)s: %(message)s"
_MISSING = re.compile(r"^(the following|one of the) arguments .* ?(are|is) required")  # argparse's own line
_NAME = re.compile(r"[A-Za-z0-9][\w.+-]*(@[\w.+-]+)?(#\d+)?", re.ASCII)
_LONGEST_SHOWN = 300  # characters of a flag's value in an error
_STOPPED = (130, 143)  # exit codes after an interrupt and a termination
_WRITTEN = ("output", "cache", "journals", "verdicts", "write")  # flags that name what a command writes
CHECKPOINT = "NAME=DIR"  # how help texts show the flag's value


def make_callable(module: str, function: Callable[..., Any]) -> None:
    """Lets a command's module be called as the function of `safelm` that has its name: `safelm.score(texts, ...)`.

    Importing a module puts it in its package's namespace, where a function of that name would be hidden by it.
    """

    class CallableModule(types.ModuleType):
        __call__ = staticmethod(function)
        __signature__ = inspect.signature(function)

    sys.modules[module].__class__ = CallableModule


class UserError(ValueError):
    """Input that the user can mend; the message names the file, row, field or flag and its value."""


class _Parser(argparse.ArgumentParser):
    """An argument parser that takes dashes for the underscores in a flag's name."""

    buckets: Collection[str] = ()

    _given: Sequence[str] = ()

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:
        self._given = with_underscores(sys.argv[1:] if args is None else args)
        return super().parse_known_args(self._given, namespace)

    def error(self, message: str) -> NoReturn:
        """Ends with 2 and a line, which names unknown flags too where others are missing: one may be misspelt."""
        if unknown := self._unknown_flags() if _MISSING.search(message) else []:
            message = f"unknown: {', '.join(unknown)}; {message}"
        super().error(message)

    def _unknown_flags(self) -> list[str]:
        """Flags that were given and that there are not, with the one that is meant where its name is similar."""
        end = self._given.index("--") if "--" in self._given else len(self._given)
        names = [each.partition("=")[0] for each in self._given[:end] if re.match(r"--\w", each)]
        known = self._option_string_actions
        unknown = [name for name in dict.fromkeys(names) if name not in known]
        similar = {name: difflib.get_close_matches(name, known, 1) for name in unknown}
        return [name + "".join(f" (is {each} meant?)" for each in similar[name]) for name in unknown]


def with_underscores(arguments: Sequence[str]) -> list[str]:
    """The arguments with `--some-flag=value` as `--some_flag=value`, except those after a bare `--`."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    return [_flag_with_underscores(argument) for argument in arguments[:end]] + list(arguments[end:])


def _flag_with_underscores(argument: str) -> str:
    if not re.match(r"--\w", argument):
        return argument
    name, equals, value = argument[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"


def parser(module: str, doc: str, example: str = "", *, buckets: Collection[str] = ()) -> argparse.ArgumentParser:
    """An argument parser whose `--help` shows what the command does and one runnable example.

    Args:
      module: is run by `python -m`, but for "scripts.FOLDER.NAME", which is a file.
      buckets: flags whose output may be in a bucket; `run` refuses a URL for the others.
    """
    is_script = module.startswith("scripts.")
    made = _Parser(
        prog=f"python {module.replace('.', '/')}.py" if is_script else f"python -m {module}",
        description=doc,
        epilog=f"example:\n  {example}" if example else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.buckets = buckets
    if not is_script:
        made.add_argument("--progress_file", default="", metavar="FILE", help=progress.HELP)
    return made


def checkpoint(flag: str) -> tuple[str, str]:
    """Name and folder of a `--checkpoint`. Raises ValueError for a flag that is neither `NAME=DIR` nor `DIR`."""
    name, equals, folder = flag.partition("=")
    if flag.startswith("hf:"):
        name, folder = re.sub("@.*", "", flag).rpartition("/")[2], flag
    elif not equals or "/" in name:
        name, folder = os.path.basename(flag.rstrip("/")), flag
    if not folder or not _NAME.fullmatch(name):
        raise UserError(f"--checkpoint={flag}: want NAME=DIR or DIR with NAME = MODEL, MODEL@STAGE or MODEL@STAGE#SEED")
    return name, folder


def checkpoints(flags: Sequence[str]) -> dict[str, str]:
    """Folders by name of a repeatable `--checkpoint`. Raises ValueError for a name that is given twice."""
    folders: dict[str, str] = {}
    for name, folder in map(checkpoint, flags):
        if name in folders:
            raise UserError(f"--checkpoint={name}={folder}: the name {name} is given twice")
        folders[name] = folder
    return folders


def run(
    main: Callable[[argparse.Namespace], None],
    arguments: argparse.ArgumentParser,
    argv: Sequence[str] | None = None,
    *,
    decodes: bool = False,
) -> None:
    """Parses the command line and runs `main`; bad input ends the process with one line and code 2.

    A `ValueError` or `OSError` is taken for bad input (the message is the line), an interrupt ends with 130;
    anything else is a defect and keeps its traceback; the progress file says its kind and place.

    `decodes`: on a CPU it holds weights and caches, which are read from end to end for every token (`host_memory`).
    """
    _log_to_stderr()
    parsed = arguments.parse_args(argv)
    if decodes:
        host_memory.keep_freed_memory()
    progress.begin(getattr(parsed, "progress_file", ""), arguments.prog)
    try:
        _check_local_outputs(parsed, getattr(arguments, "buckets", ()))
        main(parsed)
        progress.end("done")
    except (ValueError, OSError) as error:
        line = named_by_flags(_told(error), parsed)
        progress.end("failed", " ".join(line.split()))
        sys.exit(_fail(f"{arguments.prog}: {line}", 2))
    except KeyboardInterrupt:
        progress.end("stopped")
        code = _fail(f"{arguments.prog}: interrupted", 130)
        if any(not thread.daemon for thread in threading.enumerate() if thread is not threading.main_thread()):
            sys.stderr.flush()
            os._exit(code)  # threads at work, such as a Beam worker's, would keep the process until they are done
        sys.exit(code)
    except SystemExit as ended:
        _end_by_exit(ended.code)
        raise
    except BaseException as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        progress.end("failed", f"{type(error).__name__} in {place.filename}, line {place.lineno}")
        raise


def _end_by_exit(code: Any) -> None:
    """The progress file's end for `sys.exit(code)`."""
    if not code:
        progress.end("done")
    elif code in _STOPPED:
        progress.end("stopped")
    else:
        progress.end("failed", f"exit code {code}" if isinstance(code, int) else " ".join(str(code).split()))


def _check_local_outputs(parsed: argparse.Namespace, buckets: Collection[str]) -> None:
    for name in _WRITTEN:
        value = getattr(parsed, name, None)
        if name not in buckets and isinstance(value, str | os.PathLike):
            remote.check_local_output(value, f"--{name}")


def named_by_flags(message: str, parsed: argparse.Namespace) -> str:
    """The line of an error with the flag that it is about, and the flag's value, where a library knows neither.

    - A setting of a flag's name and value is the flag: `--top_p=0.0` for `top_p=0.0`, and `--rate` for `rate must be`.
    - A flag that the line begins with gets its value, unless the line has it: `--judge=rules: says nothing`.
    - A line without a flag gets the one whose value it quotes, or begins with, or else whose path it holds:
      `--input=a.txt: no such file`.
    """
    for name, value in vars(parsed).items():
        shown = re.escape(str(value))
        message = re.sub(rf"(?<![\w.?&-]){name}=(?={shown}(?![\w.]))", f"--{name}=", message)
        if value is not None:
            message = re.sub(
                rf"^{name}(?=: )|(?<![\w.?&-]){name}(?= must be .*got {shown}(?![\w.]))", f"--{name}", message
            )
    if first := re.match(r"--(\w+)(?=[ :])", message):
        shown = _shown(vars(parsed).get(first[1]))
        return f"{first[0]}={shown}{message[first.end() :]}" if shown and shown not in message else message
    if any(name in vars(parsed) for name in re.findall(r"--(\w+)", message)):
        return message
    found = [
        (_likeness(message, piece), name, value)
        for name, given in vars(parsed).items()
        for value in (given if isinstance(given, list) else [given])
        for piece in _pieces(value)
    ]
    likeness, name, value = max(found, key=lambda each: each[0], default=((0, 0), "", ""))
    if not likeness[0]:
        return message
    return f"--{name}={message}" if message.startswith(f"{value}:") else f"--{name}={value}: {message}"


def _likeness(message: str, piece: str) -> tuple[int, int]:
    """How surely a line is about a flag with this value: 0 if not at all, then by the value's length."""
    if repr(piece) in message:
        return 3, len(piece)
    if message.startswith((f"{piece}:", f"{piece}/", f"{piece},", f"{piece} ")):
        return 2, len(piece)
    is_inside = "/" in piece and re.search(rf"(?<![\w./]){re.escape(piece)}(?![\w.-])", message)
    return (1, len(piece)) if is_inside else (0, 0)


def _pieces(value: Any) -> set[str]:
    """A flag's value and the parts that an error may name alone: of `NAME=KIND:PLACE?options,..`."""
    if not isinstance(value, str) or len(value) > _LONGEST_SHOWN:
        return set()
    found = {value}
    for part in value.split(","):
        name, _, place = part.partition("=") if re.match(r"[\w@#.+-]+=", part) else ("", "", part)
        found |= {part, name, place, place.partition("?")[0], place.partition(":")[2].partition("?")[0]}
    return {each.rstrip("/") for each in found if len(each) > 1}


def _shown(value: Any) -> str:
    shown = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return "" if value is None or isinstance(value, bool) or len(shown) > _LONGEST_SHOWN else shown


def _told(error: Exception) -> str:
    """An error's message; of one of the system's, file and reason without its number."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)


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
