"""Finds a compiled program's collectives: how often they run, the bytes a chip sends, the network and the time.

With n chips in a group and `in` the bytes a chip puts in, a chip sends: all-gather in x (n - 1), reduce-scatter and
all-to-all in x (n - 1) / n, all-reduce 2 in x (n - 1) / n, collective-permute in. So a parameter of P bytes that FSDP
keeps in n shards costs P (n - 1) / n every time it is gathered (forward, and again in the backward pass) and as much
for its gradient; the tests check this module against that sum.

Time on ICI is bytes / rate, where a group uses the links along every axis of the slice that it spans: both directions
of a ring, one of a line. Permutes are routed axis by axis, and the busiest link of consecutive permutes decides.
Between slices (DCN) time is bytes / a chip's share of its host's network. Latency is ignored.
"""

import collections
import dataclasses
import itertools
import math
import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from safelm.aot.hlo import COLLECTIVES, Instruction, Module
from safelm.aot.topology import Slice

_ORDER = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"  # an iota's axes, and the order in which they are counted


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective of the program; `num_bytes` and `seconds` are those of one run on one chip."""

    kind: str
    computation: str
    runs: int
    num_bytes: int
    group_size: int
    network: str  # ici or dcn
    seconds: float | int
    is_async: bool  # other work can go on meanwhile
    dtype: str
    origin: str  # the operation in the Python program


class Network:
    """Where a program's partitions run: partition i on `devices[i]`, as in the mesh it was compiled for."""

    def __init__(self, tpu: Slice, devices: Sequence[Any]):
        self._tpu = tpu
        dims = len(tpu.shape)
        self._places = [(getattr(d, "slice_index", 0) or 0, *tuple(d.coords)[:dims]) for d in devices]
        self.num_devices = len(devices)

    def spans_slices(self, groups: Iterable[Sequence[int]]) -> bool:
        return any(len({self._places[member][0] for member in group}) > 1 for group in groups)

    def ici_rate(self, group: Sequence[int]) -> float | int:
        """Bytes/s at which a chip of the group can send to the others."""
        rate = 0.0
        for axis, (length, is_ring) in enumerate(zip(self._tpu.shape, self._tpu.rings(), strict=True), start=1):
            reach = len({self._places[member][axis] for member in group})
            if reach > 1:
                rate += self._tpu.chip.link_rate * (2 if is_ring and reach == length else 1)
        return rate or math.inf

    def permute_seconds(self, permutes: Sequence[tuple[int, Sequence[tuple[int, int]]]]) -> float | int:
        """Seconds of permutes (bytes, pairs of source and target) that run together, set by the busiest link."""
        load: dict[tuple, float] = collections.defaultdict(float)
        for num_bytes, pairs in permutes:
            for source, target in pairs:
                for link in self._route(self._places[source], self._places[target]):
                    load[link] += num_bytes
        return max(load.values(), default=0.0) / self._tpu.chip.link_rate

    def _route(self, source: tuple[int, ...], target: tuple[int, ...]) -> list[tuple]:
        links, here = [], list(source)
        for axis, (length, is_ring) in enumerate(zip(self._tpu.shape, self._tpu.rings(), strict=True), start=1):
            away = target[axis] - here[axis]
            if is_ring and abs(away) > length / 2:
                away -= int(math.copysign(length, away))
            for _ in range(abs(away)):
                direction = 1 if away > 0 else -1
                links.append((*here, axis, direction))
                here[axis] = (here[axis] + direction) % length
        return links


