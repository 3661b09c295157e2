"""The findings about a compiled step as a dict for JSON; `safelm.aot.table` prints them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from safelm.aot import collectives as aot_collectives
from safelm.aot import cost as aot_cost
from safelm.aot import hlo as aot_hlo
from safelm.aot import topology as aot_topology
from safelm.aot import work as aot_work
from safelm.aot.program import Compiled
from safelm.aot.table import advice
from safelm.models.decoder import ModelConfig
from safelm.train import metrics as train_metrics
from safelm.train.config_fields import get_field

SETTINGS = ("mesh.data", "mesh.fsdp", "mesh.tensor", "grad_accum_steps", "model.remat", "loss.vocab_chunks")


def report(
    config: ConfigDict, model_config: ModelConfig, tpu: aot_topology.Slice, compiled: Compiled
) -> dict[str, Any]:
    """Everything known about a compiled step: bytes, FLOPs and seconds of one update on one chip."""
    peak = train_metrics.peak_flops(compiled.mesh.devices.flat[0].device_kind)
    tokens = config.batch_size * config.seq_len
    model_flops = tokens * model_config.flops_per_token(config.seq_len)
    found: dict[str, Any] = {
        "topology": tpu.name,
        "slices": tpu.num_slices,
        "chips": tpu.num_chips,
        "settings": settings(config, compiled.mesh.shape),
        "tokens_per_step": tokens,
        "parameters": model_config.num_params,
        "compile_seconds": round(compiled.seconds, 1),
        "roofline": {
            "peak_flops": peak,
            "hbm_bytes_per_second": tpu.chip.hbm_rate,
            "ici_link_bytes_per_second": tpu.chip.link_rate,
            "dcn_bytes_per_second": tpu.chip.dcn_rate,
        },
        "model_flops_per_chip": model_flops / tpu.num_chips,
        "attention": {"kernel": compiled.attention.kernel, "reason": compiled.attention.reason},
        "memory": _memory(compiled, tpu),
    }
    found["fits"] = compiled.memory is not None and compiled.memory.peak <= tpu.chip.hbm_bytes
    if compiled.text:
        found |= _from_program(config, model_config, tpu, compiled, peak)
        found["mfu"] = model_flops / (tpu.num_chips * peak * found["time"]["step"])
    found["advice"] = advice(found)
    return found


def settings(config: ConfigDict, mesh_shape: Mapping[str, int]) -> dict[str, Any]:
    """The fields of `config` that decide memory and speed, with the mesh as it was made."""
    values = {name: get_field(config, name) for name in SETTINGS}
    values |= {f"mesh.{axis}": size for axis, size in mesh_shape.items()} | {"batch_size": config.batch_size}
    return values | {"compiler_options": list(config.compiler_options)}


def _memory(compiled: Compiled, tpu: aot_topology.Slice) -> dict[str, Any]:
    if compiled.memory is None:
        return {"available": tpu.chip.hbm_bytes, "needed": compiled.needed}
    return {"available": tpu.chip.hbm_bytes, "peak": compiled.memory.peak} | dataclasses.asdict(compiled.memory)


def _from_program(
    config: ConfigDict, model_config: ModelConfig, tpu: aot_topology.Slice, compiled: Compiled, peak: float
) -> dict[str, Any]:
    module = aot_hlo.parse(compiled.text)
    network = aot_collectives.Network(tpu, list(compiled.mesh.devices.flat))
    collectives = aot_collectives.find(module, network, tpu)
    cost = aot_cost.estimate(module, collectives, tpu.chip, peak)
    return {
        "flops": {
            "of_matrix_products": cost.flops,
            "in_attention_kernels": cost.kernel_flops,
            "xla_cost_analysis_loops_once": compiled.counted_flops,
        },
        "hbm_bytes": cost.hbm_bytes,
        "collectives": aot_collectives.totals(collectives),
        "largest_collectives": aot_collectives.largest(collectives, 12),
        "attention": {
            "kernel": compiled.attention.kernel,
            "reason": compiled.attention.reason,
            "kernels_in_program": aot_work.attention_kernels(module),
            "score_buffers": score_buffers(module, config, model_config, compiled.mesh.shape),
        },
        "time": {
            "step": cost.seconds,
            "nothing_overlapping": cost.serial_seconds,
            "by_compiler_cycles": cost.cycle_seconds,
            "compute": cost.compute_seconds,
            "hbm": cost.hbm_seconds,
            "collectives": cost.collective_seconds,
            "collectives_not_hidden": cost.exposed_seconds,
        },
    }


def score_buffers(
    module: aot_hlo.Module, config: ConfigDict, model_config: ModelConfig, mesh_shape: Mapping[str, int]
) -> list[str]:
    """The arrays of all attention scores of a layer, [rows, heads, T, T] in any order, that the program keeps."""
    rows = config.batch_size // config.grad_accum_steps // (mesh_shape["data"] * mesh_shape["fsdp"])
    heads, length = model_config.num_heads // mesh_shape["tensor"], config.seq_len
    found = set()
    for _, _, instruction in module.work():
        for buffer in instruction.buffers:
            others = [size for size in buffer.dims if size != length]
            squares = len(buffer.dims) - len(others)
            if squares >= 2 and buffer.num_elements in (rows * heads * length**2, heads * length**2):
                found.add(f"{buffer.dtype}[{','.join(map(str, buffer.dims))}]")
    return sorted(found)
