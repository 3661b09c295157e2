"""What a mixture and a bucket cost in feeding: batches/s of one source, six sources, and six behind gs:// when warm.

    python scripts/bench/feed.py                       # rows of 2048 tokens, 24M tokens in all
    python scripts/bench/feed.py --loader --rounds=9   # through the loader, which reads ahead in two threads

All variants make batches of one shape of the same number of random tokens, and every array is summed, so that nothing
stays unread. In every round each makes `--batches` of them, in changing order; a ratio is a round's, by the clock and
by processor time, which other work on the machine disturbs less.

    1 source               one store with all tokens
    1 source, a sixth      one with a sixth of them: what is read lies closer together in memory, which a mixture of
                           six such stores can't have
    6 sources              six stores in the three phases of `scripts/bench/data.py`
    6 sources, gs://       the same from a bucket of a server on loopback, after one pass over the files: they are in
                           the local cache by then (extra `dev`)
"""

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from safelm import cli

ROOT = Path(__file__).resolve().parents[2]
ONE, SIXTH, SIX, REMOTE = "1 source", "1 source, a sixth", "6 sources", "6 sources, gs://"
# over -> of: ratios of speed
RATIOS = [(SIX, ONE), (SIX, SIXTH), (SIXTH, ONE), (REMOTE, SIX)]


def main() -> None:
    parser = cli.parser("scripts.bench.feed", __doc__)
    parser.add_argument("--tokens", type=int, default=24_000_000, help="of a variant (default %(default)s)")
    parser.add_argument("--seq_len", type=int, default=2048, help="tokens a row (default %(default)s)")
    parser.add_argument("--batch_tokens", type=int, default=131_072, help="tokens a batch (default %(default)s)")
    parser.add_argument("--batches", type=int, default=100, help="of a variant in a round (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="(default %(default)s)")
    parser.add_argument("--loader", action="store_true", help="through the loader instead of `Batches`")
    parser.add_argument("--without_remote", action="store_true", help="no bucket on loopback")
    args = parser.parse_args()
    for name in ("tokens", "seq_len", "batch_tokens", "batches", "rounds"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}={getattr(args, name)}: must be at least 1")
    with tempfile.TemporaryDirectory() as root, contextlib.ExitStack() as stack:
        os.environ["SAFELM_CACHE"] = f"{root}/cache"
        report(measure(variants(Path(root), stack, args), args), args)


def variants(root: Path, stack: contextlib.ExitStack, args: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """By name, what makes and reads one batch."""
    from data import PHASES, RATES

    from safelm.data.schedule import Phase
    from safelm.data.store import TokenStore

    whole = write_store(root / "whole", args.tokens, 99)
    stores = {name: write_store(root / "six" / name, args.tokens // 6, seed) for seed, name in enumerate(RATES)}
    one, sixth = [Phase(0.0, {"whole": 1.0})], [Phase(0.0, {"raw": 1.0})]
    sides = {ONE: ({"whole": whole}, one), SIXTH: (stores, sixth), SIX: (stores, PHASES)}
    if not args.without_remote:
        sys.path.append(str(ROOT / "tests/helpers"))
        import gcs_server

        stack.enter_context(gcs_server.clients_at(stack.enter_context(gcs_server.emulator())))
        url = f"gs://{gcs_server.BUCKET}/six"
        gcs_server.upload(root / "six", url)
        remote = {name: TokenStore.open(f"{url}/{name}") for name in RATES}
        for store in remote.values():
            store.verify_checksums()
        sides[REMOTE] = (remote, PHASES)
    return {name: reader(stack, *side, args) for name, side in sides.items()}


def write_store(folder: Path, num_tokens: int, seed: int):
    """A store of one shard with web-like document lengths (median 450 tokens, a long tail)."""
    from safelm.data.store import Manifest, ShardWriter, TokenStore, write_manifest

    rng = np.random.default_rng(seed)
    lengths_n = np.clip(rng.lognormal(np.log(450), 1.1, num_tokens // 300), 20, 20_000).astype(np.int64) + 1
    lengths_n = lengths_n[: int(np.searchsorted(np.cumsum(lengths_n), num_tokens)) + 1]
    tokens = rng.integers(4, 49_152, lengths_n.sum(), dtype=np.uint16)
    tokens[np.cumsum(lengths_n) - 1] = 0
    with ShardWriter(folder, 0, 1, np.uint16, harm_tag_id=3) as writer:
        writer.add_many(tokens, lengths_n)
        info = writer.close()
    counts = (info.num_documents, info.num_tokens, info.num_tag_tokens)
    write_manifest(folder, Manifest("bench", "train", "v", 49_152, 0, 3, "uint16", (info,), *counts))
    return TokenStore.open(folder)


def reader(stack: contextlib.ExitStack, stores, phases, args: argparse.Namespace) -> Callable[[], object]:
    """Reads one batch of the last phase after another, from the middle of it on."""
    from data import touch

    from safelm.data.batches import Batches
    from safelm.data.loader import Loader
    from safelm.data.schedule import MixtureSchedule

    steps, rows = 100_000, args.batch_tokens // args.seq_len
    batches = Batches(stores, MixtureSchedule(phases, batch_size=rows, seq_len=args.seq_len, total_steps=steps))
    start = steps * 7 // 10
    if args.loader:
        loader = Loader(batches, seed=0, start_step=start)
        stack.callback(loader.close)
        return lambda: touch(next(loader))
    numbers: Iterator[int] = iter(range(start, steps))
    return lambda: touch(batches.batch(0, next(numbers), 0, rows))


def measure(sides: dict[str, Callable[[], object]], args: argparse.Namespace) -> dict[str, list[tuple[float, float]]]:
    """Seconds of each side's batches in each round, by the clock and of processors."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for turn in range(args.rounds + 1):
        names = list(sides)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            began, processor = time.perf_counter(), time.process_time()
            for _ in range(args.batches):
                sides[name]()
            found[name].append((time.perf_counter() - began, time.process_time() - processor))
    return {name: values[1:] for name, values in found.items()}  # the first round fills caches


def report(found: dict[str, list[tuple[float, float]]], args: argparse.Namespace) -> None:
    """Prints rates, then ratios."""
    way = "through the loader" if args.loader else "in one thread"
    print(f"{args.tokens:,} tokens, rows of {args.seq_len}, {way}, load {os.getloadavg()[0]:.1f}")
    for name, values in found.items():
        rates = [args.batches * args.batch_tokens / statistics.median(each[kind] for each in values) for kind in (0, 1)]
        print(f"{name:20s} {rates[0] / 1e6:7.1f}M tokens/s, {rates[1] / 1e6:7.1f}M a second of a processor")
    for over, of in RATIOS:
        if over in found:
            pairs = list(zip(found[over], found[of], strict=True))
            ratios = [sorted(base[kind] / own[kind] for own, base in pairs) for kind in (0, 1)]
            spread = [f"{statistics.median(each):.2f} [{each[0]:.2f}, {each[-1]:.2f}]" for each in ratios]
            print(f"{over} / {of}: {spread[0]} by the clock, {spread[1]} by processor time")
    print(json.dumps({name: [[round(v, 4) for v in each] for each in values] for name, values in found.items()}))


if __name__ == "__main__":
    main()