def find(module: Module, network: Network, tpu: Slice) -> list[Collective]:
    """Every collective that the program runs; a start and its done count once."""
    found = []
    for name, runs in module.runs.items():
        permutes = []
        for scope, instruction, is_async in _collectives_of(module, name):
            kind = instruction.opcode.removesuffix("-start")
            in_bytes, dtype = _operand_bytes(module.computations[scope], instruction)
            origin = instruction.attribute(r'op_name="([^"]*)"') or instruction.name
            if instruction.opcode == "send":
                found.append(_between_slices(name, runs, instruction, in_bytes, dtype, tpu))
                continue
            if kind == "all-reduce" and scope != name and _keeps_a_slice(module.computations[scope]):
                kind = "reduce-scatter"
            if kind == "collective-permute":
                pairs = _pairs(instruction)
                seconds = network.permute_seconds([*permutes, (in_bytes, pairs)]) - network.permute_seconds(permutes)
                permutes.append((in_bytes, pairs))
                over = "dcn" if network.spans_slices(pairs) else "ici"
                found.append(Collective(kind, name, runs, in_bytes, 2, over, seconds, is_async, dtype, origin))
                continue
            groups = replica_groups(instruction.attributes, network.num_devices)
            size = len(groups[0])
            sent = sent_bytes(kind, in_bytes, size)
            over = "dcn" if network.spans_slices(groups) else "ici"
            rate = tpu.chip.dcn_rate if over == "dcn" else network.ici_rate(groups[0])
            found.append(Collective(kind, name, runs, sent, size, over, sent / rate, is_async, dtype, origin))
    return found


def sent_bytes(kind: str, in_bytes: int, size: int) -> int:
    """The bytes that a chip in a group of `size` sends when its input has `in_bytes`."""
    shares = {"all-gather": size - 1, "all-reduce": 2 * (size - 1) / size, "collective-permute": 1}
    return round(in_bytes * shares.get(kind, (size - 1) / size))


def totals(collectives: Iterable[Collective]) -> dict[str, dict[str, Any]]:
    """Totals of an update by network and kind: count, bytes a chip sends, seconds, and bytes by dtype."""
    sums: dict[str, dict[str, Any]] = {}
    for c in collectives:
        entry = sums.setdefault(f"{c.network} {c.kind}", {"count": 0, "bytes": 0, "seconds": 0.0, "bytes_by_dtype": {}})
        entry["count"] += c.runs
        entry["bytes"] += c.runs * c.num_bytes
        entry["seconds"] += c.runs * c.seconds
        entry["bytes_by_dtype"][c.dtype] = entry["bytes_by_dtype"].get(c.dtype, 0) + c.runs * c.num_bytes
    return dict(sorted(sums.items()))


def _collectives_of(module: Module, name: str) -> Iterable[tuple[str, Instruction, bool]]:
    """(its computation, collective, whether it is asynchronous) of all that `name` runs itself, fusions included."""
    for instruction in module.computations[name].values():
        if instruction.opcode == "send" and "megascale" in instruction.attributes:
            yield name, instruction, True
        elif instruction.opcode.removesuffix("-start") in COLLECTIVES:
            yield name, instruction, instruction.opcode.endswith("-start") or _is_started(module, name)
        elif instruction.opcode == "fusion":
            yield from _fused_collectives(module, instruction)


def _is_started(module: Module, name: str) -> bool:
    """Whether an async-start runs this computation as its whole work."""
    return any(
        name in (called for _, called in instruction.called())
        for computation in module.computations.values()
        for instruction in computation.values()
        if instruction.opcode == "async-start"
    )


def _fused_collectives(module: Module, fusion: Instruction) -> Iterable[tuple[str, Instruction, bool]]:
    for _, scope in fusion.called():
        computation = module.computations[scope]
        inside = [i for i in computation.values() if i.opcode.removesuffix("-start") in COLLECTIVES]
        if not inside:
            continue
        # TPUs run an asynchronous collective in pieces, each fused with other work; the start is one of them.
        starts = any('"AsyncCollectiveStart"' in i.attributes for i in computation.values())
        is_async = starts or any("async_collective_fusion_config" in i.attributes for i in inside)
        if starts or not is_async:
            yield from ((scope, i, is_async) for i in inside)


def _keeps_a_slice(computation: Mapping[str, Instruction]) -> bool:
    return any(instruction.is_root and instruction.opcode == "dynamic-slice" for instruction in computation.values())


