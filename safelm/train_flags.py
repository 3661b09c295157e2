"""Flags of the commands that take a config file and `--config.a.b=value`."""

import sys
from collections.abc import Callable

from absl import app, flags
from ml_collections import ConfigDict

from safelm import train_config


def parse(arguments: list[str], fail: Callable[[str], None]) -> list[str]:
    """Parses the flags; `fail` is told in one line of a config field or an argument that doesn't exist.

    `--help` ends the process with code 0. The config is to be the flag "config".
    """
    try:
        rest = app.parse_flags_with_usage(arguments)
    except SystemExit:
        if any(argument.lstrip("-") in ("help", "helpshort", "helpfull", "?") for argument in arguments):
            sys.exit(0)  # absl would end with 1
        raise
    except (AttributeError, KeyError, TypeError) as error:
        # The flag has no value yet, so the file it names is read again to say which field it lacks.
        paths = [argument.split("=", 1)[1] for argument in arguments if argument.lstrip("-").startswith("config=")]
        config = flags.FLAGS["config"].parser.parse(paths[-1]) if paths else ConfigDict()
        fail(train_config.unknown_field(config, arguments) or str(error))
    if rest[1:]:
        fail(f"unexpected argument: {rest[1]}")
    return rest
