"""Flags of the commands that take a config file and `--config.a.b=value`."""

import sys
from collections.abc import Callable

from absl import app
from ml_collections import config_flags

from safelm import cli, config_files
from safelm.train import config as train_config

CONFIG = config_flags.DEFINE_config_file("config", help_string="File of configs/, with an optional :variant.")


def parse(arguments: list[str], fail: Callable[[str], None]) -> list[str]:
    """Parses the flags; `fail` is told in one line of a file, variant, field or argument that doesn't exist.

    `--help` ends the process with code 0. The config is to be the flag "config".
    """
    arguments = [arguments[0], *cli.with_underscores(arguments[1:])]
    sys.argv = arguments  # where ml_collections looks for --config.a.b
    path = _config_path(arguments)
    try:
        config = config_files.load(path) if path else None
        rest = app.parse_flags_with_usage(arguments)
    except SystemExit:
        if any(argument.lstrip("-") in ("help", "helpshort", "helpfull", "?") for argument in arguments):
            sys.exit(0)  # absl would end with 1
        raise
    except cli.UserError as error:
        fail(str(error))
    except (AttributeError, KeyError, TypeError) as error:
        fail(train_config.unknown_field(config, arguments) or str(error))
    if rest[1:]:
        fail(f"unexpected argument: {rest[1]}")
    return rest


def _config_path(arguments: list[str]) -> str:
    """The value of the last `--config` on the command line, or ""."""
    for number in range(len(arguments) - 1, 0, -1):
        name, equals, value = arguments[number].lstrip("-").partition("=")
        if name == "config" and arguments[number].startswith("-"):
            return value if equals else "".join(arguments[number + 1 : number + 2])
    return ""
