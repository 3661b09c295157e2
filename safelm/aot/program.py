"""Compiles a run's real training step for a TPU slice that need not exist."""

import dataclasses
import re
import time

import jax
from ml_collections import ConfigDict

from safelm.aot import topology as aot_topology
from safelm.models import attention_kernels, sharding
from safelm.models.decoder import ModelConfig
from safelm.train import compiler
from safelm.train import program as train_program
from safelm.train import step as train_step


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of HBM on one chip. Aliased memory counts once, since the new state replaces the old one."""

    arguments: int
    outputs: int
    temporaries: int
    aliased: int

    @property
    def peak(self) -> int:
        return self.arguments + self.outputs + self.temporaries - self.aliased


@dataclasses.dataclass(frozen=True)
class Compiled:
    """The result of compiling a step.

    Attributes:
      text: the optimised program of one device.
      memory: None if XLA refused the program because it needs more than a chip has.
      needed: the bytes it would then need.
      counted_flops: FLOPs by XLA's cost analysis, which counts a loop's body once.
    """

    mesh: jax.sharding.Mesh
    attention: attention_kernels.Choice
    seconds: float
    text: str = ""
    memory: Memory | None = None
    needed: int | None = None
    counted_flops: float = 0.0


def compile_step(config: ConfigDict, model_config: ModelConfig, tpu: aot_topology.Slice) -> Compiled:
    """Compiles the step of a resolved config whose `mesh` has the slice's size.

    Raises ValueError for a mesh, batch, model or attention kernel that doesn't fit the slice's devices, and for
    compiler options that the TPU's compiler refuses.
    """
    mesh = sharding.make_mesh(config.mesh.to_dict(), aot_topology.devices(tpu))
    program, attention = train_program.make_program(config, model_config, mesh)
    batch = train_step.abstract_batch(program, config.batch_size, config.seq_len)
    start = time.monotonic()
    with jax.set_mesh(mesh):
        lowered = program.step.lower(program.abstract_state, batch, train_step.abstract_controls(mesh))
    try:
        compiled = compiler.compile_with(lowered, config.compiler_options, mesh.devices.flat[0].platform)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Compiled(mesh, attention, time.monotonic() - start, needed=needed_bytes(str(error)))
    stats = compiled.memory_analysis()
    memory = Memory(
        stats.argument_size_in_bytes, stats.output_size_in_bytes, stats.temp_size_in_bytes, stats.alias_size_in_bytes
    )
    flops = (compiled.cost_analysis() or {}).get("flops", 0.0)
    return Compiled(
        mesh, attention, time.monotonic() - start, compiled.as_text(), memory, counted_flops=max(flops, 0.0)
    )


def needed_bytes(message: str) -> int | None:
    """The memory that a program would need, from XLA's refusal; None if the message doesn't say."""
    units = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    patterns = (r"\(([\d.]+)([KMGT]?)\) exceeds available", r"Used ([\d.]+)([KMGT]?) of", r"allocate ([\d.]+)([KMGT]?)")
    for pattern in patterns:
        if match := re.search(pattern, message):
            return round(float(match[1]) * units[match[2]])
    return None
