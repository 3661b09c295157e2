"""What a gate is: it looks at drafts and says of each whether it may pass, and why not."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from safelm.safety.synthesis.kinds import Draft


@dataclasses.dataclass(frozen=True)
class Finding:
    """A gate's word on one draft.

    Attributes:
      reason: why not, a short code such as "score_above_1" that a funnel can count; "" if it passed. Holds no text.
      values: what was measured, e.g. {"similarity": .61, "score_after": 0}.
    """

    gate: str
    passed: bool
    reason: str = ""
    values: Mapping[str, float | int | str] = dataclasses.field(default_factory=dict)


Bounds = tuple[float | int | None, float | int | None]  # the least and the most that passes; None: no limit


@runtime_checkable
class Gate(Protocol):
    """Checks drafts.

    Attributes:
      name: for funnels and columns.
      fingerprint: sha256 (hex) over everything that findings depend on.
      worth_another: whether another style may cure a failure (else the source is dropped at once).
    """

    name: str
    fingerprint: str
    worth_another: bool

    def check(self, drafts: Sequence[Draft]) -> list[Finding]:
        """One finding a draft, in order."""
        ...
