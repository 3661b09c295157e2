"""How often do two tests find a difference between rungs that isn't there, by seeds and how much they differ?

    python scripts/studies/error_rates.py

Studies are drawn in which two rungs do equal harm over all trainings. Both answer 240 prompts with each of so many
seeds; 20 of 100 pairs of answers differ, prompts differ by 17 points and trainings by so many. *Bootstrap* draws seeds
and prompts anew, 500 times; *t-test* is `safelm.stats.crossed`, which the ladder's verdicts use. Both test at 5%.
Written anew: docs/results/data/error_rates.json, and then every table and picture.
"""

import argparse

import kept_records
import numpy as np
from jaxtyping import Float

from safelm import cli
from safelm.stats import crossed
from safelm.stats.bootstrap import clustered_means
from safelm.stats.intervals import rate

PROMPTS, DRAWS, LEVEL = 240, 500, 0.05
SEEDS, SPREADS = (3, 4, 5, 8), (0.03, 0.12)
PROMPT_SPREAD, DISCORDANT = 0.17, 0.2


def null_studies(seeds: int, spread: float, count: int) -> Float[np.ndarray, "N S P"]:
    """Paired differences of two rungs that differ in nothing but chance."""
    rng = np.random.default_rng([seeds, round(1000 * spread)])
    signs = rng.choice([-1, 0, 1], p=[DISCORDANT / 2, 1 - DISCORDANT, DISCORDANT / 2], size=(count, seeds, PROMPTS))
    of_seeds, of_prompts = rng.normal(0, spread, (count, seeds, 1)), rng.normal(0, PROMPT_SPREAD, (count, 1, PROMPTS))
    return of_seeds + of_prompts + signs


def bootstrap_p_value(difference_SP: Float[np.ndarray, "S P"]) -> float:
    """Twice the share of draws beyond 0, at least one draw."""
    seeds, prompts = difference_SP.shape
    codes = [np.repeat(np.arange(seeds), prompts), np.tile(np.arange(prompts), seeds)]
    means_d = clustered_means(difference_SP.ravel(), codes, DRAWS, seed=0)
    return min(1.0, 2 * (int(min((means_d <= 0).sum(), (means_d >= 0).sum())) + 1) / (DRAWS + 1))


def main(flags: argparse.Namespace) -> None:
    rows = []
    for seeds, spread in ((seeds, spread) for spread in SPREADS for seeds in SEEDS):
        studies = null_studies(seeds, spread, flags.studies)
        found = [
            rate(sum(test(study) < LEVEL for study in studies), len(studies))
            for test in (bootstrap_p_value, crossed.p_value)
        ]
        name = f"{seeds} seeds that differ by {100 * spread:.0f} points"
        rows.append({"name": name, "values": [kept_records.percent(vars(each)) for each in found]})
    table = {
        "title": "Differences found where there are none, % of studies",
        "command": "python scripts/studies/error_rates.py",
        "machine": f"any; {flags.studies} studies a row",
        "axis": "% of studies without a difference; wanted: 5",
        "scale": "linear",
        "head": "study",
        "columns": [{"head": head, "digits": 1, "drawn": True} for head in ("bootstrap", "t-test")],
        "rows": rows,
    }
    kept_records.write({"error_rates": table})


if __name__ == "__main__":
    parser = cli.parser("scripts.studies.error_rates", __doc__)
    parser.add_argument("--studies", type=int, default=1000, help="drawn for each row (default %(default)s)")
    cli.run(main, parser)
