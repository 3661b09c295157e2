"""Flags of the commands that take a config file and `--config.a.b=value`."""

import sys
from collections.abc import Callable

from absl import flags as absl_flags
from ml_collections import config_flags

from safelm import cli, config_files
from safelm.train import config_fields

CONFIG = config_flags.DEFINE_config_file("config", help_string="File of configs/, with an optional :variant.")


def parse(arguments: list[str], fail: Callable[[str], None]) -> list[str]:
    """Parses the flags; `fail` is told in one line of a file, variant, field or argument that can't be used.

    `--help` ends the process with code 0. The config is to be the flag "config".
    """
    arguments = [arguments[0], *cli.with_underscores(arguments[1:])]
    try:
        flag = _locate_config(arguments)
        config = config_files.load_config(flag) if flag else None
        sys.argv = arguments  # where ml_collections looks for --config.a.b
        rest = absl_flags.FLAGS(arguments)
    except SystemExit:
        if any(argument.lstrip("-") in ("help", "helpshort", "helpfull", "?") for argument in arguments):
            sys.exit(0)  # absl would end with 1
        raise
    except (cli.UserError, absl_flags.Error) as error:
        fail(str(error))
    except (AttributeError, KeyError, TypeError) as error:
        fail(config_fields.unknown_field(config, arguments) or str(error))
    if rest[1:]:
        fail(f"unexpected argument: {rest[1]}")
    return rest


def _locate_config(arguments: list[str]) -> str:
    """The value of the last `--config`, or ""; replaces every one's file by its path as it can be opened."""
    found = ""
    for number, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name not in ("-config", "--config") or number == 0:
            continue
        if equals:
            found = config_files.locate(value)
            arguments[number] = f"{name}={found}"
        elif number + 1 < len(arguments):
            found = arguments[number + 1] = config_files.locate(arguments[number + 1])
    return found
