"""What scoring a corpus would give and cost, from a sample: shares of the scores, speed here, hours, a price.

The scores found so far are kept beside the report every half minute, so that a stopped estimate goes on with them.
"""

import dataclasses
import hashlib
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int64

from safelm.documents import WRITTEN_BY, DocumentFile, declare_no_documents
from safelm.io import records
from safelm.io.progress import Bar
from safelm.jobs.output import OutputFolder
from safelm.safety.scoring import corpus_sample
from safelm.safety.scoring.corpus_sample import CorpusSample
from safelm.safety.scoring.plan import COMMAND
from safelm.safety.scoring.shard import LoadedScorers, batches
from safelm.stats.comparison import clustered_mean, clustered_rate
from safelm.stats.intervals import Estimate
from safelm.tags import MAX_SCORE

REPORT = "estimate.json"
_PARTS, _PART_SECONDS = "parts", 30.0
_UNSCORED, _MALFORMED = -1, -2
_USAGE = ("tokens", "positions", "programs")


@dataclasses.dataclass(frozen=True)
class EstimateSettings:
    """What is asked: `documents` of a sample, and what `chips` processes like this one cost an hour each."""

    documents: int
    chips: int = 1
    price_per_hour: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, flag in (("documents", "--estimate"), ("chips", "--chips")):
            if getattr(self, name) < 1:
                raise ValueError(f"{flag}={getattr(self, name)}: must be at least 1")
        if self.price_per_hour is not None and not 0 <= self.price_per_hour < float("inf"):
            raise ValueError(f"--price_per_hour={self.price_per_hour}: must be a price, 0 or more")


