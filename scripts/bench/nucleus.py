"""Top-p at 0.9, by bisection as it is done here, against a sort in JAX and the warper of transformers.

    python scripts/bench/nucleus.py                             # 256 rows of 4,096 ids, 32 of 49,152
    python scripts/bench/nucleus.py --shapes=256x4096 --spread=2,4 --rounds=5 --threads=1

Log-probs are normal with the standard deviation --spread before softmax: with 2 a nucleus is wide, as in a small
model, with 4 it is narrow. All sides keep the same tokens, but for those within rounding of the nucleus's end. They
take turns in one process; the ratio is theirs / ours by the medians of a round, with the smallest and largest round.
"""

import statistics
import time
from collections.abc import Callable

from decode import use_threads

from safelm import cli

TOP_P = 0.9
CALLS = 5  # in a turn
OURS = "safelm"


def main() -> None:
    parser = cli.parser("scripts.bench.nucleus", __doc__)
    parser.add_argument("--shapes", default="256x4096,32x49152", help="rows x ids (default %(default)s)")
    parser.add_argument("--spread", default="2,4", help="of the logits (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    flags = parser.parse_args()
    use_threads(flags.threads)

    import numpy as np

    for shape in flags.shapes.split(","):
        rows, ids = map(int, shape.split("x"))
        for spread in map(float, flags.spread.split(",")):
            logits_PV = (spread * np.random.default_rng(0).standard_normal((rows, ids))).astype(np.float32)
            sides = {OURS: ours(logits_PV), "sorted": by_sorting(logits_PV)} | by_transformers(logits_PV, flags.threads)
            kept = {name: side() for name, side in sides.items()}
            sizes = kept[OURS].sum(1)
            for name, stays_PV in kept.items():
                if (stays_PV != kept[OURS]).sum(1).max() > 2:
                    raise ValueError(f"{name} keeps other tokens than {OURS}")
            show(f"{shape}, spread {spread:g}, {sizes.min()} to {sizes.max()} tokens stay", sides, flags.rounds)


def show(title: str, sides: dict[str, Callable], rounds: int) -> None:
    """Times the sides in turns and prints their milliseconds and ratios."""
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            times = []
            for _ in range(CALLS):
                start = time.perf_counter()
                side()
                times.append(1e3 * (time.perf_counter() - start))
            taken[name].append(statistics.median(times))
    print(title)
    for name, times in taken.items():
        ratios = [their / our for their, our in zip(times, taken[OURS], strict=True)]
        ratio = f"{statistics.median(ratios):.2f}x [{min(ratios):.2f}, {max(ratios):.2f}]" if name != OURS else ""
        print(f"  {name:13} {statistics.median(times):8.1f} ms  {ratio}")


def _settings(rows: int):
    import jax.numpy as jnp

    return {"top_k_P": jnp.zeros(rows, jnp.int32), "top_p_P": jnp.full(rows, TOP_P), "is_used_P": jnp.ones(rows, bool)}


def ours(logits_PV):
    """What sampling does; gives which tokens stay."""
    import jax
    import numpy as np

    from safelm.inference.truncation import filtered

    log_probs_PV = jax.nn.log_softmax(logits_PV)
    cut = jax.jit(lambda log_probs_PV: filtered(log_probs_PV, **_settings(len(logits_PV))))
    return lambda: np.asarray(cut(log_probs_PV)) > -np.inf


def by_sorting(logits_PV):
    """The usual way: sorted, summed up, put back."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    log_probs_PV = jax.nn.log_softmax(logits_PV)

    @jax.jit
    def cut(log_probs_PV):
        order_PV = jnp.argsort(-log_probs_PV, axis=1)
        probs_PV = jnp.exp(jnp.take_along_axis(log_probs_PV, order_PV, axis=1))
        stays_PV = jnp.cumsum(probs_PV, axis=1) - probs_PV < TOP_P
        back_PV = jnp.argsort(order_PV, axis=1)
        return jnp.where(jnp.take_along_axis(stays_PV, back_PV, axis=1), log_probs_PV, -jnp.inf)

    return lambda: np.asarray(cut(log_probs_PV)) > -np.inf


def by_transformers(logits_PV, threads: int) -> dict[str, Callable]:
    """The warper that transformers' `generate` calls; nothing where it isn't installed."""
    try:
        import torch
        from transformers import TopPLogitsWarper
    except ImportError:
        print("transformers or PyTorch is not installed: left out")
        return {}
    torch.set_num_threads(threads)
    warper, scores_PV = TopPLogitsWarper(TOP_P), torch.from_numpy(logits_PV)
    return {"transformers": lambda: (warper(None, scores_PV) > -float("inf")).numpy()}


if __name__ == "__main__":
    main()
