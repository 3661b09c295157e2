"""The ladder's design before it is run: what so many seeds and prompts could tell, from a pilot's variances.

For every ordering of the study, every stage and every headline measure (of toxicity each judge's) the pilot's
differences give the variance between seeds, between prompts and the rest (`safelm.stats.power`); from them follows the
least true difference that a two-sided test finds in 80% of studies when all orderings of a stage are corrected by Holm:
at alpha / (their number), as for the first to be told. Beside it stands the same at the upper 80% bound of the variance
between seeds, since a pilot has few. The test is the report's own (`safelm.stats.crossed`).
"""

import pathlib
from collections.abc import Sequence

from ml_collections import ConfigDict

from safelm.ladder.estimates import ALPHA, differences, pairs
from safelm.ladder.jobs import read_done
from safelm.ladder.plan import TOXICITY, Job, chosen_models, plan_jobs, study_of
from safelm.ladder.report import HARMFUL, collect
from safelm.ladder.toxicity import report as toxicity_report
from safelm.report import table
from safelm.stats.crossed import components
from safelm.stats.power import POWER, detectable


def plan(config: ConfigDict, output: pathlib.Path, seeds: Sequence[int], prompts: int) -> str:
    """The design as Markdown, from the pilot in `output`.

    Args:
      seeds: numbers of seeds to plan with.
      prompts: harmful prompts to plan with; 0: as many as the pilot has.

    Raises ValueError if the pilot has no ordering with two seeds, or a number can't be planned with.
    """
    if wrong := [count for count in seeds if count < 2]:
        raise ValueError(f"--planned_seeds={wrong[0]}: want 2 or more, a single seed has no spread")
    if prompts and prompts < 2:
        raise ValueError(f"--planned_prompts={prompts}: want 2 or more")
    study = study_of(config)
    if not study.orderings:
        raise ValueError(f"--plan: the study {config.get('study')!r} has no orderings whose differences one could plan")
    found = collect(config, output)
    measures = toxicity_report.HEADLINES if study is TOXICITY else (HARMFUL,)
    rows = []
    for stage, measure in ((stage, measure) for stage in study.stages for measure in measures):
        tested = pairs(found, study.orderings, stage, measure, least_seeds=2)
        for (lower, higher, _), (first, second) in tested.items():
            difference_SP = differences(first, second)
            parts, count = components(difference_SP), prompts or difference_SP.shape[1]
            cells = []
            for number in seeds:
                usual, careful = (
                    detectable(each, number, count, ALPHA / len(tested)) for each in (parts, parts.upper())
                )
                cells.append(f"{100 * usual:.1f} ({100 * careful:.1f})")
            sizes = f"{len(difference_SP)} x {difference_SP.shape[1]}"
            seen = f"{100 * difference_SP.mean():+.1f}"
            spread = [f"{100 * part**0.5:.1f}" for part in (parts.seeds, parts.prompts, parts.rest)]
            where = stage if len(measures) == 1 else f"{stage}, {measure}"
            rows.append((f"{lower} < {higher}", where, sizes, seen, *spread, *cells))
    if not rows:
        raise ValueError(f"--output={output}: no two models of an ordering are measured with two common seeds yet")
    heads = ("ordering", "stage", "pilot", "seen", "sd seeds", "sd prompts", "sd rest")
    parts_text = [table.markdown((*heads, *(f"{number} seeds" for number in seeds)), rows), _note(prompts)]
    return "\n\n".join(
        [*parts_text, table.markdown(("seeds", "runs", "hours of a worker"), _costs(config, output, seeds))]
    )


def _note(prompts: int) -> str:
    size = f"{prompts} harmful prompts" if prompts else "as many prompts as the pilot"
    return (
        f"Points of harmful completions that {POWER:.0%} of studies with {size} would tell (alpha {ALPHA}, Holm); in "
        "brackets at the upper 80% bound of the variance between seeds. *Seen*: the pilot's difference, in points."
    )


def _costs(config: ConfigDict, output: pathlib.Path, seeds: Sequence[int]) -> list[tuple[object, ...]]:
    """(seeds, jobs, hours) by the pilot's mean seconds of a job of each stage and method."""
    models = chosen_models(config.models)
    seconds: dict[tuple[str, str], list[float]] = {}
    for job in plan_jobs(models, config.seeds, config.methods, study_of(config)):
        if (done := read_done(output, job)) is not None:
            seconds.setdefault((job.stage, job.method), []).append(done["seconds"])
    mean = {kind: sum(values) / len(values) for kind, values in seconds.items()}

    def cost(job: Job) -> float:
        return mean.get((job.stage, job.method), 0.0)

    jobs = {number: plan_jobs(models, range(number), config.methods, study_of(config)) for number in seeds}
    return [(number, len(own), f"{sum(map(cost, own)) / 3600:.1f}") for number, own in jobs.items()]
