"""Writes the report's files to OUTPUT/report/, each atomically."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from safelm.jobs import beam_runner
from safelm.jobs.output import OutputFolder
from safelm.safety.synthesis.report import cards, charts, page, summary

FOLDER = "report"
PAIRS_NAME = "review_pairs.jsonl"


def write(
    out: OutputFolder,
    manifest: Mapping[str, Any],
    source_counts: Sequence[str],
    runner: beam_runner.Runner,
    pairs: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Writes report.json, report.html, report.png, report.md and both report cards; returns the report.

    Args:
      source_counts: the counts of `cards.SourceCounter` in each shard.
      pairs: pairs of source and text for `safelm.safety.synthesis.review`; their file is the only one with text.
    """
    paths = list(dict.fromkeys(one["path"] for one in manifest["input"]))
    before = cards.sources_card(source_counts, paths)
    after = cards.published_card(out, list(manifest["files"]), runner)
    report = summary.summarize(manifest, before, after, cards.compare(before, after), len(pairs))
    files = {
        "card_sources.json": _json(before),
        "report.json": _json(report),
        "report.html": page.write(report),
        "report.md": page.markdown(report) + "\n",
    }
    if after is not None:
        files["card_published.json"] = _json(after)
    if pairs:
        files[PAIRS_NAME] = "".join(json.dumps(pair) + "\n" for pair in pairs)
    with out.staging() as folder:
        charts.draw_png(pathlib.Path(folder, "report.png"), report)
        out.publish(f"{folder}/report.png", f"{FOLDER}/report.png")
        for name, text in files.items():
            pathlib.Path(folder, name).write_text(text, encoding="utf-8", errors="backslashreplace")
            out.publish(f"{folder}/{name}", f"{FOLDER}/{name}")
    return report


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"
