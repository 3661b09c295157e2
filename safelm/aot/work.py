"""Counts the work of one instruction of a compiled program: FLOPs of matrix products, bytes of HBM.

Only the slice of a stacked parameter counts, only the written part of an in-place update, and nothing that a fusion
merely passes through. XLA can't look into the attention kernels, so their products are counted here: two in the forward
kernel, four in that of keys' and values' gradients (five where it has the queries' too), three in that of queries', in
the blocks that reach below the diagonal (kernels compute those whole), with head_dim padded to the matrix unit's 128
lanes (as the chip computes them).
"""

import collections
import math
import re
from collections.abc import Iterable, Sequence

from safelm.aot.hlo import COLLECTIVES, Buffer, Instruction, Module
from safelm.models.attention_kernels import LANES

AHEAD = ("copy-start", "slice-start", "dynamic-slice-start", "dynamic-update-slice-start")  # run beside other work
_KERNEL = 'custom_call_target="tpu_custom_call"'
_PRODUCTS = {"_fwd": (2, ""), "_dkv": (4, "_dkv"), "": (3, "_dq")}  # of splash: products, suffix of its blocks' sizes
_NO_TRAFFIC = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all"),
    *("partition-id", "replica-id", "optimization-barrier", "send", "send-done", "recv", "recv-done", "async-start"),
    *("async-update", "async-done", "copy-done", "slice-done", "dynamic-slice-done", "dynamic-update-slice-done"),
}


def flops_of(module: Module, computation: str, instruction: Instruction) -> tuple[float | int, float | int]:
    """(FLOPs of matrix products, FLOPs of attention kernels) of an instruction, fused ones included."""
    if instruction.opcode == "fusion":
        inner = [
            flops_of(module, name, each)
            for _, name in instruction.called()
            for each in module.computations[name].values()
        ]
        return sum(products for products, _ in inner), sum(kernel for _, kernel in inner)
    if instruction.opcode == "custom-call" and _KERNEL in instruction.attributes:
        return 0.0, _kernel_flops(module, computation, instruction)
    if instruction.opcode not in ("dot", "convolution"):
        return 0.0, 0.0
    left, right = (module.computations[computation][name].buffers[0] for name in instruction.operands[:2])
    if instruction.opcode == "dot":
        contracted = (instruction.attribute(r"lhs_contracting_dims=\{([\d,]*)\}") or "").split(",")
        depth = math.prod(left.dims[int(axis)] for axis in contracted if axis)
        return 2.0 * instruction.buffers[0].num_elements * depth, 0.0
    return _convolution_flops(instruction, left, right), 0.0


def _convolution_flops(instruction: Instruction, image: Buffer, kernel: Buffer) -> float:
    """FLOPs of a convolution, TPUs' form of a product; window positions that fall into padding do not count."""
    image_dims, kernel_dims, out_dims = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes).groups()
    window = dict(re.findall(r"(\w+)=([\dx_\-]+)", instruction.attribute(r"window=\{([^}]*)\}") or ""))
    macs = kernel.dims[kernel_dims.index("i")]
    for label, size in zip(out_dims, instruction.buffers[0].dims, strict=True):
        macs *= 1 if label.isdigit() else size
    for i in range(sum(label.isdigit() for label in out_dims)):
        axis = str(i)
        macs *= _valid_positions(
            instruction.buffers[0].dims[out_dims.index(axis)],
            kernel.dims[kernel_dims.index(axis)],
            image.dims[image_dims.index(axis)],
            stride=_window_value(window, "stride", i, 1),
            padding=_window_value(window, "pad", i, 0),
            image_dilation=_window_value(window, "lhs_dilate", i, 1),
            kernel_dilation=_window_value(window, "rhs_dilate", i, 1),
        )
    return 2.0 * macs


def _window_value(window: dict[str, str], name: str, axis: int, default: int) -> int:
    return int(window[name].split("x")[axis].split("_")[0]) if name in window else default


def _valid_positions(
    out: int, kernel: int, image: int, *, stride: int, padding: int, image_dilation: int, kernel_dilation: int
) -> int:
    """The number of (output, kernel) positions that meet an element of the image."""
    if kernel == 1 and image_dilation == 1 and padding == 0:
        return out
    reach = (image - 1) * image_dilation
    positions = (o * stride - padding + k * kernel_dilation for o in range(out) for k in range(kernel))
    return sum(0 <= x <= reach and x % image_dilation == 0 for x in positions)


def attention_kernels(module: Module) -> dict[str, int]:
    """The program's Pallas kernels and how often an update runs each."""
    counts: collections.Counter[str] = collections.Counter()
    for _, runs, instruction in module.work():
        if instruction.opcode == "custom-call" and _KERNEL in instruction.attributes:
            counts[instruction.name.split(".")[0]] += runs
    return dict(sorted(counts.items()))


