"""Builds the C++ kernels on the machine that runs them, once, and makes them known to XLA.

The sources lie beside this file, XLA's headers come with jaxlib. What was built is kept in

    $SAFELM_CACHE (~/.cache/safelm)/cpu_kernels/<hash of sources, vectors, jaxlib and compiler>.so
"""

import ctypes
import dataclasses
import functools
import hashlib
import logging
import os
import pathlib
import platform
import shlex
import shutil
import subprocess
import time

import jax
import jaxlib

from safelm.io import cache, files

log = logging.getLogger(__name__)

_FOLDER = pathlib.Path(__file__).parent
_SOURCE = "kernels.cc"
_HEADERS = tuple(sorted(path.name for path in _FOLDER.glob("*.h")))
_HANDLERS = {
    "int8_products": "Int8ProductsHandler",
    "bfloat16_products": "Bfloat16ProductsHandler",
    "float32_products": "Float32ProductsHandler",
    "matmul": "MatmulHandler",
    "squared_norm": "SquaredNormHandler",
    "adamw": "AdamWHandler",
    "attend_next": "AttendNextHandler",
    "attend_chunk": "AttendChunkHandler",
    "follow_beams": "FollowBeamsHandler",
    "put_tokens": "PutTokensHandler",
    "log_sum_exp": "LogSumExpHandler",
}
_FLAGS = "-std=c++17 -O3 -fno-math-errno -fno-trapping-math -ffp-contract=fast -fPIC -shared -pthread".split()
_COMPILERS = ("g++", "clang++", "c++")
_TIMEOUT = 600  # seconds


class UnavailableError(RuntimeError):
    """The kernels can't be built here; the message says why."""


@dataclasses.dataclass(frozen=True)
class Vectors:
    """A set of vector instructions, by its name: what Linux calls its parts, and how a compiler is told."""

    name: str
    cpu_flags: frozenset[str]
    compiler_flags: tuple[str, ...]


def _vectors(name: str, cpu_flags: str, compiler_flags: str) -> Vectors:
    return Vectors(name, frozenset(cpu_flags.split()), tuple(compiler_flags.split()))


# Best first.
VECTORS = (
    _vectors(
        "amx",
        "avx512f avx512bw avx512dq avx512vl avx512_vnni avx512_bf16 fma amx_tile amx_int8 amx_bf16",
        "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -mavx512bf16 -mfma -mamx-tile -mamx-int8 -mamx-bf16",
    ),
    _vectors(
        "avx512_bf16",
        "avx512f avx512bw avx512dq avx512vl avx512_vnni avx512_bf16 fma",
        "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -mavx512bf16 -mfma",
    ),
    _vectors(
        "avx512_vnni",
        "avx512f avx512bw avx512dq avx512vl avx512_vnni fma",
        "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -mfma",
    ),
    _vectors("avx_vnni", "avx2 avx_vnni fma", "-mavx2 -mavxvnni -mfma"),
    _vectors("avx2", "avx2 fma", "-mavx2 -mfma"),
)


@functools.cache
def find() -> Vectors | str:
    """The best instructions that the kernels could be built for, registered by `register`; or why there are none."""
    if (backend := jax.default_backend()) != "cpu":
        return f"they are for CPUs, JAX computes on {backend}"
    failed = f"they are written for AVX2 and AVX-512, this {platform.machine()} CPU has neither"
    for vectors in usable_vectors(_cpu_flags()):
        try:
            register(vectors)
        except (OSError, UnavailableError) as error:
            failed = str(error)
        else:
            return vectors
    return failed


def refusal() -> str | None:
    """Why the kernels can't run here, if they can't."""
    return found if isinstance(found := find(), str) else None


@functools.cache
def register(vectors: Vectors) -> None:
    """Builds the kernels for these instructions unless that was done before, and registers them by `target`.

    Raises:
      UnavailableError: no compiler, or it fails.
      OSError: what was built can't be written or loaded.
    """
    library = ctypes.CDLL(str(built(vectors)))
    for kernel, symbol in _HANDLERS.items():
        handler = jax.ffi.pycapsule(getattr(library, symbol))
        jax.ffi.register_ffi_target(_target(kernel, vectors), handler, platform="cpu")


def target(kernel: str) -> str:
    """What XLA knows a kernel by; ValueError where they can't run."""
    if isinstance(vectors := find(), str):
        raise ValueError(f"weights prepared with products='native' can't be used: {vectors}")
    return _target(kernel, vectors)


def _target(kernel: str, vectors: Vectors) -> str:
    return f"safelm_{kernel}_{vectors.name}"


def usable_vectors(cpu_flags: frozenset[str]) -> list[Vectors]:
    """Those of `VECTORS` that a CPU with these flags has, best first."""
    return [vectors for vectors in VECTORS if vectors.cpu_flags <= cpu_flags]


def _cpu_flags() -> frozenset[str]:
    """The first CPU's flags; none where it is not Linux on x86."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    flags = next((line.partition(":")[2] for line in lines if line.startswith("flags")), "")
    return frozenset(flags.split())


def built(vectors: Vectors) -> pathlib.Path:
    """The shared library for these instructions, built if it isn't there. One process builds, others wait for it.

    Raises:
      UnavailableError: no compiler, it failed, or somebody else owns the library.
      OSError: the folder can't be written.
    """
    compiler = _compiler()
    sources = b"".join((_FOLDER / name).read_bytes() for name in (_SOURCE, *_HEADERS))
    version = _run([*compiler, "--version"]).splitlines()[:1]
    parts = (sources, vectors.compiler_flags, _FLAGS, jaxlib.__version__, compiler, version, platform.machine())
    key = hashlib.sha256(repr(parts).encode()).hexdigest()[:24]
    path = pathlib.Path(cache.cache_root(), "cpu_kernels", f"{key}.so")
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "a") as lock:
        files.wait_for_lock(lock)
        if not path.exists():
            files.write_whole(path, functools.partial(_build, compiler, vectors))
    if path.stat().st_uid != os.getuid():
        raise UnavailableError(f"{path} belongs to somebody else")
    return path


def _build(compiler: list[str], vectors: Vectors, output: pathlib.Path) -> None:
    start = time.monotonic()
    flags = [*_FLAGS, *vectors.compiler_flags, "-isystem", jax.ffi.include_dir()]
    _run([*compiler, *flags, str(_FOLDER / _SOURCE), "-o", str(output)])
    log.info("CPU kernels: built for %s in %.0f s, once", vectors.name, time.monotonic() - start)


def _compiler() -> list[str]:
    """The command of a C++ compiler: $CXX, or the first of the usual ones."""
    if given := os.environ.get("CXX"):
        return shlex.split(given)
    found = next(filter(None, map(shutil.which, _COMPILERS)), None)
    if found is None:
        raise UnavailableError(f"no C++ compiler: none of {', '.join(_COMPILERS)} on PATH, and CXX is not set")
    return [found]


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, check=True)
    except subprocess.CalledProcessError as error:
        reason = next((line for line in error.stderr.splitlines() if "error" in line), error.stderr.strip()[-200:])
        raise UnavailableError(f"{command[0]} can't build them: {reason}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UnavailableError(f"{command[0]} can't build them: {error}") from error
    return done.stdout
