"""Reads files of configs/: `FILE` or `FILE:VARIANT`.

A config file has a function `get_config()` that returns a ConfigDict. One that has variants also names them in
`VARIANTS`, and its `get_config(variant)` has a default.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

from safelm import cli


def load(flag: str) -> ConfigDict:
    """The config that `--config=FLAG` names. Raises UserError in one line, with the variants that there are."""
    path, _, variant = flag.partition(":")
    if not pathlib.Path(path).is_file():
        raise cli.UserError(f"--config={flag}: no such file; those of the project are in configs/")
    try:
        module = runpy.run_path(path)
        get_config = module["get_config"]
    except (KeyError, SyntaxError, ImportError) as error:
        raise cli.UserError(f"--config={flag}: not a config file ({type(error).__name__}: {error})") from None
    if not variant:
        return get_config()
    variants = tuple(module.get("VARIANTS", ()))
    if variant not in variants:
        known = f"has {', '.join(variants)}" if variants else "has no variants"
        raise cli.UserError(f"--config={flag}: no variant {variant!r}: {path} {known}")
    return get_config(variant)
