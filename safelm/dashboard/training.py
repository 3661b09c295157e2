"""Curves of training runs, from `metrics.jsonl` and `config.json`, thinned so that every peak stays."""

import collections
import math
import pathlib
from collections.abc import Sequence

from safelm.dashboard.measures import Curves
from safelm.io import records

POINTS = 400  # of a curve at most
_LEFT_OUT = ("tokens_learned",)


def read_curves(path: pathlib.Path, name: str) -> Curves:
    """The curves of a run's `metrics.jsonl`. Raises ValueError, naming the file, if it has no steps."""
    text = path.read_bytes().decode("utf-8", "replace")
    lines = records.parse_lines(text, str(path), "remove that line, or move the file away")
    values: dict[str, list[tuple[int, float]]] = collections.defaultdict(list)
    for line in lines:
        step = line.get("step")
        if not isinstance(step, int):
            raise ValueError(f"{path}: a line without a step, so no metrics of safelm.train")
        for key, value in line.items():
            is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if key != "step" and key not in _LEFT_OUT and is_number:
                values[key].append((step, float(value)))
    if not values:
        raise ValueError(f"{path}: holds no metrics")
    thinned = {key: thin(sorted(points)) for key, points in values.items()}
    return Curves(name, str(path), _tokens_per_step(path.with_name("config.json")), thinned)


def thin(points: Sequence[tuple[int, float]], most: int = POINTS) -> list[tuple[int, float]]:
    """At most about `most` of the points: the lowest and highest of each stretch, the first and the last."""
    if len(points) <= most:
        return list(points)
    kept = {0, len(points) - 1}
    stretches = max(1, most // 2 - 1)
    for number in range(stretches):
        places = range(number * len(points) // stretches, (number + 1) * len(points) // stretches)
        kept |= {choose(places, key=lambda place: points[place][1]) for choose in (min, max)}
    return [points[place] for place in sorted(kept)]


def _tokens_per_step(path: pathlib.Path) -> int | None:
    if not path.is_file():
        return None
    config = records.read(path, "restore it, or leave the run out")
    sizes = config.get("batch_size"), config.get("seq_len")
    return math.prod(sizes) if all(isinstance(size, int) and size > 0 for size in sizes) else None
