"""How much each source counts in training: at most so many of its texts, and weights that even out its two sides.

A source has two sides: its texts of score 0, and those above. With sides of equal weight nothing is learned from which
source a text is of, as far as that source has both; one that has only one side teaches its style with it, so keep such
sources small.
"""

import collections
import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from safelm.safety.classifier.examples import Example, text_key


@dataclasses.dataclass(frozen=True)
class Balance:
    """Which texts of a source are trained on, and with what weight.

    Attributes:
      cap: texts of each side of a source at most, chosen by the texts' hashes; None: all.
      caps: other caps, each "SCHEME:COUNT" (a scheme's name or a source's first word).
      power: a side of n texts has a total weight in proportion to n ** power: 1 leaves all texts equal, 0 gives every
        side of every source the same total.
    """

    cap: int | None = None
    caps: tuple[str, ...] = ()
    power: float = 1.0

    def __post_init__(self) -> None:
        if self.cap is not None and self.cap < 1:
            raise ValueError(f"balance.cap={self.cap}: must be at least 1")
        if not 0 <= self.power <= 1:
            raise ValueError(f"balance.power={self.power}: must be from 0 to 1")
        for entry in self.caps:
            if not entry.partition(":")[2].isdecimal():
                raise ValueError(f"balance.caps: {entry!r} is not SCHEME:COUNT")

    def chosen(self, texts: Sequence[Example]) -> list[Example]:
        """The texts within the caps, in their order."""
        caps = {name: int(count) for name, _, count in (entry.partition(":") for entry in self.caps)}
        sides: dict[tuple[str, bool], list[int]] = collections.defaultdict(list)
        for i, example in enumerate(texts):
            sides[_side(example)].append(i)
        kept: list[int] = []
        for (source, _), rows in sides.items():
            cap = caps.get(source.partition(":")[0], self.cap)
            if cap is not None and len(rows) > cap:
                rows = sorted(rows, key=lambda i: text_key(texts[i].text))[:cap]
            kept += rows
        return [texts[i] for i in sorted(kept)]

    def weights(self, texts: Sequence[Example]) -> Float[np.ndarray, " N"]:
        """The weight of each text in the loss; their mean is 1."""
        sizes = collections.Counter(map(_side, texts))
        weight_N = np.asarray([float(sizes[_side(example)]) ** (self.power - 1) for example in texts])
        return weight_N / weight_N.mean()


def _side(example: Example) -> tuple[str, bool]:
    return example.source, example.score > 0
