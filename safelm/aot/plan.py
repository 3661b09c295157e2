"""Finds the mesh, remat policy and gradient accumulation that make a config's step fit a slice and run fastest.

Compiling takes minutes, so all combinations are first estimated from shapes:

    memory   `safelm.train.plan.memory_estimate`; what needs more than 1.25 times a chip's HBM is dropped
    compute  model FLOPs / peak, times 4/3 with remat full, and with dots once more the attention's forward
    network  FSDP brings P parameters together twice a micro-batch (forward, backward) and scatters their gradients
             once, 2 bytes each; data parallel reduces P / fsdp gradients every micro-batch, over slices through the
             data centre's network; tensor reduces a micro-batch's activations [tokens, D] six times a layer
    time     max(compute, network) + a tenth of the smaller one, only to rank by

The best are then compiled one by one, until the requested number is reached or no other's compute time alone beats the
best so far. Of those that fit, the shortest step wins, by the compiler's cycle counts if the chip's clock is known and
by the roofline otherwise.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from safelm.aot import program as aot_program
from safelm.aot import report as aot_report
from safelm.aot import table as aot_table
from safelm.aot import topology as aot_topology
from safelm.aot.collectives import Network
from safelm.aot.topology import GIB, Slice
from safelm.models import sharding
from safelm.models.decoder import ModelConfig
from safelm.train import metrics as train_metrics
from safelm.train import plan as train_plan
from safelm.train import program as train_program

MEMORY_MARGIN = 1.25  # of an estimate that may still be wrong by so much
REMATS = ("none", "dots", "full")


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to run the step, with its estimated bytes per chip and seconds."""

    data: int
    fsdp: int
    tensor: int
    remat: str
    grad_accum_steps: int
    memory: int
    compute: float | int
    network: float | int

    @property
    def seconds(self) -> float | int:
        return max(self.compute, self.network) + 0.1 * min(self.compute, self.network)

    def flags(self) -> str:
        """Its flags for `safelm.train` and `safelm.aot`."""
        mesh = f"--config.mesh.data={self.data} --config.mesh.fsdp={self.fsdp} --config.mesh.tensor={self.tensor}"
        return f"{mesh} --config.model.remat={self.remat} --config.grad_accum_steps={self.grad_accum_steps}"

    def applied(self, config: ConfigDict) -> ConfigDict:
        """The config with this candidate's settings."""
        config = config.copy_and_resolve_references().unlock()
        config.mesh.update(data=self.data, fsdp=self.fsdp, tensor=self.tensor)
        config.model.remat = self.remat
        config.grad_accum_steps = self.grad_accum_steps
        return config.lock()


def candidates(config: ConfigDict, model_config: ModelConfig, tpu: Slice) -> list[Candidate]:
    """All combinations that divide evenly, fastest first by estimate; some may not fit."""
    devices = aot_topology.devices(tpu)
    optimizer = train_program.configured_optimizer(config.optimizer, model_config)
    peak = tpu.num_chips * train_metrics.peak_flops(devices[0].device_kind)
    found = []
    for data, fsdp, tensor in _meshes(model_config, tpu):
        mesh = sharding.make_mesh({"data": data, "fsdp": fsdp, "tensor": tensor}, devices)
        rates = _rates(mesh, tpu)
        for steps in _accumulations(config.batch_size, data * fsdp):
            for remat in REMATS:
                settled = dataclasses.replace(model_config, remat=remat, attention=_kernel(model_config))
                memory = train_plan.memory_estimate(
                    settled,
                    mesh.shape,
                    config.batch_size,
                    steps,
                    config.seq_len,
                    vocab_chunks=config.loss.vocab_chunks,
                    optimizer=optimizer,
                ).total
                compute = _flops(settled, config) / peak
                network = _network_seconds(settled, config, mesh.shape, steps, rates)
                found.append(Candidate(data, fsdp, tensor, remat, steps, memory, compute, network))
    return sorted(found, key=lambda c: (c.seconds, c.memory))


def _kernel(model_config: ModelConfig) -> str:
    return "splash" if model_config.attention == "auto" else model_config.attention


