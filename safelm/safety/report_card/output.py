"""A card's or a difference's files; each appears whole or not at all."""

import json
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

from safelm.evaluation.report import write_whole
from safelm.safety.report_card import charts, difference, page


def write_card(folder: pathlib.Path, card: Mapping[str, Any]) -> None:
    """Writes card.json, card.html, card.png and card.md into `folder` and prints the Markdown table."""
    text = page.markdown(card)
    _write(folder / "card.png", lambda path: charts.draw_png(path, card))
    _write(folder / "card.html", lambda path: path.write_text(page.write(card), encoding="utf-8"))
    _write(folder / "card.json", lambda path: path.write_text(_json(card), encoding="utf-8"))
    _write(folder / "card.md", lambda path: path.write_text(text + "\n", encoding="utf-8"))
    print(f"{text}\n\nToken: {card['definitions']['token']}. Intervals: 95%, by documents.")
    for one in card["inputs"]:
        if one["malformed_rows"] or one["unusable_scores"]:
            unusable = f"{one['malformed_rows']:,} of {one['rows']:,} rows are malformed and not counted, "
            print(f"{one['slice']}: {unusable}{one['unusable_scores']:,} scores are unusable", file=sys.stderr)


def write_difference(folder: pathlib.Path, found: Mapping[str, Any]) -> None:
    """Writes diff.json, diff.html and diff.md into `folder` and prints the Markdown tables."""
    text = difference.markdown(found)
    _write(folder / "diff.html", lambda path: path.write_text(difference.write_page(found), encoding="utf-8"))
    _write(folder / "diff.json", lambda path: path.write_text(_json(found), encoding="utf-8"))
    _write(folder / "diff.md", lambda path: path.write_text(text + "\n", encoding="utf-8"))
    print(text)


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def _write(path: pathlib.Path, write: Callable[[pathlib.Path], Any]) -> None:
    write_whole(path, write)
