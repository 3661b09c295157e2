"""A small labelled set of abstract texts, and an n-gram model trained on it."""

import json
import pathlib

import numpy as np

SAFE = ("garden", "harbour", "lantern", "meadow", "orchard", "pebble", "quilt", "river", "saddle", "timber")
HARM = ("zorp", "vultox", "gravvim", "thrillo", "skarn")


def write_sources(folder: pathlib.Path, texts: int = 600, pages: int = 120) -> list[str]:
    """Two labelled sets and safe pages, as `--data` names them."""
    rng = np.random.default_rng(0)
    sets = {name: [_labelled(rng, score) for score in rng.choice([0, 0, 1, 3, 4, 5], texts)] for name in "ab"}
    sets["pages"] = [{"text": " ".join(rng.choice(SAFE, 8)) + f" {rng.integers(1 << 40)}"} for _ in range(pages)]
    for name, rows in sets.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return [f"harm_score:{folder}/a.jsonl", f"harm_score:{folder}/b.jsonl", f"safe:{folder}/pages.jsonl"]


def _labelled(rng: np.random.Generator, score: int) -> dict:
    words = [*rng.choice(SAFE, 12), *rng.choice(HARM, int(score))]
    return {"text": " ".join(rng.permutation(words)) + f" {rng.integers(1 << 40)}", "harm_score": int(score)}
