"""What scoring a corpus would give and cost, from a sample: shares of the scores, speed here, hours, a price."""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int64

from safelm.documents import WRITTEN_BY, DocumentFile, declare_no_documents
from safelm.io.progress import Bar
from safelm.jobs.output import OutputFolder
from safelm.report.table import Cell, Table, count, number, words
from safelm.safety.scoring import corpus_sample
from safelm.safety.scoring.corpus_sample import CorpusSample
from safelm.safety.scoring.plan import COMMAND
from safelm.safety.scoring.shard import LoadedScorers, batches
from safelm.stats.comparison import clustered_mean, clustered_rate
from safelm.stats.intervals import Estimate
from safelm.tags import MAX_SCORE

REPORT = "estimate.json"
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
    usage: dict[str, int] = dataclasses.field(default_factory=dict)


def estimate(
    files: Sequence[DocumentFile],
    loaded: LoadedScorers,
    settings: EstimateSettings,
    *,
    text_column: str,
    id_column: str,
    max_chunks: int,
) -> dict[str, Any]:
    """Scores a sample in this process; the report, JSON-able. No text or id is in it."""
    sample = corpus_sample.draw(
        files,
        settings.documents,
        text_column=text_column,
        id_column=id_column,
        max_chunks=max_chunks,
        seed=settings.seed,
    )
    scores, speed = _scored(sample, loaded)
    length_N = np.array([len(text or "") for text in sample.texts])
    lengths = _whole(sample, length_N) or clustered_mean(length_N, sample.cluster_N.tolist())
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


def _scored(sample: CorpusSample, loaded: LoadedScorers) -> tuple[Int64[np.ndarray, " N"], _Speed]:
    """The highest score of every document, and the scorers' speed.

    A batch during which something was compiled is scored once more, and the second time counts.
    """
    score_N = np.array([_MALFORMED if text is None else 0 for text in sample.texts], np.int64)  # 0: empty, by rule
    asked = [(text, index) for index, text in enumerate(sample.texts) if text and text.strip()]
    speed = _Speed(usage=dict.fromkeys(_USAGE, 0))
    with Bar(total=len(asked), unit="document", desc="scoring", disable=None) as bar:
        for batch in batches(iter(asked), loaded.batch_scale):
            texts = [text for text, _ in batch]
            verdicts, seconds, used = _timed(loaded, texts)
            if used["programs"]:
                speed.usage["programs"] += used["programs"]
                first = seconds
                verdicts, seconds, used = _timed(loaded, texts)
                speed.compiling += max(0.0, first - seconds)
            for name in ("tokens", "positions"):
                speed.usage[name] += used[name]
            speed.seconds += seconds
            speed.documents += len(batch)
            speed.characters += sum(map(len, texts))
            for at, (_, index) in enumerate(batch):
                found = [given[at].score for given in verdicts.values() if given[at].score is not None]
                score_N[index] = max(found, default=_UNSCORED)
            bar.update(len(batch))
    return score_N, speed


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
    """Shares of the documents by score, with intervals over resampled places."""
    own = {str(score): score_N == score for score in range(MAX_SCORE + 1)}
    own |= {"3 or more": score_N >= 3, "unscored": score_N == _UNSCORED, "malformed": score_N == _MALFORMED}
    return {
        name: dataclasses.asdict(_whole(sample, is_one) or clustered_rate(is_one, sample.cluster_N.tolist()))
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
    """Raises ValueError if the folder holds something else than a former estimate."""
    if not out.is_empty() and REPORT not in out.sizes(""):
        raise ValueError(f"--output {out.root}: it holds other files than an estimate; choose a new folder")


def write(out: OutputFolder, report: Mapping[str, Any], scorers: Sequence[Mapping[str, Any]]) -> None:
    """Writes the report into a folder that no command takes for documents."""
    declare_no_documents(out.root, COMMAND)
    out.write_json(REPORT, {WRITTEN_BY: COMMAND, "scorers": list(scorers), **report})


def markdown(report: Mapping[str, Any]) -> str:
    """The report in print."""
    sample, speed, cost = report["sample"], report["speed"], report["cost"]
    lines = [
        f"Estimate from {sample['documents']:,} documents (seed {sample['seed']}) in {sample['places']:,} places of "
        f"{sample['files']:,} of {report['input']['files']:,} files",
        "",
        _table(report).markdown(),
        "",
        _intervals(sample),
        "",
        *_arithmetic(report),
        "",
        *_speed_lines(speed),
        *_cost_lines(cost),
    ]
    return "\n".join(lines)


def _table(report: Mapping[str, Any]) -> Table:
    total = report["documents"]["value"]
    rows = []
    for name, found in report["scores"].items():
        share = Cell(_percent(found["value"]), found, interval=(_percent(found["low"]), _percent(found["high"])))
        rows.append([words(name), count(found["count"]), share, count(round(total * found["value"]))])
    return Table("", ["harm score", "in the sample", "% [95%]", "documents of the corpus"], rows)


def _percent(share: float) -> str:
    return f"{100 * share:.2f}"


def _intervals(sample: Mapping[str, Any]) -> str:
    if sample["is_all"]:
        return "These are all documents there are: nothing is drawn, nothing uncertain but the speed."
    return (
        f"Intervals count {sample['clusters']:,} places, not documents, as drawn: those of one place (a row group, a "
        "megabyte of lines, a compressed file; where only some files were looked into, a file) are alike."
    )


def _arithmetic(report: Mapping[str, Any]) -> list[str]:
    lines = ["Documents of the corpus:"]
    for total in report["totals"]:
        lines.append(f"- {total['kind']}: {_range(total['documents'])} = {total['how']}")
    length = report["characters_per_document"]
    return [*lines, f"- together {_range(report['documents'])}, of {_range(length)} characters each"]


def _speed_lines(speed: Mapping[str, Any]) -> list[str]:
    if not speed["documents_per_second"]:
        return ["Speed: no document of the sample has content, nothing was measured."]
    tokens = ""
    if speed["tokens_per_second"]:
        tokens = f", {speed['tokens_per_second']:,.0f} tokens/s with {_percent(speed['padding'])}% padding"
    lines = [
        f"Scorers alone, one process here: {number(speed['documents_per_second'])} documents/s, "
        f"{speed['characters_per_second']:,.0f} characters/s{tokens} "
        f"({speed['documents']:,} documents in {speed['seconds']:.1f} s)"
    ]
    if speed["programs"]:
        lines.append(f"beside {speed['programs']} programs compiled first in {speed['compiling_seconds']:.1f} s")
    return lines


def _cost_lines(cost: Mapping[str, Any]) -> list[str]:
    lines = [
        f"Hours of one = documents * characters each / characters per second / 3,600 = {_range(cost['chip_hours'])}",
        f"Hours of {cost['chips']} side by side: {_range(cost['hours'])}",
    ]
    if cost["price"] is not None:
        lines.append(f"Price at {cost['price_per_hour']:g} an hour each: {_range(cost['price'])}")
    return [
        *lines,
        "Reading, writing and loading come on top, and a text that is repeated in a file is scored once "
        "(--output_rows=annotations): so much less. Speed elsewhere is not known from here.",
    ]


def _range(found: Mapping[str, float]) -> str:
    value, low, high = (number(found[end]) for end in ("value", "low", "high"))
    return value if low == high else f"{value} [{low}, {high}]"