def _kernel_flops(module: Module, computation: str, instruction: Instruction) -> float:
    """FLOPs of splash attention, from its operands: queries [B, N, T, H] and keys [B, K, S, H]."""
    arrays = [b for name in instruction.operands for b in module.computations[computation][name].buffers]
    attended = [b.dims for b in arrays if len(b.dims) in (3, 4) and b.dtype in ("bf16", "f32") and b.dims[-1] % 8 == 0]
    if not instruction.name.startswith("splash_mha") or len(attended) < 2:
        return 0.0
    queries, keys = attended[:2]
    num_products, suffix = _PRODUCTS[next(part for part in _PRODUCTS if part in instruction.name)]
    num_products += any(len(b.dims) > len(queries) for b in instruction.buffers)  # queries' gradients, one a block
    padded = -(-queries[-1] // LANES) * LANES
    blocks = [instruction.attribute(rf'block_{axis}{suffix}\\?": ?(\d+)') for axis in ("q", "kv")]
    sizes = [int(size) for size in blocks if size]
    share = _causal_share(queries[-2], *sizes) if len(sizes) == 2 and queries[-2] == keys[-2] else 0.5
    return num_products * 2.0 * math.prod(queries[:-1]) * keys[-2] * padded * share


def _causal_share(length: int, rows: int, columns: int) -> float:
    """The share of a square of scores that lies in blocks with a place on or below the diagonal."""
    reached = (-(-min(start + rows, length) // columns) for start in range(0, length, rows))
    return sum(reached) * rows * columns / length**2


def hbm_bytes_of(module: Module, computation: str, instruction: Instruction) -> float | int:
    """Bytes of HBM that an instruction reads and writes; buffers in other memory do not count."""
    opcode = instruction.opcode
    if opcode in _NO_TRAFFIC or opcode.removesuffix("-start").removesuffix("-done") in COLLECTIVES:
        return 0.0
    if opcode == "custom-call" and _KERNEL not in instruction.attributes:
        return 0.0  # marks of the compiler: AllocateBuffer, ConcatBitcast, ...
    scope = module.computations[computation]
    operands = [scope[name].buffers for name in instruction.operands if name in scope]
    if opcode in AHEAD:
        moved = instruction.buffers[:2]
        taken = min(b.num_bytes for b in moved)  # of a slice, the smaller
        return float(taken * sum(b.memory_space == 0 for b in moved))
    if opcode in ("dynamic-slice", "slice", "gather"):
        return 2.0 * sum(b.hbm_bytes for b in instruction.buffers)
    if opcode == "dynamic-update-slice":
        return 2.0 * sum(b.num_bytes for b in operands[1]) if instruction.buffers[0].memory_space == 0 else 0.0
    if opcode == "fusion":
        (_, called), *_ = instruction.called()
        read = sum(_read_bytes(module, called, i, buffers) for i, buffers in enumerate(operands))
        return read + _written_bytes(module.computations[called], instruction)
    return sum(b.hbm_bytes for buffers in operands for b in buffers) + sum(b.hbm_bytes for b in instruction.buffers)


def _read_bytes(module: Module, called: str, index: int, buffers: Sequence[Buffer]) -> float | int:
    """The bytes that a fusion reads of an operand: all of it, or only the slices it takes."""
    whole = float(sum(b.hbm_bytes for b in buffers))
    if not whole:
        return 0.0
    scope = module.computations[called]
    parameter = next(i for i in scope.values() if i.opcode == "parameter" and int(i.arguments) == index)
    taken = 0.0
    for user, position in _users(scope, parameter.name):
        if user.opcode in ("dynamic-slice", "slice", "gather") and position == 0:
            taken += user.num_bytes
        elif user.opcode == "fusion":
            taken += _read_bytes(module, user.called()[0][1], position, buffers)
        elif user.opcode == "tuple" or user.opcode in COLLECTIVES or "AsyncCollective" in user.attributes:
            continue  # carried through
        elif user.opcode != "dynamic-update-slice" or position != 0:
            return whole
    return min(taken, whole)


def _users(scope: dict[str, Instruction], name: str) -> Iterable[tuple[Instruction, int]]:
    """The instructions that use a value, looking through bitcasts, and as which operand."""
    for instruction in scope.values():
        for position, operand in enumerate(instruction.operands):
            if operand == name and instruction.opcode == "bitcast":
                yield from _users(scope, instruction.name)
            elif operand == name:
                yield instruction, position


def _written_bytes(scope: dict[str, Instruction], fusion: Instruction) -> float | int:
    root = next(i for i in scope.values() if i.is_root)
    results = [scope[name] for name in root.operands] if root.opcode == "tuple" else [root]
    if len(results) != len(fusion.buffers):
        return float(sum(b.hbm_bytes for b in fusion.buffers)) if root.opcode != "custom-call" else 0.0
    written = 0.0
    for result, buffer in zip(results, fusion.buffers, strict=True):
        while result.opcode == "bitcast":
            result = scope[result.operands[0]]
        if result.opcode == "dynamic-update-slice" and not buffer.memory_space:
            written += sum(b.num_bytes for b in scope[result.operands[1]].buffers)
        elif result.opcode not in ("parameter", *COLLECTIVES) and "AsyncCollective" not in result.attributes:
            written += buffer.hbm_bytes
    return written
