"""A published sequence classifier as a scorer of harm, read from a hub or a folder; none of its code is run."""

import copy
import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Int32

from safelm.formats import huggingface
from safelm.formats.json_fields import read_json
from safelm.io import hub
from safelm.safety.embedding import Backbone, Embedder, encoder_config, load_backbone
from safelm.safety.options import check_least, make_settings
from safelm.safety.scorer import LEVELS, Verdict
from safelm.safety.sequence_classifier import heads
from safelm.safety.sequence_classifier.labels import CLASSES, LabelTable, label_names, table_for

DECISIONS = ("argmax", "expected")
MAX_LENGTH = 512  # tokens of a chunk, as in the paper
DTYPES = ("float32", "bfloat16")
_MULTI_LABEL = "multi_label_classification"


@dataclasses.dataclass(frozen=True)
class ClassifierSettings:
    """How a classifier reads a text and what its probabilities become; options of its string.

    Attributes:
      max_length: tokens read at once, special ones included; at most the model's positions.
      chunks: whether a longer text is read in chunks, of which the worst counts; else it is cut off.
      decide: "argmax", the most probable score, or "expected", the rounded mean over the scores' probabilities.
      labels: a table of labels (see `labels`); empty for none.
      multi_label: whether labels are independent although the config doesn't say so.
      dtype: of the computation, "float32" or "bfloat16".
      name: prefix of output columns.
      batch_tokens: tokens of a device's batch, padding included; 0 for the device's default. Changes speed alone.
      devices: how many local devices share a batch's rows; 0 for all.
    """

    max_length: int = MAX_LENGTH
    chunks: bool = True
    decide: str = DECISIONS[0]
    labels: str = ""
    multi_label: bool = False
    dtype: str = DTYPES[0]
    name: str = "hf"
    batch_tokens: int = 0
    devices: int = 0


