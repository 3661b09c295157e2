"""The protocol of gates: a gate checks drafts and says which pass, and why others don't."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from safelm.safety.synthesis.kinds import Draft


@dataclasses.dataclass(frozen=True)
class Finding:
    """A gate's result for one draft.

    Attributes:
      reason: "" if the draft passed; otherwise a short code such as "score_above_1" that a funnel can count. Contains
        no text.
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
      fingerprint: SHA-256 (hex) of everything that findings depend on.
      worth_another: whether another style may pass after a failure; if not, the source is dropped at once.
    """

    name: str
    fingerprint: str
    worth_another: bool

    def check(self, drafts: Sequence[Draft]) -> list[Finding]:
        """One finding per draft, in order."""
        ...
