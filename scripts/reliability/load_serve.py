"""Minutes of load on `safelm.serve` by clients with random manners: does anything fail, leak or get stuck?

    python scripts/reliability/load_serve.py --minutes=10 --clients=32

Prompts and replies are short, so that few programs are compiled; with JAX_COMPILATION_CACHE_DIR and a run before it
there are none.

Clients ask a tiny model of random weights by every method, streamed or not, as completions, chats and scores; they go
away before the first byte, in the middle of a stream or never; they send broken bodies; now and then all stop for a
moment. Every minute, and at the end when all is quiet, a line with replies by status, the open requests and slots, and
the server's memory and open files.

Exit code 0 only if no reply was other than 200, 429 or the 400 that was asked for, every whole reply was well formed,
and in the end no request, slot or promised token was left, as few files were open as at the start, memory had not
grown by over 10% since the first third, and SIGTERM ended it with code 0.

10 minutes at 32 clients, two CPU cores beside much other work (load average 25), nothing compiled before: 10,339
replies of 200 (9,000 of them in the last two minutes, when nothing was left to compile; 1,217 of them were left in
mid-stream), 9,253 of 429, 8,080 left by their clients, no fault; in the end nothing open, 9 files as at the start, code
0 at SIGTERM. Memory grew with the programs, from 762 MB after a third to 1,074 MB after nine minutes and 1,076 MB at
the end: so this run ended with code 1.
"""

import argparse
import asyncio
import collections
import json
import random
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp

from safelm import cli

sys.path.append(str(Path(__file__).parents[1] / "bench"))
from serve import model_flags, server

METHODS = ("greedy", "sample", "beam", "safe_beam", "tag_penalty")
QUIET = ("safelm_open_requests", "safelm_engine_active", "safelm_engine_waiting", "safelm_engine_tokens_reserved")
TEXT = "the cat sat on the mat, the dog did not "


class Load:
    """What the clients did and found."""

    def __init__(self, url: str):
        self.url = url
        self.counts: collections.Counter[str] = collections.Counter()
        self.faults: list[str] = []

    async def client(self, number: int, until: float) -> None:
        """One request after another, each on a new connection or an old one."""
        chance = random.Random(number)
        while time.monotonic() < until:
            keeps = chance.random() < 0.5
            async with aiohttp.ClientSession(
                self.url, connector=aiohttp.TCPConnector(force_close=not keeps), timeout=aiohttp.ClientTimeout(1200)
            ) as session:
                for _ in range(chance.randint(1, 5)):
                    try:
                        await self.request(session, chance)
                    except (aiohttp.ClientError, TimeoutError) as error:
                        self.faults.append(f"{type(error).__name__}: {error}")
            if chance.random() < 0.05:
                await asyncio.sleep(chance.random() * 2)

    async def request(self, session: aiohttp.ClientSession, chance: random.Random) -> None:
        """A random request, left at a random moment."""
        kind = chance.choices(("completion", "chat", "score", "bad"), (6, 3, 1, 1))[0]
        method, stream = chance.choice(METHODS), chance.random() < 0.6
        text = TEXT * chance.randint(0, 2)
        body: dict[str, Any] = {"max_tokens": chance.randint(1, 24), "safelm": {"method": method}, "stream": stream}
        if method in ("beam", "safe_beam"):
            body["safelm"] |= {"num_beams": 2, "want_trace": chance.random() < 0.3}
        path, body, want = {
            "completion": ("/v1/completions", body | {"prompt": text}, 200),
            "chat": ("/v1/chat/completions", body | {"messages": [{"role": "user", "content": text}]}, 200),
            "score": ("/v1/safelm/score", {"input": text}, 200),
            "bad": ("/v1/completions", {"prompt": text, "max_tokens": -chance.randint(0, 3)}, 400),
        }[kind]
        patience = chance.choice((None, None, None, chance.random() * 0.05, chance.random()))
        try:
            async with asyncio.timeout(patience), session.post(path, json=body) as response:
                self.counts[str(response.status)] += 1
                if response.status == 429 and chance.random() < 0.9:  # most do as they are told
                    await asyncio.sleep(float(response.headers["Retry-After"]) * chance.random())
                if response.status not in (want, 429):
                    self.faults.append(f"{kind} {method}: {response.status} {await response.text()}")
                elif response.status == 200:
                    if stream and chance.random() < 0.2:
                        await response.content.readany()
                        response.close()
                        self.counts["left in mid-stream"] += 1
                        return
                    self.check(await response.text(), kind, stream and kind != "score")
        except TimeoutError:
            if patience is None:
                raise
            self.counts["left"] += 1

    def check(self, text: str, kind: str, stream: bool) -> None:
        """A whole reply: its tokens' texts make its text, and it says why it ended."""
        if not stream:
            reply = json.loads(text)
            if kind == "score":
                return
            tokens, choice = reply["safelm"]["tokens"], reply["choices"][0]
            said = choice["message"]["content"] if kind == "chat" else choice["text"]
        else:
            *lines, last = text.strip().split("\n\n")
            events = [json.loads(line.removeprefix("data: ")) for line in lines]
            if last != "data: [DONE]" or any("error" in event for event in events):
                self.faults.append(f"a stream of {kind} ended badly: {text[-200:]}")
                return
            tokens = [token for event in events for token in event["safelm"].get("tokens", ())]
            choices = [event["choices"][0] for event in events]
            said = "".join(each["delta"].get("content", "") if kind == "chat" else each["text"] for each in choices)
            choice = choices[-1]
        if "".join(token["text"] for token in tokens) != said or choice["finish_reason"] not in ("stop", "length"):
            self.faults.append(f"a {kind} is malformed: {text[:300]}")