class SequenceClassifier:
    """Encoder, head and table of labels.

    A text's verdict is that of its worst chunk: the one with the highest score, among those the one with the highest
    expected score (with thresholds: the highest probability of any harm). Details: `expected_score` and, for every
    score that a label stands for, `probability_<score>`; with thresholds `probability_<label>` instead; always
    `unsafe_probability` and `unsafe_probability_3` (of a score of at least 1 and 3; with thresholds the largest among
    the labels that can give it); `n_chunks` where texts are read in chunks.

    Thresholds, where they are set (`with_thresholds`), decide by the worst chunk's `unsafe_probability` and
    `unsafe_probability_3`: below that of 1 the score is 0, from that of 3 on it is the most probable of 3 to 5, else
    that of 1 and 2.

    Attributes:
      thresholds: by level, 1 and 3; None for the rule `decide`. Only where labels exclude each other.
      fingerprint: sha256 (hex) over weights, vocabulary, table and settings.
      manifest_settings: model, commit, labels, table and options.
    """

    def __init__(
        self, backbone: Backbone, head: heads.Head, head_params: Any, table: LabelTable, settings: ClassifierSettings
    ):
        self.name = settings.name
        self.table = table
        if not table.has_thresholds:
            self.held_out, self.one_value = None, False
            self.thresholds: dict[int, float | None] = dict.fromkeys(LEVELS)
        self._options = settings
        self._head_params = head_params
        self._head = head.logits  # one object, so that it is compiled once
        self._embedder = Embedder(backbone, batch_tokens=settings.batch_tokens or None, devices=settings.devices)
        self.batch_characters = self._embedder.batch_characters
        self.manifest_settings: dict[str, Any] = {
            "model_type": None,
            "id2label": dict(enumerate(table.names)),
            "labels": table.to_json(),
            "rule": "thresholds" if table.has_thresholds else settings.decide,
            "is_multi_label": table.is_multi_label,
            **{name: getattr(settings, name) for name in ("max_length", "chunks", "dtype")},
        }
        digest = hashlib.sha256(backbone.fingerprint.encode())
        digest.update(json.dumps([dataclasses.asdict(head), self.manifest_settings], sort_keys=True).encode())
        for name in sorted(head_params):
            digest.update(name.encode() + np.ascontiguousarray(head_params[name]).tobytes())
        self.fingerprint = digest.hexdigest()

    def with_thresholds(self, thresholds: Mapping[int, float]) -> "SequenceClassifier":
        """The same with other thresholds for some levels. Raises ValueError where the table of labels has its own."""
        if self.table.has_thresholds:
            raise ValueError(f"scorer {self.name}: its table of labels has thresholds: LABEL:SCORE@PROBABILITY")
        changed = copy.copy(self)
        changed.thresholds = {**self.thresholds, **thresholds}
        told = {str(level): value for level, value in changed.thresholds.items()}
        changed.manifest_settings = {**self.manifest_settings, "thresholds": told}
        changed.fingerprint += "".join(f"+{level}:{value!r}" for level, value in sorted(thresholds.items()))
        return changed

    @property
    def usage(self) -> Mapping[str, int]:
        """Tokens read, positions computed and programs compiled so far."""
        return self._embedder.usage

    def logits(self, texts: Sequence[str]) -> tuple[Float[np.ndarray, "C L"], Int32[np.ndarray, " C"]]:
        """The logits of every chunk (float32) and the index of its text."""
        return self._embedder.map_chunks(texts, self._head_params, self._head)

    def score(self, texts: Sequence[str]) -> list[Verdict]:
        """One verdict a text, in order; without a score or probabilities where the model's answer is not finite."""
        logits_CL, text_C = self.logits(texts)
        is_finite_C = np.isfinite(logits_CL).all(axis=1)
        columns = self._columns(np.where(is_finite_C[:, None], logits_CL, 0))
        graded_C = columns.get("expected_score", columns["unsafe_probability"])
        order = np.lexsort((graded_C, columns["score"], text_C))  # the worst chunk of each text comes last
        is_last = np.append(text_C[order][1:] != text_C[order][:-1], True)
        worst_N = order[is_last]
        chunks_N = np.bincount(text_C, minlength=len(texts))
        score_N = columns["score"][worst_N]
        if not self.table.has_thresholds and any(value is not None for value in self.thresholds.values()):
            score_N = self._by_thresholds(logits_CL[worst_N], score_N)
        is_usable_N = np.bincount(text_C, ~is_finite_C, minlength=len(texts)) == 0
        return [
            Verdict(
                int(score_N[i]) if is_usable_N[i] else None,
                details={
                    name: float(values[c]) if is_usable_N[i] else math.nan
                    for name, values in columns.items()
                    if name != "score"
                }
                | ({"n_chunks": int(chunks_N[i])} if self._options.chunks else {}),
            )
            for i, c in enumerate(worst_N.tolist())
        ]

    def _by_thresholds(
        self, logits_NL: Float[np.ndarray, "N L"], score_N: Int[np.ndarray, " N"]
    ) -> Int[np.ndarray, " N"]:
        """Scores by the thresholds that are set; a level without one is reached by the score it has else."""
        probability_N6 = self.table.by_score(self.table.probabilities(np.nan_to_num(logits_NL)))
        reached = {
            level: probability_N6[:, level:].sum(axis=1) >= least if least is not None else score_N >= level
            for level, least in self.thresholds.items()
        }
        low_N, high_N = 1 + probability_N6[:, 1:3].argmax(axis=1), 3 + probability_N6[:, 3:].argmax(axis=1)
        return np.where(reached[3], high_N, np.where(reached[1], low_N, 0))

    def _columns(self, logits_CL: Float[np.ndarray, "C L"]) -> dict[str, np.ndarray]:
        probability_CL = self.table.probabilities(logits_CL)
        if self.table.has_thresholds:
            any_harm, harm = (
                probability_CL[:, labels].max(axis=1) if labels else np.zeros(len(probability_CL))
                for labels in (self.table.labels_from(1), self.table.labels_from(3))
            )
            columns = {"score": self.table.reached(probability_CL)}
            named = {f"probability_{_column(name)}": probability_CL[:, i] for i, name in enumerate(self.table.names)}
        else:
            probability_C6 = self.table.by_score(probability_CL)
            any_harm, harm = probability_C6[:, 1:].sum(axis=1), probability_C6[:, 3:].sum(axis=1)
            expected_C = probability_C6 @ np.arange(CLASSES)
            is_argmax = self._options.decide == DECISIONS[0]
            columns = {
                "score": probability_C6.argmax(axis=1) if is_argmax else np.rint(expected_C).astype(np.int64),
                "expected_score": expected_C,
            }
            scores = sorted({levels[0][0] for levels in self.table.levels})
            named = {f"probability_{score}": probability_C6[:, score] for score in scores}
        return columns | {"unsafe_probability": any_harm, "unsafe_probability_3": harm} | named


