"""XLA_FLAGS that correct results need, merged with the user's; importable without JAX.

jaxlib 0.10 computes wrong numbers on CPUs in some fused reductions: a matrix-vector product by row, squared and summed
over 32,769 rows, differs from numpy in the last row, and products of arrays of seven axes that are summed crash the
process, some in 0.11 as well (jax issues 39103, 39257, 40412). Leaving reductions out of its YNN fusions mends both;
matrix products stay as fast. jaxlib 0.12 is right as it is.
"""

import importlib.metadata
import os

_FUSION_FLAG = "--xla_cpu_experimental_ynn_fusion_type"
_WITHOUT_REDUCTIONS = f"{_FUSION_FLAG}=-reduce"
_AFFECTED = ("0.10.", "0.11.")


def guard_cpu_reductions() -> None:
    """Adds the flag to XLA_FLAGS where the installed jaxlib needs it; call it before XLA is first used."""
    try:
        jaxlib = importlib.metadata.version("jaxlib")
    except importlib.metadata.PackageNotFoundError:
        return
    flags = merged(os.environ.get("XLA_FLAGS", ""), jaxlib)
    if flags:
        os.environ["XLA_FLAGS"] = flags


def merged(flags: str, jaxlib: str) -> str:
    """The user's XLA_FLAGS with what a jaxlib of this version needs; a fusion flag that the user gives stands."""
    if not jaxlib.startswith(_AFFECTED):
        return flags
    if flags.strip() and not flags.lstrip().startswith("-"):  # the name of a file of flags, as XLA reads it
        try:
            with open(flags, encoding="utf-8") as file:
                flags = file.read()
        except OSError:
            return flags  # XLA names the file
    return flags if _FUSION_FLAG in flags else f"{flags.strip()} {_WITHOUT_REDUCTIONS}".strip()
