"""The report as JSON: a manifest and two report cards, with rates and intervals; ids and counts, no text."""

from collections.abc import Mapping, Sequence
from typing import Any

from safelm.safety.synthesis.kinds import NOTE_KINDS
from safelm.safety.synthesis.report import cost
from safelm.safety.synthesis.report.funnel import HISTOGRAMS
from safelm.stats.intervals import rate
from safelm.tags import MAX_SCORE, MIN_SCORE

SCHEMA = "safelm.synthesis.report/1"
_REASON = "reason:"
_Facts = Mapping[str, Any]


def summarize(
    manifest: _Facts, before: _Facts, after: _Facts | None, difference: _Facts | None, review_pairs: int = 0
) -> dict[str, Any]:
    """The report.

    Args:
      manifest: as `safelm.synthesize` writes it.
      before, after, difference: report cards of sources and published texts (see `cards`); None if nothing is
        published.
    """
    funnel, totals, settings = manifest["funnel"], manifest["totals"], manifest["settings"]
    rejected = {name: count for name, count in funnel["outcomes"].items() if name != "passed" and count}
    return {
        "schema": SCHEMA,
        "kind": settings["kind"],
        "model": manifest["model"],
        "prompt_version": settings["prompts"],
        "settings": {name: settings[name] for name in ("scores", "seed", "attempts", "max_new_tokens")},
        unit_of(settings["kind"]): {
            **({"documents": totals["documents"]} if settings["kind"] in NOTE_KINDS else {}),
            "in": totals["rows"],
            "published": totals["published"],
            "near_duplicates": totals["near_duplicates"],
            "rejected": totals["rejected"],
            "malformed": totals["malformed"],
            "left_out_by_score": totals["left_out"],
            "publication_rate": _rate(totals["published"], totals["rows"]),
            "rejected_by": dict(sorted(rejected.items(), key=lambda item: (-item[1], item[0]))),
            "attempts_needed": funnel["attempts_needed"],
        },
        "drafts": _drafts(funnel, [gate["name"] for gate in settings["gates"]]),
        "styles": _groups(funnel["styles"]),
        "categories": _groups(funnel["categories"]),
        "scores": _groups(funnel["scores"]),
        "score_before_after": {name: _matrix(funnel[name]) for name in ("matrix", "matrix_passed")},
        "distributions": _distributions(funnel, settings.get("limits", {})),
        "similarity_by": funnel["similarity_by"],
        "card": {"sources": before["slices"][0], "published": after and after["slices"][0], "difference": difference},
        "throughput": manifest["speed"],
        "spent": totals["spent"],
        "cost_per_million": cost.per_million(totals, manifest["speed"]["tokens_per_second"]),
        "review_pairs": review_pairs,
    }


def unit_of(kind: str) -> str:
    """What a kind writes, and under which name the report counts it: a document has several notes."""
    return "notes" if kind in NOTE_KINDS else "documents"


def _drafts(funnel: _Facts, order: Sequence[str]) -> dict[str, Any]:
    """From attempts to passed drafts: what each gate checked, in the gates' order, and its reasons for rejecting."""
    gates = []
    for name in order:
        counts = funnel["gates"].get(name, {})
        reasons = {key.removeprefix(_REASON): count for key, count in counts.items() if key.startswith(_REASON)}
        checked, passed = counts.get("checked", 0), counts.get("passed", 0)
        facts = {"gate": name, "checked": checked, "passed": passed, "pass_rate": _rate(passed, checked)}
        gates.append(facts | {"reasons": dict(sorted(reasons.items(), key=lambda item: (-item[1], item[0])))})
    return {
        "attempts": funnel["attempts"],
        "no_draft": funnel["no_draft"],
        "written": funnel["written"],
        "gates": gates,
        "passed": funnel["drafts_passed"],
        "pass_rate": _rate(funnel["drafts_passed"], funnel["written"]),
    }


def _groups(groups: _Facts) -> list[dict[str, Any]]:
    return [
        {"name": name, **facts, "pass_rate": _rate(facts["drafts_passed"], facts["attempts"])}
        for name, facts in sorted(groups.items())
    ]


def _matrix(counts: Mapping[str, int]) -> list[list[int]]:
    """Drafts by the source's score (rows, 0 to 5) and their own (columns, 0 to 5)."""
    scores = range(MIN_SCORE, MAX_SCORE + 1)
    return [[counts.get(f"{before}>{after}", 0) for after in scores] for before in scores]


def _distributions(funnel: _Facts, limits: _Facts) -> dict[str, Any]:
    found = {}
    for name, edges in HISTOGRAMS.items():
        nothing = [0] * (len(edges) + 1)
        drafts = funnel["histograms"].get(name, nothing)
        passed = funnel["histograms_passed"].get(name, nothing)
        low, high = limits.get(name, (None, None))
        found[name] = {"upper_edges": list(edges), "drafts": drafts, "passed": passed, "low": low, "high": high}
    return found


def _rate(count: int, total: int) -> dict[str, float | int] | None:
    """A share with Wilson's 95% interval; None for a total of 0."""
    if not total:
        return None
    estimate = rate(count, total)
    return {"share": estimate.value, "low": estimate.low, "high": estimate.high, "of": total}
