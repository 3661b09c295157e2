"""An n-gram model as a scorer, and as one file of weights: the bundled one, or one that `train_classifier` made.

ngrams.safetensors   weights, predictions on held-out labelled texts; in its header levels, sources, measures and
                     the sha256 of the rest
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors import numpy as safetensors

from safelm.io import remote
from safelm.safety.ngrams.levels import LEVELS, Levels
from safelm.safety.ngrams.model import NgramModel
from safelm.safety.scorer import BUNDLED, HeldOut, Verdict

FILE = "ngrams.safetensors"
_FORMAT = "safelm-ngrams"
_VERSION = 1
_FOLDER = pathlib.Path(__file__).parent / "weights"


class NgramScorer:
    """Scores texts by an n-gram model.

    A verdict's details: `unsafe_probability` and `unsafe_probability_3`, the probabilities of a score of at least 1 and
    at least 3 under the prior of web pages, and `harm_value`, the model's own unbounded value.

    Attributes:
      thresholds: by level, 1 and 3, the probability from which on a text has that score or more.
      measured: how good it is on texts that it was not trained on, as its training found; JSON-able.
      held_out: labelled texts it was not trained on, and what it says of them.
    """

    one_value = True

    def __init__(
        self,
        name: str,
        model: NgramModel,
        levels: Levels,
        *,
        fingerprint: str,
        measured: Mapping[str, Any],
        held_out: HeldOut | None = None,
    ):
        self.name, self.fingerprint, self.measured, self.held_out = name, fingerprint, measured, held_out
        self._model, self._levels = model, levels

    @property
    def thresholds(self) -> Mapping[int, float]:
        return self._levels.thresholds

    def with_thresholds(self, thresholds: Mapping[int, float]) -> "NgramScorer":
        """The same with other thresholds for some levels."""
        levels = dataclasses.replace(self._levels, thresholds={**self.thresholds, **thresholds})
        changed = "".join(f"+{level}:{value!r}" for level, value in sorted(thresholds.items()))
        return NgramScorer(
            self.name,
            self._model,
            levels,
            fingerprint=self.fingerprint + changed,
            measured=self.measured,
            held_out=self.held_out,
        )

    def score(self, texts: Sequence[str]) -> list[Verdict]:
        """One verdict a text, in order."""
        value_N = self._model.values(texts)
        columns = {
            "unsafe_probability": self._levels.probability(1, value_N).tolist(),
            "unsafe_probability_3": self._levels.probability(3, value_N).tolist(),
            "harm_value": value_N.tolist(),
        }
        details = (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))
        return [Verdict(s, "", d) for s, d in zip(self._levels.scores(value_N).tolist(), details, strict=True)]


def is_ngrams(folder: str) -> bool:
    """Whether a folder, local or behind a URL, holds an n-gram model."""
    return remote.exists(f"{folder.rstrip('/')}/{FILE}")


def load_bundled() -> NgramScorer:
    """The scorer that comes with the package. Raises ValueError if its file is missing or damaged."""
    path = _FOLDER / FILE
    remedy = "the installed package is damaged: install safelm again, or name another scorer by --scorers"
    try:
        return _read(path.read_bytes(), BUNDLED, str(path), remedy)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or type(error).__name__}; {remedy}") from None


def load(folder: str) -> NgramScorer:
    """The n-gram model in a folder. Raises OSError if it can't be read, ValueError if it is damaged."""
    path = f"{folder.rstrip('/')}/{FILE}"
    return _read(remote.read_bytes(path), "classifier", path, "train it again, or copy it anew")


def _read(data: bytes, name: str, where: str, remedy: str) -> NgramScorer:
    try:
        tensors, record = safetensors.load(data), _record(data)
        sha256 = record.pop("sha256")
        if (record["format"], record["version"], sha256) != (_FORMAT, _VERSION, digest(tensors, record)):
            raise ValueError("of another format, or changed")
        measured = record["measured"]
        levels = Levels.from_json(record["levels"])
        model = NgramModel(tensors["weights"], record["scale"], record["bias"])
        held_out = HeldOut(
            tuple(record["sources"]),
            tensors["held_out_source"],
            tensors["held_out_score"],
            {level: levels.probability(level, tensors["held_out_value"].astype(np.float64)) for level in LEVELS},
        )
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{where}: damaged ({type(error).__name__}); {remedy}") from None
    fingerprint = hashlib.sha256(data).hexdigest()
    return NgramScorer(name, model, levels, fingerprint=fingerprint, measured=measured, held_out=held_out)


def _record(data: bytes) -> dict[str, Any]:
    size = int.from_bytes(data[:8], "little")
    return json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["record"])


def digest(tensors: Mapping[str, np.ndarray], record: Mapping[str, Any]) -> str:
    """The sha256 of the tensors' bytes, by name, and of the record."""
    parts = [tensors[name].tobytes() for name in sorted(tensors)]
    return hashlib.sha256(b"".join([*parts, json.dumps(record, sort_keys=True).encode()])).hexdigest()


def packed(tensors: Mapping[str, np.ndarray], record: Mapping[str, Any]) -> bytes:
    """The content of a model's file."""
    whole = {"format": _FORMAT, "version": _VERSION, **record}
    text = json.dumps(whole | {"sha256": digest(tensors, whole)})
    return safetensors.save(dict(tensors), {"record": text})  # the order of several keys would vary