async def gauges(url: str) -> dict[str, float]:
    """The server's own figures: what must come to nothing, memory in MB, open files."""
    async with aiohttp.ClientSession(url) as session, session.get("/metrics") as response:
        text = await response.text()
    sums = {name: sum(map(float, re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text, re.M))) for name in QUIET}
    process = {
        name: float(re.search(rf"^process_{name} (\S+)$", text, re.M)[1])
        for name in ("resident_memory_bytes", "open_fds")
    }
    return sums | {"rss_mb": process["resident_memory_bytes"] / 1e6, "open_fds": process["open_fds"]}


async def quiet(url: str) -> dict[str, float]:
    """The figures once nothing is open any more, or after half a minute."""
    for _ in range(300):
        now = await gauges(url)
        if not any(now[name] for name in QUIET):
            break
        await asyncio.sleep(0.1)
    return now


async def run(url: str, flags: argparse.Namespace) -> list[str]:
    """The whole load; what went wrong."""
    start = await quiet(url)
    load, seconds = Load(url), flags.minutes * 60
    began = time.monotonic()
    clients = asyncio.gather(*(load.client(number, began + seconds) for number in range(flags.clients)))
    lines = []
    while time.monotonic() < began + seconds:
        await asyncio.sleep(min(60.0, max(0.1, began + seconds - time.monotonic())))
        lines.append({"minute": round((time.monotonic() - began) / 60, 2), **await gauges(url), **load.counts})
        print(json.dumps(lines[-1]), flush=True)
    await clients
    end = await quiet(url)
    print(json.dumps({"at the end": end, **load.counts, "faults": len(load.faults)}), flush=True)
    problems = load.faults[:20]
    problems += [f"{name} is {end[name]:g} in the end" for name in QUIET if end[name]]
    if end["open_fds"] > start["open_fds"] + 2:
        problems.append(f"{end['open_fds']:g} files are open, {start['open_fds']:g} were at the start")
    settled = lines[len(lines) // 3]["rss_mb"]
    if end["rss_mb"] > 1.1 * settled:
        problems.append(f"memory grew from {settled:.0f} MB after a third to {end['rss_mb']:.0f} MB")
    return problems


def main() -> None:
    parser = cli.parser("scripts.reliability.load_serve", __doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=32)
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        with server(
            *model_flags(tiny=True, folder=folder), "--open_requests=24", "--slots=4", "--request_seconds=1200"
        ) as (url, _):
            problems = asyncio.run(run(url, flags))
    for problem in problems:
        print(problem)
    raise SystemExit(1 if problems else 0)


if __name__ == "__main__":
    main()