def load(source: str, **options: Any) -> SequenceClassifier:
    """The classifier of a hub by name (`hf:ORG/NAME[@REVISION]`) or in a local Hugging Face folder.

    Args:
      options: fields of `ClassifierSettings`.

    Raises:
      OSError: nothing there, no safetensors, or the hub can't be asked.
      ValueError: a model type, feature, table of labels or option that isn't known; the message names it.
    """
    settings = make_settings(ClassifierSettings, options, where=f"scorer {source}", others="nothing else")
    _check(source, settings)
    pinned = hub.pinned(source)
    folder = Path(hub.folder(pinned)).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"{source}: no such folder")
    kind = heads.check_architecture(folder)
    config = encoder_config.read_config(folder)
    if settings.max_length > config.max_tokens and "max_length" in options:
        raise ValueError(f"{source}: max_length={settings.max_length}: the model has positions for {config.max_tokens}")
    settings = dataclasses.replace(settings, max_length=min(settings.max_length, config.max_tokens))
    head, head_params, count = heads.read_head(folder, config.d_model)
    table = _table(source, folder, settings, count)
    _check_columns(source, table)
    backbone = load_backbone(
        str(folder), pooling=head.pooling, max_tokens=settings.max_length, normalize=False, dtype=settings.dtype
    )
    if not settings.chunks:
        backbone = dataclasses.replace(backbone, tokenizer=backbone.tokenizer.first_only())
    scorer = SequenceClassifier(backbone, head, head_params, table, settings)
    name = hub.parse(pinned) if hub.is_name(pinned) else None
    scorer.manifest_settings |= {
        "model_type": kind,
        "repository": name and name.repository,
        "commit": name and name.revision,
    }
    return scorer


def _check(source: str, settings: ClassifierSettings) -> None:
    for name, known in (("decide", DECISIONS), ("dtype", DTYPES)):
        if getattr(settings, name) not in known:
            raise ValueError(f"scorer {source}: {name}={getattr(settings, name)!r}: one of {', '.join(known)}")
    check_least(f"scorer {source}", settings, batch_tokens=0, devices=0)
    if settings.max_length < 1:
        raise ValueError(f"scorer {source}: max_length={settings.max_length}: must be at least 1")


def _check_columns(source: str, table: LabelTable) -> None:
    """Raises ValueError where two labels would have one column."""
    label_of: dict[str, str] = {}
    for label in table.names if table.has_thresholds else ():
        if (first := label_of.setdefault(_column(label), label)) != label:
            raise ValueError(
                f"scorer {source}: labels {first!r} and {label!r} would both be the column "
                f"probability_{_column(label)}: rename one in config.json's id2label"
            )


def _table(source: str, folder: Path, settings: ClassifierSettings, count: int) -> LabelTable:
    path = folder / huggingface.CONFIG_FILE
    values = read_json(path)
    names = label_names(str(path), values.get("id2label"), count)
    problem = values.get("problem_type")
    if problem == "regression" or (count == 1 and not settings.multi_label and problem != _MULTI_LABEL):
        raise ValueError(
            f"{path}: problem_type = {problem!r} with {count} label(s) is a regression, whose values are no "
            "probabilities; ?multi_label=true reads a single logit as one label's"
        )
    is_multi_label = settings.multi_label or problem == _MULTI_LABEL
    published = hub.parse(source).repository if hub.is_name(source) else ""
    return table_for(
        names, settings.labels or None, is_multi_label=is_multi_label, published=published, where=f"scorer {source}"
    )


def _column(label: str) -> str:
    return re.sub(r"\W+", "_", label.strip()).lower()
