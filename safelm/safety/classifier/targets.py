"""What a head is trained towards: soft scores, kinds of harm where they are known, and how much each text counts."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from safelm.safety.classifier.balance import Balance
from safelm.safety.classifier.examples import Example
from safelm.safety.classifier.harm_kinds import KINDS
from safelm.safety.classifier.metrics import CLASSES


@dataclasses.dataclass(frozen=True)
class Targets:
    """Labels of N texts.

    Attributes:
      scores_N: harm scores. votes_NC: probabilities of the six scores.
      kinds_NK: probability of each kind of `names`; NaN where it is unknown.
      weights_N: of each text in the loss, of mean 1, before lambda.
    """

    scores_N: Int[np.ndarray, " N"]
    votes_NC: Float[np.ndarray, "N 6"]
    kinds_NK: Float[np.ndarray, "N K"]
    weights_N: Float[np.ndarray, " N"]
    names: tuple[str, ...] = ()

    @classmethod
    def of_scores(cls, scores_N: Int[np.ndarray, " N"]) -> "Targets":
        """Whole scores and nothing else."""
        scores_N = np.asarray(scores_N)
        count = len(scores_N)
        return cls(scores_N, np.eye(CLASSES)[scores_N], np.zeros((count, 0)), np.ones(count))

    @classmethod
    def of(
        cls, texts: Sequence[Example], balance: Balance | None = None, names: Sequence[str] | None = None
    ) -> "Targets":
        """The labels of examples.

        Args:
          names: the kinds; when not given those of which some text is known to be and some known not to be.
        """
        known_NK = np.asarray([[example.kinds.get(kind, np.nan) for kind in KINDS] for example in texts], np.float64)
        known_NK = known_NK.reshape(len(texts), len(KINDS))
        if names is None:
            names = [k for i, k in enumerate(KINDS) if (known_NK[:, i] >= 0.5).any() and (known_NK[:, i] < 0.5).any()]
        return cls(
            np.asarray([example.score for example in texts], np.int64),
            np.asarray([example.distribution for example in texts], np.float64).reshape(len(texts), CLASSES),
            known_NK[:, [KINDS.index(name) for name in names]],
            (balance or Balance()).weights(texts),
            tuple(names),
        )

    def take(self, rows: np.ndarray) -> "Targets":
        """Those of some texts, by index or mask."""
        parts = {f.name: getattr(self, f.name)[rows] for f in dataclasses.fields(self) if f.name != "names"}
        return Targets(**parts, names=self.names)

    def __len__(self) -> int:
        return len(self.scores_N)