@dataclasses.dataclass
class _Speed:
    """Of the scorers alone, without what they compiled: seconds by the clock, and what they were given."""

    seconds: float = 0.0
    compiling: float = 0.0
    documents: int = 0
    characters: int = 0
    usage: dict[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(_USAGE, 0))

    def add(self, other: "_Speed") -> None:
        """Adds what was measured elsewhere."""
        for name in ("seconds", "compiling", "documents", "characters"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in _USAGE:
            self.usage[name] += other.usage[name]


class _Parts:
    """The scores that an estimate has found so far, as JSON files of its output folder."""

    def __init__(self, out: OutputFolder, asked_for: Mapping[str, Any]):
        """`asked_for` is everything that the scores follow from; parts of anything else are removed."""
        self._out, self._fingerprint = out, records.fingerprint(asked_for)
        self._names = sorted(out.sizes(_PARTS))
        found = list(out.read_json([f"{_PARTS}/{name}" for name in self._names]))
        if any(part is None or part["of"] != self._fingerprint for part in found):
            self.remove()
            found = []
        self.found: list[tuple[list[int], _Speed]] = [(part["scores"], _Speed(**part["speed"])) for part in found]

    def add(self, scores: Sequence[int], speed: _Speed) -> None:
        """Keeps the scores of the documents that follow those kept, and what finding them took."""
        name = f"{len(self._names):06d}.json"
        part = {"of": self._fingerprint, "scores": list(scores), "speed": dataclasses.asdict(speed)}
        self._out.write_json(f"{_PARTS}/{name}", part)
        declare_no_documents(self._out.root, COMMAND)
        self._names.append(name)

    def remove(self) -> None:
        """Removes all parts."""
        self._out.remove_folder(_PARTS)
        self._names = []


def estimate(
    files: Sequence[DocumentFile],
    loaded: LoadedScorers,
    settings: EstimateSettings,
    out: OutputFolder,
    scorers: Sequence[Mapping[str, Any]],
    *,
    text_column: str,
    id_column: str,
    max_chunks: int,
) -> dict[str, Any]:
    """Scores a sample in this process and writes the report into a folder that no command takes for documents.

    Args:
      scorers: facts that say which scorers `loaded` are.

    Returns the report, JSON-able. No text or id is in it.
    """
    asked = {"text_column": text_column, "id_column": id_column, "max_chunks": max_chunks, "seed": settings.seed}
    sample = corpus_sample.draw(files, settings.documents, **asked)
    inputs = [[file.path, file.bytes] for file in files]
    texts = hashlib.sha256("\0".join(text or "" for text in sample.texts).encode("utf-8", "surrogatepass")).hexdigest()
    parts = _Parts(out, {"inputs": inputs, "texts": texts, "scorers": list(scorers), **asked})
    report = _report(files, sample, *_scored(sample, loaded, parts), settings)
    out.write_json(REPORT, {WRITTEN_BY: COMMAND, "scorers": list(scorers), **report})
    declare_no_documents(out.root, COMMAND)
    parts.remove()
    return report


def _report(
    files: Sequence[DocumentFile],
    sample: CorpusSample,
    scores: Int64[np.ndarray, " N"],
    speed: _Speed,
    settings: EstimateSettings,
) -> dict[str, Any]:
    length_N = np.array([len(text or "") for text in sample.texts])
    lengths = _whole(sample, length_N) or clustered_mean(length_N, sample.cluster_N.tolist(), weights=sample.weight_N)
    documents = [sum(getattr(total.documents, end) for total in sample.totals) for end in ("value", "low", "high")]
    per_character = speed.seconds / max(speed.characters, 1)
    hours = [
        many * long * per_character / 3600
        for many, long in zip(documents, (lengths.value, lengths.low, lengths.high), strict=True)
    ]
    return {
        "input": {"files": len(files), "bytes": sum(file.bytes for file in files)},
        "sample": {
            "documents": len(sample.texts),
            "seed": settings.seed,
            "files": sample.files,
            "places": sample.places,
            "clusters": len(set(sample.cluster_N.tolist())),
            "read_bytes": sample.read_bytes,
            "is_all": sample.is_all,
            "cut": sum(sample.is_cut),
        },
        "scores": _shares(sample, scores),
        "characters_per_document": dataclasses.asdict(lengths),
        "totals": [dataclasses.asdict(total) for total in sample.totals],
        "documents": dict(zip(("value", "low", "high"), documents, strict=True)),
        "speed": _speed_facts(speed, lengths.value),
        "cost": _cost(hours, settings),
    }


def _scored(sample: CorpusSample, loaded: LoadedScorers, parts: _Parts) -> tuple[Int64[np.ndarray, " N"], _Speed]:
    """The highest score of every document, and the scorers' speed; what `parts` has is not scored again."""
    score_N = np.array([_MALFORMED if text is None else 0 for text in sample.texts], np.int64)  # 0: empty, by rule
    asked = [(text, index) for index, text in enumerate(sample.texts) if text and text.strip()]
    speed, found = _Speed(), []
    for scores, took in parts.found:
        found += scores
        speed.add(took)
    part, since = _Speed(), time.perf_counter()
    kept = len(found)
    with Bar(total=len(asked), initial=kept, unit="document", desc="scoring", disable=None) as bar:
        for batch in batches(iter(asked[kept:]), loaded.batch_scale):
            found += _score_batch(loaded, [text for text, _ in batch], part)
            bar.update(len(batch))
            if time.perf_counter() - since >= _PART_SECONDS:
                parts.add(found[kept:], part)
                speed.add(part)
                kept, part, since = len(found), _Speed(), time.perf_counter()
    speed.add(part)
    for (_, index), score in zip(asked, found, strict=True):
        score_N[index] = score
    return score_N, speed


def _score_batch(loaded: LoadedScorers, texts: Sequence[str], speed: _Speed) -> list[int]:
    """The highest score of every text.

    A batch during which something was compiled is scored once more, and the second time counts.
    """
    verdicts, seconds, used = _timed(loaded, texts)
    if used["programs"]:
        speed.usage["programs"] += used["programs"]
        first = seconds
        verdicts, seconds, used = _timed(loaded, texts)
        speed.compiling += max(0.0, first - seconds)
    for name in ("tokens", "positions"):
        speed.usage[name] += used[name]
    speed.seconds += seconds
    speed.documents += len(texts)
    speed.characters += sum(map(len, texts))
    scores = []
    for at in range(len(texts)):
        given = [each[at].score for each in verdicts.values() if each[at].score is not None]
        scores.append(int(max(given, default=_UNSCORED)))
    return scores


def _timed(loaded: LoadedScorers, texts: Sequence[str]) -> tuple[dict[str, Any], float, dict[str, int]]:
    before, started = _usage(loaded), time.perf_counter()
    verdicts = loaded.ask_all(texts)
    seconds, after = time.perf_counter() - started, _usage(loaded)
    return verdicts, seconds, {name: after[name] - before[name] for name in _USAGE}


def _usage(loaded: LoadedScorers) -> dict[str, int]:
    """What those scorers that count it have read and compiled so far."""
    found = [getattr(scorer, "usage", {}) for scorer in loaded.scorers]
    return {name: sum(usage.get(name, 0) for usage in found) for name in _USAGE}


def _shares(sample: CorpusSample, score_N: Int64[np.ndarray, " N"]) -> dict[str, dict[str, Any]]:
    """Shares of the corpus's documents by score, with intervals over resampled places."""
    own = {str(score): score_N == score for score in range(MAX_SCORE + 1)}
    own |= {"3 or more": score_N >= 3, "unscored": score_N == _UNSCORED, "malformed": score_N == _MALFORMED}
    return {
        name: dataclasses.asdict(
            _whole(sample, is_one) or clustered_rate(is_one, sample.cluster_N.tolist(), weights=sample.weight_N)
        )
        | {"count": int(is_one.sum())}
        for name, is_one in own.items()
    }


def _whole(sample: CorpusSample, value_N: Any) -> Estimate | None:
    """The mean itself where every document was looked at, so that nothing is uncertain; else None."""
    if not sample.is_all:
        return None
    mean = float(np.mean(value_N))
    return Estimate(mean, mean, mean, len(value_N))


def _speed_facts(speed: _Speed, characters_per_document: float) -> dict[str, Any]:
    per_second = 1 / speed.seconds if speed.seconds else None
    tokens, positions = speed.usage["tokens"], speed.usage["positions"]
    return {
        "documents": speed.documents,
        "characters": speed.characters,
        "seconds": speed.seconds,
        "compiling_seconds": speed.compiling,
        "programs": speed.usage["programs"],
        "documents_per_second": per_second and speed.documents * per_second,
        "characters_per_second": per_second and speed.characters * per_second,
        "tokens_per_second": per_second and tokens * per_second if tokens else None,
        "tokens": tokens or None,
        "padding": 1 - tokens / positions if positions else None,
        "characters_per_document": characters_per_document,
    }


def _cost(hours: Sequence[float], settings: EstimateSettings) -> dict[str, Any]:
    ends = ("value", "low", "high")
    price = settings.price_per_hour
    return {
        "chips": settings.chips,
        "price_per_hour": price,
        "chip_hours": dict(zip(ends, hours, strict=True)),
        "hours": dict(zip(ends, (each / settings.chips for each in hours), strict=True)),
        "price": None if price is None else dict(zip(ends, (each * price for each in hours), strict=True)),
    }


def check_output(out: OutputFolder) -> None:
    """Raises ValueError if the folder holds something else than an estimate, finished or not."""
    has_parts = bool(out.sizes(_PARTS)) if out.is_remote else os.path.isdir(out.path(_PARTS))
    if not out.is_empty() and REPORT not in out.sizes("") and not has_parts:
        raise ValueError(f"--output {out.root}: it holds other files than an estimate; choose a new folder")
