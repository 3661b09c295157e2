"""Compiles a decoding step for a TPU slice without a TPU, and compares the bytes it must read with those it moves.

A step of any method reads the weights and the cache once; these bytes divided by the memory's bandwidth are a lower
bound of its time. The compiled program's byte count and roofline show how close it comes.

SmolLM2-1.7B, one greedy prompt with 1,024 positions of cache, bfloat16, on a v5e chip: the lower bound is 3.376 GiB and
the count 3.219 (0.95x, since it misses some prefetches), 4.2 to 4.4 ms a step, 237 tokens/s at best.
"""

import functools
import math
import time
from typing import Any

import jax
from jaxtyping import PyTree

from safelm.aot import collectives as aot_collectives
from safelm.aot import cost as aot_cost
from safelm.aot import hlo as aot_hlo
from safelm.aot import topology as aot_topology
from safelm.inference import methods, placement, programs
from safelm.inference.weights import prepare
from safelm.models import decoder as model
from safelm.models import sharding
from safelm.models.config import ModelConfig
from safelm.train import metrics as train_metrics


def decode_report(
    config: ModelConfig,
    tpu: aot_topology.Slice,
    method: methods.Method,
    *,
    num_prompts: int,
    cache_len: int,
    weights: str = "bfloat16",
) -> dict[str, Any]:
    """The bytes and seconds of a decoding step over `num_prompts` prompts with `cache_len` cached positions each.

    Bytes are those of one chip; `floor_bytes` counts the weights (an embedding table only if it is also the output
    kernel) and the whole cache, each read once. The "tensor" axis splits the weights over the slice's chips.

    Raises ValueError for a slice that doesn't divide the model, or where libtpu is not installed.
    """
    mesh = sharding.make_mesh({"tensor": tpu.num_chips}, aot_topology.devices(tpu))
    shape = programs.step_shape(method, "tpu")
    state, cache, prepared = jax.eval_shape(
        lambda params: (
            *programs.empty_state(config, shape, num_prompts=num_prompts, max_len=cache_len, harm_tag_id=0),
            prepare(config, params, weights),
        ),
        model.abstract_params(config),
    )
    prepared = _on(prepared, placement.shardings(config, prepared, mesh))
    by_heads = jax.sharding.NamedSharding(mesh, sharding.partition_spec(placement.CACHE_AXES))
    cache = _on(cache, jax.tree.map(lambda _: by_heads, cache))
    state = _on(state, jax.tree.map(lambda _: sharding.replicated(mesh), state))
    step = jax.jit(functools.partial(shape.step, config), donate_argnums=(1, 2))
    start = time.monotonic()
    with jax.set_mesh(mesh):
        compiled = step.lower(prepared, state, cache).compile()
    stats = compiled.memory_analysis()
    module = aot_hlo.parse(compiled.as_text())
    network = aot_collectives.Network(tpu, list(mesh.devices.flat))
    peak = train_metrics.peak_flops(mesh.devices.flat[0].device_kind)
    cost = aot_cost.estimate(module, aot_collectives.find(module, network, tpu), tpu.chip, peak)
    floor = {"weights": _bytes(prepared.replace(embedding=None)), "cache": _bytes(cache)}
    floor_bytes = sum(floor.values())
    return {
        "topology": tpu.name,
        "method": repr(method),
        "weights": weights,
        "num_prompts": num_prompts,
        "cache_len": cache_len,
        "floor_bytes": floor_bytes,
        "floor_of": floor,
        "hbm_bytes": int(cost.hbm_bytes),
        "times_floor": cost.hbm_bytes / floor_bytes,
        "floor_seconds": floor_bytes / tpu.chip.hbm_rate,
        "seconds": cost.seconds,
        "cycle_seconds": cost.cycle_seconds,
        "tokens_per_second": num_prompts / cost.seconds,
        "peak_bytes": stats.argument_size_in_bytes + stats.temp_size_in_bytes,
        "fits": stats.argument_size_in_bytes + stats.temp_size_in_bytes <= tpu.chip.hbm_bytes,
        "compile_seconds": time.monotonic() - start,
    }


def _on(tree: PyTree, shardings: PyTree) -> PyTree:
    """The abstract arrays, placed on the mesh."""
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), tree, shardings
    )


def _bytes(tree: PyTree) -> int:
    """Bytes of one chip's share of the arrays."""
    leaves = jax.tree.leaves(tree)
    return sum(leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves)


def lines(found: dict[str, Any]) -> list[str]:
    """The report as lines for the terminal."""
    return [
        f"{found['method']}, {found['num_prompts']} prompts, cache of {found['cache_len']}, {found['weights']} weights "
        f"on {found['topology']}: one step of decoding",
        f"floor   {found['floor_bytes'] / 2**30:8.3f} GiB read per chip, {1e3 * found['floor_seconds']:.2f} ms "
        f"(weights {found['floor_of']['weights'] / 2**30:.3f}, cache {found['floor_of']['cache'] / 2**30:.3f})",
        f"program {found['hbm_bytes'] / 2**30:8.3f} GiB moved per chip, {found['times_floor']:.2f}x the floor; "
        f"{1e3 * found['seconds']:.2f} ms at best, {found['tokens_per_second']:.0f} tokens/s",
        f"memory  {found['peak_bytes'] / 2**30:8.3f} GiB per chip",
    ]
