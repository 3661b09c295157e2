"""Which units of a model are designated for which sources: see `safelm.models.routing`."""

import dataclasses
from collections.abc import Sequence

PLAIN, LABELLED, MIXED = range(3)


@dataclasses.dataclass(frozen=True)
class Routing:
    """What is designated, and for which sources of training; `config.routing`.

    Attributes:
      heads: of every layer, the last ones of its queries.
      mlp_units: of every layer, the last ones.
      labelled: sources whose rows train the designated units alone.
      mixed: sources whose rows train everything.
    """

    heads: int
    mlp_units: int
    labelled: Sequence[str]
    mixed: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name in ("labelled", "mixed"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("heads", "mlp_units"):
            if getattr(self, name) < 0:
                raise ValueError(f"routing.{name} is {getattr(self, name)}: it can't be negative")
        if not self.labelled or not self.heads + self.mlp_units:
            raise ValueError("routing needs labelled sources, and heads or mlp_units for them")
        if both := set(self.labelled) & set(self.mixed):
            raise ValueError(f"routing: source {min(both)} is both labelled and mixed")

    def check_sizes(self, num_heads: int, d_ff: int) -> None:
        """Raises ValueError where a model of these sizes has too few units."""
        for name, most in (("heads", num_heads), ("mlp_units", d_ff)):
            if getattr(self, name) >= most:
                raise ValueError(f"routing.{name} is {getattr(self, name)}: the model has {most}, some must be left")

    def routes(self, sources: Sequence[str]) -> tuple[int, ...]:
        """PLAIN, LABELLED or MIXED for each of a run's sources; ValueError for one of its own that isn't there."""
        if unknown := [name for name in (*self.labelled, *self.mixed) if name not in sources]:
            raise ValueError(f"routing names source {unknown[0]!r}: data.phases has {', '.join(sources)}")
        return tuple(LABELLED if s in self.labelled else MIXED if s in self.mixed else PLAIN for s in sources)
