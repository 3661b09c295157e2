"""TPU slices by name and the properties of their chips, as devices to compile for without a TPU.

The numbers are those of the pages docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}: HBM bandwidth, "ICI bandwidth per
chip" divided by its ports (one link, one way), "data center network bandwidth per Pod" divided by its chips (v4, v5p: a
host's network card divided by its four chips). `hbm_bytes` is what the compiler allows a program, a little less than
the chip has (its refusals state the figure). FLOP/s: `safelm.train.metrics.PEAK_FLOPS`.
"""

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax

GIB = 2**30

# libtpu asks Google's metadata server for these, or warns, where they are not set; any value will do without a TPU.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no TPU is held, so there is nothing to lock
}


@dataclasses.dataclass(frozen=True)
class Chip:
    """One generation of TPU.

    Attributes:
      shapes: available slices, as chips along each axis.
      hbm_bytes: memory of a chip, as the compiler counts it.
      hbm_rate: memory bandwidth in bytes/s.
      link_rate: bytes/s of one ICI link in one direction; a chip has two links along each axis of the slice.
      dcn_rate: a chip's share of the network between slices, in bytes/s and one direction.
      clock_rate: cycles/s of a core, to read the compiler's cycle counts; None where it isn't published.
      wraps_at: an axis of this many chips (or a multiple) is a ring, a shorter one a line.
      options: arguments of `get_topology_desc`.
    """

    shapes: Sequence[tuple[int, ...]]
    hbm_bytes: int
    hbm_rate: float
    link_rate: float
    dcn_rate: float
    clock_rate: float | None
    wraps_at: int
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


_FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_CUBES = (
    *((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8), (4, 8, 8), (8, 8, 8), (8, 8, 12)),
    *((8, 8, 16), (8, 16, 16), (16, 16, 16), (16, 16, 24)),
)
CHIPS = {
    "v4": Chip(_CUBES[:12], int(30.75 * GIB), 1228e9, 50e9, 6.25e9, 1.05e9, 4, {"chip_config_name": "megacore"}),
    "v5e": Chip(_FLAT, int(15.75 * GIB), 819e9, 50e9, 3.125e9, 1.5e9, 16),
    "v5p": Chip(_CUBES, int(95.73 * GIB), 2765e9, 100e9, 6.25e9, 1.75e9, 4),
    "v6e": Chip(_FLAT, int(31.24 * GIB), 1638e9, 100e9, 12.5e9, None, 16),
}


@dataclasses.dataclass(frozen=True)
class Slice:
    """One or more equal slices of a chip: `name` as given, `shape` of one of them."""

    name: str
    generation: str
    shape: tuple[int, ...]
    num_slices: int

    @property
    def chip(self) -> Chip:
        return CHIPS[self.generation]

    @property
    def num_chips(self) -> int:
        return self.num_slices * math.prod(self.shape)

    def rings(self) -> tuple[bool, ...]:
        """For every axis of a slice, whether its ends are linked; in three dimensions all axes are rings or none."""
        long = [length % self.chip.wraps_at == 0 for length in self.shape]
        return tuple(long) if len(self.shape) == 2 else (all(long),) * len(long)


def parse(name: str, num_slices: int = 1) -> Slice:
    """The slice with a name such as v5e:4x4. Raises ValueError listing the names that exist."""
    match = re.fullmatch(r"([a-z0-9]+):(\d+(?:x\d+)*)", name)
    generation = match[1] if match else name.split(":")[0]
    if match is None or generation not in CHIPS:
        known = ", ".join(f"{each} ({_spelled(chip.shapes)})" for each, chip in CHIPS.items())
        raise ValueError(f"--topology={name}: no such topology; it is CHIP:SHAPE as in v5e:4x4, with {known}")
    shapes = CHIPS[generation].shapes
    shape = tuple(int(length) for length in match[2].split("x"))
    if len(shape) == 3 and shape[2] == 1 and len(shapes[0]) == 2:
        shape = shape[:2]
    if shape not in shapes:
        raise ValueError(f"--topology={name}: no such topology; {generation} has {_spelled(shapes)}")
    if num_slices < 1:
        raise ValueError(f"--slices={num_slices}: at least 1")
    return Slice(name, generation, shape, num_slices)


def _spelled(shapes: Sequence[tuple[int, ...]]) -> str:
    return ", ".join("x".join(map(str, shape)) for shape in shapes)


def set_environment() -> None:
    """Sets what libtpu needs to start without a TPU, and puts JAX on the CPU. Call it before JAX is used."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    jax.config.update("jax_platforms", "cpu")


def devices(tpu: Slice) -> list[jax.Device]:
    """The slice's devices, for making a mesh and compiling; they can't run anything.

    Raises ValueError if libtpu is not installed.
    """
    from jax.experimental import topologies

    if importlib.util.find_spec("libtpu") is None:
        raise ValueError("compiling for a TPU needs libtpu: scripts/install.sh tpu")
    name = f"{tpu.generation}:{'x'.join(map(str, tpu.shape))}"
    options = dict(tpu.chip.options) | ({"num_slices": tpu.num_slices} if tpu.num_slices > 1 else {})
    if tpu.shape == (1, 1):
        options["chips_per_host_bounds"] = (1, 1, 1)  # a host's chips are otherwise taken to be all there
    return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices)
