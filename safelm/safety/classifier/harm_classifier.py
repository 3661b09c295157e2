"""The classifier as a scorer: chunks of a text to logits, calibrated, and the maximum over the chunks."""

import copy
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int32

from safelm.safety.classifier import checkpoint, head
from safelm.safety.classifier.calibration import Calibration, expected_score, sigmoid
from safelm.safety.embedding import Backbone, Embedder
from safelm.safety.scorer import HeldOut, Verdict


class Classifier:
    """Embedder and linear 6-class head (Maini et al. 2025, 3.1 and C.1): a text is as harmful as its worst chunk.

    A verdict's details: `unsafe_probability` and `unsafe_probability_3`, the calibrated probabilities of a score of at
    least 1 and at least 3; `expected_score`, a graded 0 to 5; `n_chunks`; and, where the classifier has kinds of harm,
    the probability of each (`hate`, `violence` and so on). Each is the maximum over the text's chunks.
    The score follows from the thresholds in the checkpoint (`Calibration.scores`).
    """

    name = "classifier"
    held_out: HeldOut | None = None
    one_value = False

    def __init__(
        self,
        backbone: Backbone,
        head_params: Any,
        calibration: Calibration,
        *,
        params: Any = None,
        fingerprint: str = "",
        kinds: Sequence[str] = (),
        measured: Mapping[str, Any] | None = None,
        batch_tokens: int | None = None,
        devices: int = 0,
    ):
        self.calibration = calibration
        self.kinds = tuple(kinds)
        self.fingerprint = fingerprint
        self.measured = dict(measured or {})  # how good it is on held-out texts, as its training found; JSON-able
        self._head_params = head_params
        self._embedder = Embedder(backbone, params, batch_tokens, devices)
        self.batch_characters = self._embedder.batch_characters

    @property
    def usage(self) -> Mapping[str, int]:
        """Tokens read, positions computed and programs compiled so far."""
        return self._embedder.usage

    def logits(self, texts: Sequence[str]) -> tuple[Float[np.ndarray, "C L"], Int32[np.ndarray, " C"]]:
        """The head's logits, six scores and then kinds, for every chunk and the index of the text that each is of."""
        return self._embedder.map_chunks(texts, self._head_params, head.apply_all)

    @property
    def thresholds(self) -> Mapping[int, float]:
        """By level, 1 and 3, the probability from which on a text has that score or more."""
        return self.calibration.thresholds

    def with_thresholds(self, thresholds: Mapping[int, float]) -> "Classifier":
        """The same with other thresholds for some levels."""
        changed = copy.copy(self)
        changed.calibration = dataclasses.replace(self.calibration, thresholds={**self.thresholds, **thresholds})
        changed.fingerprint += "".join(f"+{level}:{value!r}" for level, value in sorted(thresholds.items()))
        return changed

    def score(self, texts: Sequence[str]) -> list[Verdict]:
        """One verdict a text, in order; without a score or probabilities where a chunk's logits are not finite."""
        logits_CL, text_C = self.logits(texts)
        is_finite_C = np.isfinite(logits_CL).all(axis=1)
        is_usable_N = np.bincount(text_C, ~is_finite_C, minlength=len(texts)) == 0
        logits_CL = np.where(is_finite_C[:, None], logits_CL, 0)
        columns = highest(self.calibration, logits_CL[:, : head.CLASSES], text_C, len(texts))
        for i, kind in enumerate(self.kinds, start=head.CLASSES):
            columns[kind] = maximum_by_text(sigmoid(logits_CL[:, i]), text_C, len(texts))
        chunks_N = np.bincount(text_C, minlength=len(texts))
        return [
            Verdict(
                int(columns["score"][i]) if is_usable_N[i] else None,
                details={
                    name: float(columns[name][i]) if is_usable_N[i] else math.nan for name in columns if name != "score"
                }
                | {"n_chunks": int(chunks_N[i])},
            )
            for i in range(len(texts))
        ]


def highest(
    calibration: Calibration, logits_CK: Float[np.ndarray, "C 6"], text_C: Int32[np.ndarray, " C"], texts: int
) -> dict[str, Float[np.ndarray, " N"]]:
    """Score, probabilities and expected score of each text: the highest among its chunks."""
    columns = {
        "score": calibration.scores(logits_CK).astype(np.float64),
        "unsafe_probability": calibration.probability(1, logits_CK),
        "unsafe_probability_3": calibration.probability(3, logits_CK),
        "expected_score": expected_score(logits_CK),
    }
    return {name: maximum_by_text(value_C, text_C, texts) for name, value_C in columns.items()}


def maximum_by_text(
    value_C: Float[np.ndarray, " C"], text_C: Int32[np.ndarray, " C"], texts: int
) -> Float[np.ndarray, " N"]:
    """The largest value among each text's chunks; every text has at least one."""
    highest_N = np.full(texts, -np.inf)
    np.maximum.at(highest_N, text_C, value_C)
    return highest_N


def load(
    directory: str, backbone: Backbone | str | None = None, *, batch_tokens: int | None = None, devices: int = 0
) -> Classifier:
    """The classifier in a folder made by `python -m safelm.train_classifier`, local or behind a URL.

    Args:
      backbone: already loaded, or where it lies; when not given, the one that the folder names is loaded.
      batch_tokens: tokens of a device's batch, padding included; None for the device's default.
      devices: how many local devices share a batch's rows; 0 for all.

    Raises:
      FileNotFoundError: no classifier there, or its backbone is not installed.
      ValueError: damaged, of another class count, or trained on another backbone.
    """
    found, params, head_params, calibration, config = checkpoint.read(directory, backbone)
    identity = {"fingerprint": checkpoint.fingerprint(config), "kinds": config["kinds"]}
    measured = config.get("training", {}).get("measured")
    sizes = {"batch_tokens": batch_tokens, "devices": devices}
    return Classifier(found, head_params, calibration, params=params, measured=measured, **identity, **sizes)
