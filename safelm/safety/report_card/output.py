"""Writes the files of a card or a difference atomically, locally or in a bucket."""

import json
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

from safelm.jobs.output import OutputFolder
from safelm.safety.report_card import charts, difference, page


def write_card(out: OutputFolder, card: Mapping[str, Any]) -> None:
    """Writes card.json, card.html, card.png and card.md and prints the Markdown table."""
    text = page.markdown(card)
    with out.staging() as folder:
        charts.draw_png(pathlib.Path(folder, "card.png"), card)
        _publish(out, folder, {"card.html": page.write(card), "card.md": text + "\n", "card.json": _json(card)})
        out.publish(f"{folder}/card.png", "card.png")
    print(f"{text}\n\nToken: {card['definitions']['token']}. Intervals: 95%, by documents.")
    for one in card["inputs"]:
        if one["malformed_rows"] or one["unusable_scores"]:
            malformed = f"{one['malformed_rows']:,} of {one['rows']:,} rows are malformed and not counted"
            print(f"{one['slice']}: {malformed}; {one['unusable_scores']:,} scores are unusable", file=sys.stderr)


def write_difference(out: OutputFolder, found: Mapping[str, Any]) -> None:
    """Writes diff.json, diff.html and diff.md and prints the Markdown tables."""
    text = difference.markdown(found)
    with out.staging() as folder:
        page_text = difference.write_page(found)
        _publish(out, folder, {"diff.html": page_text, "diff.md": text + "\n", "diff.json": _json(found)})
    print(text)


def _publish(out: OutputFolder, folder: str, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        pathlib.Path(folder, name).write_text(text, encoding="utf-8", errors="backslashreplace")
        out.publish(f"{folder}/{name}", name)


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"
