"""Compiler options of a config's update, `config.compiler_options`: XLA's flags, for this one program alone.

`XLA_FLAGS` and `LIBTPU_INIT_ARGS` hold for a whole process and are part of no config; these are written down with the
run, and `safelm.aot` compiles with the same. What a flag does, and which there are, depends on the compiler's version.

A flag that names a platform (`xla_tpu_...`) is for that one alone and is left out elsewhere, so that a config with a
pod's flags runs on a laptop.
"""

from collections.abc import Mapping, Sequence

import jax

_BOOLS = {"true": True, "false": False}
_PLATFORMS = {"xla_tpu_": "tpu", "xla_gpu_": "gpu", "xla_cpu_": "cpu"}  # of flags that begin so


def parse_options(options: Sequence[str]) -> dict[str, str | bool]:
    """The flags of "FLAG=VALUE" each, such as "xla_tpu_scoped_vmem_limit_kib=65536".

    Raises ValueError for an entry that isn't of that form and for a flag given twice.
    """
    found: dict[str, str | bool] = {}
    for option in options:
        flag, _, value = option.removeprefix("--").partition("=")
        if not flag.startswith("xla_") or not value:
            raise ValueError(f"compiler_options: {option!r} is not of the form xla_FLAG=VALUE")
        if flag in found:
            raise ValueError(f"compiler_options: {flag} is given twice")
        found[flag] = _BOOLS.get(value.lower(), value)
    return found


def for_platform(flags: Mapping[str, str | bool], platform: str) -> dict[str, str | bool]:
    """The flags without those of another platform; `platform` is that of JAX's devices ("cpu", "gpu" or "tpu")."""
    others = tuple(start for start, of in _PLATFORMS.items() if of != platform)
    return {flag: value for flag, value in flags.items() if not flag.startswith(others)}


def compile_with(lowered: jax.stages.Lowered, options: Sequence[str], platform: str) -> jax.stages.Compiled:
    """Compiles with those of the options that are for `platform`, that of the devices compiled for.

    Raises ValueError that names the flag which the compiler refuses, and why.
    """
    flags = for_platform(parse_options(options), platform)
    try:
        return lowered.compile(compiler_options=flags or None)
    except jax.errors.JaxRuntimeError as error:
        said = " ".join(str(error).split())
        refused = next((flag for flag in flags if flag in said), None)
        if refused is None or "RESOURCE_EXHAUSTED" in said:
            raise
        raise ValueError(f"compiler_options: {refused}={flags[refused]} is refused: {said}") from None