def _operand_bytes(computation: Mapping[str, Instruction], instruction: Instruction) -> tuple[int, str]:
    arrays = [b for operand in instruction.operands if operand in computation for b in computation[operand].buffers]
    return sum(b.num_bytes for b in arrays), arrays[0].dtype if arrays else ""


def _between_slices(name: str, runs: int, send: Instruction, in_bytes: int, dtype: str, tpu: Slice) -> Collective:
    kind = (send.attribute(r'_xla_megascale_transfer_type="(\w+)"') or "send").lower().replace("_", "-")
    sent = sent_bytes(kind, in_bytes, tpu.num_slices)
    origin = send.attribute(r'rendezvous="([^"]*)"') or send.name
    return Collective(kind, name, runs, sent, tpu.num_slices, "dcn", sent / tpu.chip.dcn_rate, True, dtype, origin)


def _pairs(instruction: Instruction) -> list[tuple[int, int]]:
    text = instruction.attribute(r"source_target_pairs=\{(\{[^=]*?\})\}") or ""
    return [(int(source), int(target)) for source, target in re.findall(r"\{(\d+),(\d+)\}", text)]


def replica_groups(attributes: str, num_devices: int) -> list[list[int]]:
    """The groups of a collective, in any of XLA's three notations; without groups, all devices."""
    if match := re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", attributes):
        groups = [[int(i) for i in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", match[1])]
        return groups or [list(range(num_devices))]
    if match := re.search(rf"replica_groups=\[([\d,]+)\]<={_ORDER}", attributes):
        return _ordered_ids(match[2], match[3]).reshape(_integers(match[1])).tolist()
    if match := re.search(rf"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\({_ORDER}\))? \{{([^}}]*)\}}", attributes):
        sizes = {axis: int(size) for axis, size in re.findall(r"'([^']+)'=(\d+)", match[1])}
        chosen = re.findall(r"'([^']+)'(:\(\d+\)\d+)?", match[4])
        if any(part for _, part in chosen):
            raise ValueError(f"replica groups in an unknown notation: {match[0]}")
        ids = _ordered_ids(match[2], match[3]) if match[2] else np.arange(math.prod(sizes.values()))
        return _mesh_groups(ids.reshape(list(sizes.values())), list(sizes), [axis for axis, _ in chosen])
    if "replica_groups=" in attributes:
        raise ValueError(f"replica groups in an unknown notation: {attributes[:200]}")
    return [list(range(num_devices))]


def _integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _ordered_ids(sizes: str, order: str | None) -> np.ndarray:
    """All partitions, counted along axes of these sizes, which are then put in this order."""
    ids = np.arange(math.prod(_integers(sizes))).reshape(_integers(sizes))
    return ids.transpose(_integers(order)) if order else ids


def _mesh_groups(ids: np.ndarray, axes: Sequence[str], chosen: Sequence[str]) -> list[list[int]]:
    """The groups along the chosen axes of a mesh, whose partitions are `ids`."""
    rest = [axis for axis in axes if axis not in chosen]
    size = math.prod(ids.shape[axes.index(axis)] for axis in chosen)
    return ids.transpose([axes.index(axis) for axis in (*rest, *chosen)]).reshape(-1, size).tolist()


def largest(collectives: Iterable[Collective], count: int) -> list[dict[str, Any]]:
    """The collectives that take longest in an update, with equal ones merged."""
    key = operator.attrgetter("network", "kind", "dtype", "num_bytes", "runs", "origin")
    groups = [list(group) for _, group in itertools.groupby(sorted(collectives, key=key), key)]
    groups.sort(key=lambda group: -sum(c.runs * c.seconds for c in group))
    return [
        {
            "network": g[0].network,
            "kind": g[0].kind,
            "dtype": g[0].dtype,
            "count": sum(c.runs for c in g),
            "bytes": sum(c.runs * c.num_bytes for c in g),
            "seconds": sum(c.runs * c.seconds for c in g),
            "overlaps": g[0].is_async,
            "origin": g[0].origin,
        }
        for g in groups[:count]
    ]
