"""Where the time of a decoding step goes on a CPU, by XLA's own profile: milliseconds of every kind of op.

    python scripts/bench/decode_ops.py                            # SmolLM2-135M's sizes, 64 prompts at 240 tokens
    python scripts/bench/decode_ops.py --method=safe_beam --prompts=8 --weights=int8_weight_only

Weights are drawn, since their values change no time; the cache is in --dtype. Parts by themselves, and Python beside
them, are in `scripts/bench/decode_parts.py`.
"""

import argparse
import collections
import re
import statistics
import tempfile
import time
from pathlib import Path

from decode import use_threads
from train_ops import instructions

from safelm import cli

STEPS = 8  # of one call
_TARGET = re.compile(r'%?([\w.\-]+) = .*custom_call_target="([^"]+)"')


def kinds_of_ops(program: str) -> dict[str, str]:
    """What an op is called in the table, by its name: a kernel's name, or XLA's without its number."""
    found = {name: re.sub(r"(\.clone|\.\d+)+$", "", name) for name in instructions(program)}
    return found | {match[1]: match[2] for line in program.splitlines() if (match := _TARGET.search(line))}


def profile(args: argparse.Namespace) -> tuple[list[float], dict[str, float]]:
    """Milliseconds a step of five calls, and of every kind of op."""
    import jax
    import numpy as np

    from safelm.inference import Beam, Greedy, SafeBeam, asked, programs
    from safelm.inference.weights import prepare
    from safelm.models import decoder
    from safelm.models.config import ModelConfig

    sizes = {"vocab_size": 49_152, "d_model": 576, "d_ff": 1536, "num_layers": 30, "num_heads": 9, "num_kv_heads": 3}
    config = ModelConfig(**sizes, head_dim=64, max_seq_len=2048, dtype=args.dtype, tie_embeddings=True)
    weights = prepare(config, decoder.init(config, jax.random.key(0)), args.weights, products=args.products)
    method = {"greedy": Greedy(), "beam": Beam(4), "safe_beam": SafeBeam(4, 4)}[args.method]
    shape, num_prompts, tag = programs.step_shape(method), args.prompts, 7
    state, cache = programs.empty_state(
        config, shape, num_prompts=num_prompts, max_len=args.tokens + 2 * STEPS, harm_tag_id=tag
    )
    wanted = asked.ask(
        [(args.tokens, 2 * STEPS, (), method, 0)] * num_prompts,
        harm_tag_id=tag,
        max_pool=shape.num_dropped_from,
        allowed_PX=programs.all_ids(config, shape, num_prompts),
    )
    state = state.replace(asked=wanted.replace(adjustments=state.asked.adjustments))
    if shape.num_rows > 1:
        state = state.replace(score_PW=np.zeros_like(state.score_PW))
    held = jax.device_put((state, cache))
    given = np.ones(num_prompts, bool), np.bool_(False), np.int32(STEPS)

    def run() -> None:
        nonlocal held
        again = held[0].replace(step_P=np.zeros_like(held[0].step_P))  # so that the cache is never full
        held = programs.run(config, shape, weights, again, held[1], *given, num_steps=STEPS)[:2]
        jax.block_until_ready(held)

    for _ in range(2):
        run()
    found = []
    for _ in range(5):
        began = time.perf_counter()
        run()
        found.append((time.perf_counter() - began) / STEPS * 1e3)
    kinds = kinds_of_ops(programs.run.lower(config, shape, weights, *held, *given, num_steps=STEPS).compile().as_text())
    spent: dict[str, float] = collections.defaultdict(float)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        (file,) = Path(folder).glob("**/*.xplane.pb")
        events = jax.profiler.ProfileData.from_file(str(file))
        for event in (event for plane in events.planes for line in plane.lines for event in line.events):
            if event.name in kinds:
                spent[kinds[event.name]] += event.duration_ns / 1e6 / STEPS
    return found, {name: ms for name, ms in spent.items() if name not in ("while", "call", "conditional", "cond")}


def main() -> None:
    parser = cli.parser("scripts.bench.decode_ops", __doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=240, help="behind which the step is (default 240)")
    parser.add_argument("--method", choices=("greedy", "beam", "safe_beam"), default="greedy")
    parser.add_argument("--weights", default="int8")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of the model and its cache"
    )
    parser.add_argument("--products", choices=("native", "xla"), default="native")
    parser.add_argument("--most", type=int, default=15, help="kinds of ops shown (default 15)")
    args = parser.parse_args()
    use_threads(args.threads)
    found, spent = profile(args)
    print(f"{args.prompts} prompts: {statistics.median(found):.1f} ms a step [{min(found):.1f}, {max(found):.1f}]")
    for name, ms in sorted(spent.items(), key=lambda pair: -pair[1])[: args.most]:
        print(f"{ms:8.2f} ms  {name}")


if __name__ == "__main__":
    main()
