"""Large products in bfloat16 on a CPU: the C++ kernels against XLA and PyTorch, in GFLOP/s, in one run.

    python scripts/bench/products.py --threads=2

The products are those of a layer of SmolLM2-135M in training, forward and backward, and of its unembedding. Sides take
turns, a round each; a ratio is of the medians within a round, and the table gives the median over rounds with the
lowest and highest. XLA's product in float32 stands beside. PyTorch takes part where it is installed.
"""

import argparse
import importlib.util
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

from safelm import cli

# name -> rows, summed, columns, whether the left and the right matrix stand transposed
PRODUCTS = {
    "gate or up": (576, 1536, False, False),
    "down": (1536, 576, False, False),
    "gradient of down's input": (576, 1536, False, True),
    "key or value": (576, 192, False, False),
    "logits of 8,192 ids": (576, 8192, False, True),
}


def sides(rows: int, summed: int, columns: int, transposes: tuple[bool, bool]) -> dict[str, Callable[[], Any]]:
    """A call for each side that does the product once and waits for it."""
    import jax
    import jax.numpy as jnp

    from safelm.models import cpu_kernels

    if refusal := cpu_kernels.matmul_refusal():
        raise SystemExit(f"the kernels can't run: {refusal}")
    keys = jax.random.split(jax.random.key(0))
    shapes = [
        shape[::-1] if turned else shape
        for shape, turned in zip(((rows, summed), (summed, columns)), transposes, strict=True)
    ]
    left, right = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))
    turned_left, turned_right = transposes
    over = (((0 if turned_left else 1,), (1 if turned_right else 0,)), ((), ()))
    ours = jax.jit(
        lambda x, y: cpu_kernels.matmul(
            x, y, transpose_left=turned_left, transpose_right=turned_right, dtype=jnp.bfloat16
        )
    )
    xla = jax.jit(lambda x, y: jax.lax.dot_general(x, y, over))
    half = [array.astype(jnp.bfloat16) for array in (left, right)]
    calls = {
        "ours": lambda: jax.block_until_ready(ours(*half)),
        "xla": lambda: jax.block_until_ready(xla(*half)),
        "xla, float32": lambda: jax.block_until_ready(xla(left, right)),
    }
    if importlib.util.find_spec("torch"):
        import numpy as np
        import torch

        x, y = (torch.tensor(np.asarray(array)).to(torch.bfloat16) for array in (left, right))
        x, y = (array.T if turned else array for array, turned in ((x, turned_left), (y, turned_right)))
        calls["pytorch"] = lambda: x @ y
    return calls


def race(name: str, tokens: int, args: argparse.Namespace) -> None:
    """Prints a row: GFLOP/s of every side and the ratios."""
    summed, columns, *transposes = PRODUCTS[name]
    calls = sides(tokens, summed, columns, tuple(transposes))
    rounds: dict[str, list[float]] = {side: [] for side in calls}
    for number in range(args.rounds + 1):
        for side, call in calls.items():
            seconds = []
            for _ in range(args.calls):
                began = time.perf_counter()
                call()
                seconds.append(time.perf_counter() - began)
            if number:  # the first warms up
                rounds[side].append(statistics.median(seconds))
    flops = 2 * tokens * summed * columns
    row: dict[str, Any] = {"product": name, "tokens": tokens, "summed": summed, "columns": columns}
    for side, found in rounds.items():
        row[f"{side} GFLOP/s"] = round(flops / statistics.median(found) / 1e9)
        ratios = [theirs / mine for theirs, mine in zip(found, rounds["ours"], strict=True)]
        row[f"{side} / ours, seconds"] = [round(r, 2) for r in (statistics.median(ratios), min(ratios), max(ratios))]
    print(json.dumps(row | {"load": [round(value, 1) for value in os.getloadavg()]}), flush=True)


def main() -> None:
    parser = cli.parser("scripts.bench.products", __doc__)
    parser.add_argument("--tokens", default="2048", help="of a batch, several with commas (default 2048)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--calls", type=int, default=9, help="of a side in a round")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="cores for every side")
    args = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])  # before JAX counts the cores
    for tokens in map(int, args.tokens.split(",")):
        for name in PRODUCTS:
            race(name, tokens, args)


if __name__ == "__main__":
    main()
