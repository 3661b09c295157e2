"""Estimates a compiled step's best time: a roofline over its instructions, with loops counted as often as they run.

    an instruction  max(FLOPs / peak FLOP/s, bytes of HBM read and written / HBM bytes/s)
    a computation   max(its instructions one after the other, inner loops included,
                        all bytes it moves to and from HBM, copies ahead of time included / HBM bytes/s,
                        its asynchronous collectives) + its other collectives
    a step          the entry computation

Everything is assumed to run at the chip's peak rate, so the program can't be faster; latencies, pipelining, tile
padding and vector units are ignored. The compiler's cycle count of an instruction includes those: the second estimate
is the same sum with the cycle count wherever it is larger. Both are computed, not measured.
"""

import collections
import dataclasses
from collections.abc import Sequence

from safelm.aot.collectives import Collective
from safelm.aot.hlo import Instruction, Module
from safelm.aot.topology import Chip
from safelm.aot.work import AHEAD, flops_of, hbm_bytes_of


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of one step on one chip.

    Attributes:
      seconds: the roofline above.
      serial_seconds: the same with nothing overlapping.
    """

    flops: float | int
    kernel_flops: float | int  # those of them in attention kernels
    hbm_bytes: float | int
    compute_seconds: float | int  # flops / peak
    hbm_seconds: float | int
    collective_seconds: float | int
    exposed_seconds: float | int  # of collectives that no other work hides
    seconds: float
    serial_seconds: float | int
    cycle_seconds: float | int | None  # with the compiler's cycles; None where the chip's clock rate isn't known


@dataclasses.dataclass
class _Own:
    """The cost of one run of a computation, without its loops."""

    busy: float = 0.0  # seconds of its instructions
    busy_by_cycles: float = 0.0
    moving: float = 0.0  # seconds of all its bytes
    waiting: float = 0.0  # seconds of its asynchronous collectives
    blocking: float = 0.0  # of the others


def estimate(module: Module, found: Sequence[Collective], chip: Chip, peak_flops: float | int) -> Cost:
    """The cost of a program by the roofline in the module's docstring."""
    flops = kernel_flops = hbm = 0.0
    own: dict[str, _Own] = collections.defaultdict(_Own)
    for name, runs, instruction in module.work():
        products, kernel = flops_of(module, name, instruction)
        num_bytes = hbm_bytes_of(module, name, instruction)
        flops += runs * (products + kernel)
        kernel_flops += runs * kernel
        hbm += runs * num_bytes
        mine = own[name]
        mine.moving += num_bytes / chip.hbm_rate
        if instruction.opcode not in AHEAD:
            seconds = max((products + kernel) / peak_flops, num_bytes / chip.hbm_rate)
            mine.busy += seconds
            mine.busy_by_cycles += max(seconds, _cycles(instruction) / (chip.clock_rate or float("inf")))
    for collective in found:
        if collective.is_async:
            own[collective.computation].waiting += collective.seconds
        else:
            own[collective.computation].blocking += collective.seconds
    total = sum(c.runs * c.seconds for c in found)
    best, serial = _seconds(module, own, module.entry), _seconds(module, own, module.entry, overlap=False)
    return Cost(
        flops=flops,
        kernel_flops=kernel_flops,
        hbm_bytes=hbm,
        compute_seconds=flops / peak_flops,
        hbm_seconds=hbm / chip.hbm_rate,
        collective_seconds=total,
        exposed_seconds=max(total - (serial - best), 0.0),
        seconds=best,
        serial_seconds=serial,
        cycle_seconds=_seconds(module, own, module.entry, by_cycles=True) if chip.clock_rate else None,
    )


def _seconds(
    module: Module, own: dict[str, _Own], name: str, *, overlap: bool = True, by_cycles: bool = False
) -> float:
    """Seconds of one run of a computation, with its loops."""
    mine = own[name]
    busy = mine.busy_by_cycles if by_cycles else mine.busy
    for instruction in module.computations[name].values():
        if instruction.opcode in ("while", "conditional", "call"):
            trips = module.trips(name, instruction) if instruction.opcode == "while" else 1
            for role, called in instruction.called():
                if role != "condition":
                    busy += trips * _seconds(module, own, called, overlap=overlap, by_cycles=by_cycles)
    if overlap:
        return max(busy, mine.moving, mine.waiting) + mine.blocking
    return max(busy, mine.moving) + mine.waiting + mine.blocking


def _cycles(instruction: Instruction) -> int:
    return int(instruction.attribute(r'"estimated_cycles":"(\d+)"') or 0)
