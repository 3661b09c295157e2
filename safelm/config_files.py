"""Reads files of configs/: `FILE` or `FILE:VARIANT`.

A config file has a function `get_config()` that returns a ConfigDict. One that has variants also names them in
`VARIANTS`, and its `get_config(variant)` has a default. A name such as configs/quickstart.py is that of the project's
own file, where the working directory has none of that name.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

from safelm import cli

_FOLDER = pathlib.Path(__file__).parents[1] / "configs"  # in a checkout and where SafeLM is installed


def locate(flag: str) -> str:
    """`--config=FLAG` with its file's path as it can be opened. Raises UserError in one line if there is no such file.

    Only a name directly under configs/ may be that of the project's own file.
    """
    path, colon, variant = flag.partition(":")
    own = _FOLDER / pathlib.PurePath(path).name
    is_own = pathlib.PurePath(path).parent == pathlib.PurePath("configs") and own.is_file()
    if not pathlib.Path(path).is_file():
        if not is_own:
            raise cli.UserError(f"--config={flag}: no such file; those of the project are in configs/")
        path = str(own)
    return f"{path}{colon}{variant}"


def load_config(flag: str) -> ConfigDict:
    """The config that `--config=FLAG` names. Raises UserError in one line, with the variants that there are."""
    path, _, variant = locate(flag).partition(":")
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
