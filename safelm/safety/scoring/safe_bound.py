"""Thresholds by what they mean: at most a given share of safe pages is flagged, on the user's own safe pages.

Split conformal prediction (Vovk et al. 2005): of n safe pages the threshold of a level lets those k pages through to
"flagged" that have the highest probabilities, k + 1 <= share * (n + 1). A further safe page of the same kind is then
flagged with a probability of at most (k + 1) / (n + 1); over samples the flagged share has the distribution
Beta(k + 1, n - k), whose 95% quantile is stated too. Several scorers get an equal part of the share each, since the
largest score counts; and the two levels of a scorer share it where they may flag different pages.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from safelm import documents
from safelm.io.progress import Bar
from safelm.safety.scorer import LEVELS, HeldOut, ThresholdScorer, Verdict
from safelm.safety.scoring.scorers import ScorerSpec, load_scorers
from safelm.safety.scoring.shard import batches, no_quotations

CONFIDENCE = 0.95
SECOND_SHARE = 0.2  # a fifth of the web pages that are harmful at 1 are so at 3 (4.6% and 21.5%)
_DETAIL = {1: "unsafe_probability", 3: "unsafe_probability_3"}


@dataclasses.dataclass(frozen=True)
class SafeBound:
    """What was asked: the largest shares of safe pages that may get 1 or more, 3 or more, and the pages.

    `share_3` None: `SECOND_SHARE` of `share_1`, or as few as the sample allows.
    """

    share_1: float
    share_3: float | None
    sample: str

    def shares(self, pages: int, scorers: int, *, one_value: bool) -> dict[int, float]:
        """One scorer's shares by level. Raises ValueError, with the pages needed, where `pages` are too few for them.

        Args:
          scorers: how many share what was asked.
          one_value: whether both of its probabilities rise with one value, so that what gets 3 is among what gets 1.
        """
        share_1 = self.share_1 / scorers
        share_3 = max(SECOND_SHARE * share_1, min(1 / (pages + 1), share_1))
        if self.share_3 is not None:
            share_3 = self.share_3 / scorers
        if not one_value:
            share_3 = min(share_3, share_1 / 2)
            share_1 -= share_3
        for level, share in ((1, share_1), (3, share_3)):
            if pages < (needed := pages_needed(share)):
                raise ValueError(
                    f"--safe_sample={self.sample}: {pages} pages with text; for a scorer to flag at most {share:g} of "
                    f"safe pages at {level} at least {needed} are needed"
                )
        return {1: share_1, 3: share_3}


def from_flags(max_flagged_safe: str | None, safe_sample: str | None) -> SafeBound | None:
    """What the two flags ask for, None without them. Raises ValueError for one alone, or a share that is none."""
    if max_flagged_safe is None and safe_sample is None:
        return None
    if max_flagged_safe is None or safe_sample is None:
        missing = "--max_flagged_safe" if max_flagged_safe is None else "--safe_sample"
        raise ValueError(f"{missing} is missing: --max_flagged_safe and --safe_sample go together")
    try:
        shares = [float(part) for part in max_flagged_safe.split(",")]
    except ValueError:
        shares = []
    if not 1 <= len(shares) <= 2 or not all(0 < share < 1 for share in shares) or shares != sorted(shares)[::-1]:
        raise ValueError(
            f"--max_flagged_safe={max_flagged_safe}: want a share between 0 and 1, or two with a comma, of scores from "
            "1 and, no larger, from 3"
        )
    return SafeBound(shares[0], shares[1] if len(shares) > 1 else None, safe_sample)


def set_thresholds(
    bound: SafeBound, specs: Sequence[ScorerSpec], scorers: Sequence[Any], text_column: str
) -> tuple[tuple[ScorerSpec, ...], list[Any], dict[str, Any]]:
    """The scorers with thresholds that keep the bound, and a report of the bound and of what it costs in recall.

    Raises ValueError for a scorer without thresholds or a sample that is too small; what reading it raises.
    """
    for spec, scorer in zip(specs, scorers, strict=True):
        if not isinstance(scorer, ThresholdScorer):
            raise ValueError(
                f"--max_flagged_safe: scorer {spec.spec} takes no thresholds: bundled, classifier and hf with labels "
                "that exclude each other do"
            )
    files = documents.find(bound.sample)
    texts = [text for file in files for text in _texts(file.path, text_column)]
    new_specs, report = [], {}
    for spec, scorer in zip(specs, scorers, strict=True):
        shares = bound.shares(len(texts), len(scorers), one_value=scorer.one_value)
        probability = _probabilities(scorer, texts)
        chosen, report[scorer.name] = {}, {}
        for level, share in shares.items():
            chosen[level], facts = conformal_threshold(probability[level], share)
            report[scorer.name][f">={level}"] = facts | {
                "threshold_before": scorer.thresholds[level],
                "recall": recall(scorer.held_out, level, scorer.thresholds[level], chosen[level]),
            }
        new_specs.append(dataclasses.replace(spec, spec=_with_options(spec.spec, chosen)))
    facts = {
        "max_flagged_safe": [bound.share_1, bound.share_3],
        "safe_sample": [documents.without_place(documents.describe(file)) for file in files],
        "pages": len(texts),
        "confidence": CONFIDENCE,
        "scorers": report,
    }
    return tuple(new_specs), load_scorers(new_specs), facts


def pages_needed(share: float) -> int:
    """How large a safe sample must be for a bound of this share."""
    return math.ceil(1 / share - 1e-9) - 1


def conformal_threshold(
    probability_n: Float[np.ndarray, " n"], share: float, confidence: float = CONFIDENCE
) -> tuple[float, dict[str, Any]]:
    """The lowest threshold that keeps the bound, and the bound: expected, and at this confidence."""
    import scipy.stats

    pages = len(probability_n)
    above = math.floor(share * (pages + 1) + 1e-9) - 1
    threshold = float(np.nextafter(np.sort(probability_n)[::-1][above], np.inf))
    return threshold, {
        "share": share,
        "threshold": threshold,
        "flagged": int((probability_n >= threshold).sum()),
        "expected_at_most": (above + 1) / (pages + 1),
        "with_confidence_at_most": float(scipy.stats.beta.ppf(confidence, above + 1, pages - above)),
    }


def recall(held_out: HeldOut | None, level: int, before: float | None, after: float) -> dict[str, list[float]] | None:
    """For each labelled set the share of its harmful texts found before and after; None if either is not known."""
    if held_out is None or before is None:
        return None
    found = {}
    for number, source in enumerate(held_out.sources):
        own = (held_out.source_N == number) & (held_out.score_N >= level)
        if own.any():
            found[source] = [round(float((held_out.probability[level][own] >= t).mean()), 4) for t in (before, after)]
    return found


def describe(facts: Mapping[str, Any]) -> list[str]:
    """The report in lines, for the log."""
    lines = []
    for name, levels in facts["scorers"].items():
        for level, found in levels.items():
            costs = list((found["recall"] or {}).values())
            lines.append(
                f"{name} {level}: threshold {found['threshold']:.4g} (before {_shown(found['threshold_before'])}) "
                f"flags {found['flagged']} of {facts['pages']} safe pages; of further ones at most "
                f"{found['expected_at_most']:.2%} are expected, {found['with_confidence_at_most']:.2%} with "
                f"{facts['confidence']:.0%} confidence"
            )
            if costs:
                before, after = np.mean(costs, axis=0)
                lines.append(f"{name} {level}: mean recall on held-out sets {before:.3f} -> {after:.3f}")
    return lines


def _shown(threshold: float | None) -> str:
    return "none" if threshold is None else f"{threshold:.4g}"


def _texts(path: str, text_column: str) -> list[str]:
    rows = documents.read_rows(path, [text_column], text_column=text_column)
    return [row[text_column] for _, row in rows if row[text_column].strip()]


def _probabilities(scorer: Any, texts: Sequence[str]) -> dict[int, Float[np.ndarray, " n"]]:
    found: dict[int, list[float]] = {level: [] for level in LEVELS}
    with Bar(total=len(texts), desc=f"safe pages, {scorer.name}", unit=" pages", disable=None) as bar:
        for batch in batches((text, None) for text in texts):
            chosen = [text for text, _ in batch]
            with no_quotations(f"scorer {scorer.name}", chosen):
                verdicts = scorer.score(chosen)
            for level in LEVELS:
                found[level] += [_probability(verdict, level) for verdict in verdicts]
            bar.update(len(batch))
    return {level: np.asarray(values) for level, values in found.items()}


def _probability(verdict: Verdict, level: int) -> float:
    """Of a page without a score 1, as if it was flagged: a threshold may not rely on it."""
    return 1.0 if verdict.score is None else float(verdict.details[_DETAIL[level]])


def _with_options(spec: str, thresholds: Mapping[int, float]) -> str:
    """A spec with these thresholds in its options, in place of those it has."""
    place, _, query = spec.partition("?")
    kept = [part for part in query.split("&") if part and not part.startswith("threshold_")]
    return f"{place}?" + "&".join([*kept, *(f"threshold_{level}={value!r}" for level, value in thresholds.items())])