def _meshes(c: ModelConfig, tpu: Slice) -> Iterator[tuple[int, int, int]]:
    in_slice = tpu.num_chips // tpu.num_slices
    for tensor in (1, 2, 4, 8):
        if any(size % tensor for size in (c.num_heads, c.num_kv_heads, c.d_ff, c.padded_vocab_size, in_slice)):
            continue
        for fsdp in range(1, in_slice // tensor + 1):
            if (in_slice // tensor) % fsdp == 0 and c.d_model % fsdp == 0:
                yield tpu.num_chips // (fsdp * tensor), fsdp, tensor


def _accumulations(batch_size: int, shards: int) -> list[int]:
    """The numbers of micro-batches that give every chip the same number of rows, at least one."""
    rows = batch_size // shards
    return [steps for steps in range(1, rows + 1) if rows % steps == 0] if batch_size % shards == 0 else []


def _flops(c: ModelConfig, config: ConfigDict) -> float | int:
    per_token = c.flops_per_token(config.seq_len)
    attention = 4 * c.num_layers * c.num_heads * c.head_dim * config.seq_len  # forward
    repeated = {"none": 0.0, "dots": attention, "full": per_token / 3}[c.remat]
    return config.batch_size * config.seq_len * (per_token + repeated)


def _rates(mesh: Any, tpu: Slice) -> dict[str, float | int]:
    """Bytes/s along each axis of a mesh; data over several slices is as fast as the network between them."""
    network = Network(tpu, list(mesh.devices.flat))
    ids = np.arange(mesh.size).reshape(mesh.devices.shape)
    groups = {"data": ids[:, 0, 0].tolist(), "fsdp": ids[0, :, 0].tolist(), "tensor": ids[0, 0, :].tolist()}
    rates = {axis: network.ici_rate(group) for axis, group in groups.items()}
    return rates | ({"data": tpu.chip.dcn_rate} if tpu.num_slices > 1 else {})


def _network_seconds(
    c: ModelConfig, config: ConfigDict, mesh_shape: Mapping[str, int], steps: int, rates: Mapping[str, float | int]
) -> float | int:
    data, fsdp, tensor = (mesh_shape[axis] for axis in sharding.MESH_AXES)
    param_bytes = dataclasses.replace(c, param_dtype=c.dtype).param_bytes / tensor  # gathered in `dtype`
    tokens = config.batch_size * config.seq_len / (data * fsdp)
    gathers = 3 * steps * param_bytes * (fsdp - 1) / fsdp / rates["fsdp"]
    trained_bytes = param_bytes * c.num_trained_params / c.num_params
    reduces = steps * 2 * trained_bytes / fsdp * (data - 1) / data / rates["data"]
    activations = 6 * c.num_layers * 2 * tokens * c.d_model * 2 * (tensor - 1) / tensor / rates["tensor"]
    return gathers + reduces + activations


def plan(config: ConfigDict, model_config: ModelConfig, tpu: Slice, *, max_compiles: int) -> dict[str, Any]:
    """Compiles and prints the most promising candidates.

    Returns the best one's report with a list of all that were tried.

    Raises ValueError if nothing divides over the slice, or nothing is to be compiled.
    """
    if max_compiles < 1:
        raise ValueError(f"--max_compiles={max_compiles}: must be at least 1")
    every = candidates(config, model_config, tpu)
    if not every:
        raise ValueError(
            f"batch_size {config.batch_size} and model.d_model {model_config.d_model} divide over no mesh of "
            f"{tpu.num_chips} chips"
        )
    promising = [c for c in every if c.memory <= MEMORY_MARGIN * tpu.chip.hbm_bytes]
    limit = f"{MEMORY_MARGIN * tpu.chip.hbm_bytes / GIB:.1f} GiB"
    print(f"candidates   {len(every)}, {len(promising)} with an estimate below {limit} a chip", flush=True)
    tried: list[tuple[Candidate, dict[str, Any]]] = []
    for candidate in promising or every[-1:]:
        fitting = [_duration(found) for _, found in tried if found["fits"]]
        if len(tried) >= max_compiles or candidate.compute >= min(fitting, default=math.inf):
            break
        settled = candidate.applied(config)
        settled_model = dataclasses.replace(model_config, remat=candidate.remat)
        compiled = aot_program.compile_step(settled, settled_model, tpu)
        found = aot_report.report(settled, settled_model, tpu, compiled)
        tried.append((candidate, found))
        print(_line(candidate, found), flush=True)
    best, found = min(tried, key=lambda pair: (not pair[1]["fits"], _duration(pair[1])))
    print("\n".join(aot_table.lines(found)))
    print(f"flags        {best.flags()}" if found["fits"] else "flags        none: nothing that was compiled fits")
    return found | {
        "flags": best.flags() if found["fits"] else None,
        "plan": {
            "compiled": [_summary(candidate) | _outcome(result) for candidate, result in tried],
            "estimated": [_summary(candidate) for candidate in every],
        },
    }


def _duration(found: Mapping[str, Any]) -> float | int:
    return (found["time"]["by_compiler_cycles"] or found["time"]["step"]) if "time" in found else math.inf


def _summary(candidate: Candidate) -> dict[str, Any]:
    return dataclasses.asdict(candidate) | {"seconds": candidate.seconds}


def _outcome(found: Mapping[str, Any]) -> dict[str, Any]:
    return {"fits": found["fits"], "compiled_memory": found["memory"], "time": found.get("time")}


def _line(candidate: Candidate, found: Mapping[str, Any]) -> str:
    memory = found["memory"].get("peak", found["memory"].get("needed"))
    spelled = f"{memory / GIB:5.2f} GiB" if memory else "too much"
    duration = f"{_duration(found):.3f} s" if "time" in found else "refused"
    guessed = f"estimated {candidate.memory / GIB:.2f} GiB, {candidate.seconds:.3f} s"
    return f"compiled     {spelled}, {duration} ({guessed}): {candidate.flags()}"
