"""Draws documents at random from a corpus of any size, with known chances, and reads little of it.

A place is a row group of a Parquet file, a megabyte of a file of JSON lines, or all of a compressed one. Places are
drawn with chances in proportion to their rows, where a footer tells them, else by their bytes (systematically, in
random order: Madow 1949), and read whole. The documents in them are drawn so that one of a dense place has as good a
chance as one of a sparse place, as far as the places have as many (exponential keys by the place's weight: Efraimidis
and Spirakis 2006). Each comes with one over its chance (Cohen and Kaplan 2007: given the smallest key not drawn), by
which shares and means are weighted. Documents of one place are alike, so intervals go by places (by files where only
some of the files were looked at).
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int64

from safelm import documents
from safelm.documents import DocumentFile, Part
from safelm.io.progress import Bar
from safelm.jobs.file_shards import is_one_shard, side_by_side
from safelm.safety.scoring import annotation_rows
from safelm.stats.comparison import clustered_mean
from safelm.stats.intervals import Estimate

MOST_FILES = 4096  # that are looked into: of more as many are drawn by their bytes
RANGE_BYTES = 1 << 20
PER_PLACE, FEWEST_PLACES = 32, 32  # documents that one place is to give: more of the same place tell little
_PARQUET, _LINES = "Parquet", "JSON lines"


@dataclasses.dataclass(frozen=True)
class Place:
    """A piece of a file that is read as a whole.

    Attributes:
      file: which of the corpus's files it is of.
      bytes: on the disk.
      rows: as the footer says; None where only reading tells.
      weight: of its file: 1, or where files were drawn how many it stands for.
    """

    file: int
    path: str
    part: Part | None
    bytes: int
    rows: int | None
    weight: float = 1.0

    @property
    def kind(self) -> str:
        """The format of its file."""
        return _kind(self.path)


@dataclasses.dataclass(frozen=True)
class Total:
    """How many documents the files of one format have, and how that is known."""

    kind: str
    files: int
    bytes: int
    documents: Estimate
    how: str


@dataclasses.dataclass
class CorpusSample:
    """Documents of a corpus.

    Attributes:
      texts: None where a row has no text that can be used.
      is_cut: whether a text is longer than what was kept of it.
      cluster_N: which draw a document came from: its place, or its file where files were drawn.
      weight_N: how many documents of the corpus each stands for.
      is_all: whether these are all documents there are.
    """

    texts: list[str | None] = dataclasses.field(repr=False)
    is_cut: list[bool]
    cluster_N: Int64[np.ndarray, " N"]
    weight_N: Float[np.ndarray, " N"]
    files: int
    places: int
    read_bytes: int
    is_all: bool
    totals: list[Total]


def draw(
    files: Sequence[DocumentFile], count: int, *, text_column: str, id_column: str, max_chunks: int, seed: int
) -> CorpusSample:
    """Draws `count` documents, all if there are no more.

    Args:
      max_chunks: of a text so many chunks are kept (see `annotation_rows.read`).

    Raises ValueError or OSError naming a file that is damaged or lacks the text column.
    """
    places, are_drawn = _places(files, np.random.default_rng([seed, 0]))
    weight_P = np.array([place.weight for place in places])
    size_P = weight_P * _sizes(places)
    wanted = max(FEWEST_PLACES, math.ceil(count / PER_PLACE))
    while True:
        hits_P, rate_P = np.ones(len(places), np.int64), weight_P
        if wanted < len(places):
            hits_P = systematic(size_P, wanted, np.random.default_rng([seed, 1]))
            rate_P = hits_P * weight_P * size_P.sum() / np.maximum(wanted * size_P, 1)
        chosen = np.flatnonzero(hits_P)
        kept, rows = _Smallest(count), {}
        for index in Bar(chosen.tolist(), unit="place", desc="sampling", disable=None):
            place, rng = places[index], np.random.default_rng([seed, 2, index])
            rows[index] = _read(place, index, rate_P[index], kept, rng, (text_column, id_column, max_chunks))
        if sum(rows.values()) >= count or wanted >= len(places):
            break
        wanted *= 4  # places with few documents: of more of them
    weight_N = kept.weights(rate_P)
    is_all = not are_drawn and wanted >= len(places) and len(kept.rows) == sum(rows.values())
    return CorpusSample(
        texts=[text for _, text, _ in kept.rows],
        is_cut=[is_cut for _, _, is_cut in kept.rows],
        cluster_N=np.array([places[index].file if are_drawn else index for index, _, _ in kept.rows], np.int64),
        weight_N=weight_N,
        files=len({places[index].file for index in rows}),
        places=len(rows),
        read_bytes=sum(places[index].bytes for index in rows),
        is_all=is_all,
        totals=_totals(files, places, rows, hits_P / np.maximum(size_P, 1) * weight_P, are_drawn),
    )


def systematic(size_N: Float[np.ndarray, " N"], count: int, rng: np.random.Generator) -> Int64[np.ndarray, " N"]:
    """How often each of N is drawn: `count` draws in all, on average in proportion to the sizes (Madow 1949)."""
    order = rng.permutation(len(size_N))
    edges = np.cumsum(size_N[order])
    points = (rng.random() + np.arange(count)) / count * edges[-1]
    hits_N = np.zeros(len(size_N), np.int64)
    np.add.at(hits_N, order[np.searchsorted(edges, points, side="right").clip(max=len(order) - 1)], 1)
    return hits_N


def _sizes(places: Sequence[Place]) -> Float[np.ndarray, " P"]:
    """What places are drawn by, in bytes: rows times the mean row, or half their bytes and half those of a mean place.

    So a place of few bytes, which may have many short documents, isn't left to luck.
    """
    byte_P = np.array([place.bytes for place in places], float)
    row_P = np.array([math.nan if place.rows is None else place.rows for place in places])
    size_P, known_P = np.zeros(len(places)), np.isfinite(row_P)
    size_P[known_P] = row_P[known_P] * (byte_P[known_P].sum() / max(row_P[known_P].sum(), 1))
    size_P[~known_P] = (byte_P[~known_P] + byte_P[~known_P].sum() / max((~known_P).sum(), 1)) / 2
    return size_P


class _Smallest:
    """The rows with the smallest keys of all that were seen: (place, text, whether it is cut)."""

    def __init__(self, count: int):
        self._count, self._key_N = count + 1, np.zeros(0)  # the key behind the last tells chances
        self.rows: list[tuple[int, str | None, bool]] = []

    def weights(self, rate_P: Float[np.ndarray, " P"]) -> Float[np.ndarray, " N"]:
        """Ends the sample: how many rows of the corpus each of its rows stands for, given the rate of every place."""
        bound = math.inf
        if len(self.rows) == self._count:
            last = int(np.argmax(self._key_N))
            bound = float(self._key_N[last])
            del self.rows[last]
        rate_N = np.array([rate_P[index] for index, _, _ in self.rows])
        return rate_N / -np.expm1(-rate_N * bound)

    def add(self, index: int, block: annotation_rows.Block, key_N: Float[np.ndarray, " N"]) -> None:
        bound = self._key_N.max() if len(self.rows) == self._count else np.inf
        chosen = np.flatnonzero(key_N < bound).tolist()
        if not chosen:
            return
        rows = self.rows + [(index, _decoded(block.texts[at]), bool(block.is_cut_N[at])) for at in chosen]
        self._key_N = np.concatenate([self._key_N, key_N[chosen]])
        order = np.sort(np.argsort(self._key_N, kind="stable")[: self._count])
        self._key_N, self.rows = self._key_N[order], [rows[at] for at in order.tolist()]


def _read(
    place: Place, index: int, rate: float, kept: _Smallest, rng: np.random.Generator, columns: tuple[str, str, int]
) -> int:
    """Offers the rows of a place; their number."""
    rows = 0
    for block in annotation_rows.read(place.path, place.part, *columns, _ignore, is_numbered=False):
        kept.add(index, block, rng.exponential(size=len(block.texts)) / rate)
        rows += len(block.texts)
    return rows


def _places(files: Sequence[DocumentFile], rng: np.random.Generator) -> tuple[list[Place], bool]:
    """The places of the files that are looked into, and whether these were drawn among more."""
    are_drawn = len(files) > MOST_FILES
    weights = {index: 1.0 for index in range(len(files))}
    if are_drawn:
        size_F = np.array([file.bytes for file in files], float)
        hits_F = systematic(size_F, MOST_FILES, rng)
        weights = {
            index: float(hits_F[index] * size_F.sum() / (MOST_FILES * size_F[index]))
            for index in np.flatnonzero(hits_F).tolist()
        }
    found = side_by_side(lambda index: _pieces(index, files[index], weights[index]), weights)
    places = [place for pieces in found for place in pieces if place.bytes]
    if not places:
        raise ValueError(f"{files[0].path}: no documents in {len(files)} files")
    return places, are_drawn


def _pieces(index: int, file: DocumentFile, weight: float) -> list[Place]:
    if file.path.endswith(documents.PARQUET):
        with documents.open_parquet(file.path) as table:
            groups = [table.metadata.row_group(at) for at in range(table.num_row_groups)]
            sizes = [sum(g.column(c).total_compressed_size for c in range(g.num_columns)) for g in groups]
            return [
                Place(index, file.path, Part(at, at + 1), max(size, 1), group.num_rows, weight)
                for at, (group, size) in enumerate(zip(groups, sizes, strict=True))
                if group.num_rows
            ]
    if is_one_shard(file.path, file.bytes, RANGE_BYTES) or documents.is_compressed(file.path):
        return [Place(index, file.path, None, file.bytes, None, weight)]
    stops = [*range(RANGE_BYTES, file.bytes, RANGE_BYTES), file.bytes]
    parts = [Part(start, stop) for start, stop in zip([0, *stops], stops, strict=False)]
    return [Place(index, file.path, part, part.stop - part.start, None, weight) for part in parts]


def _totals(
    files: Sequence[DocumentFile],
    places: Sequence[Place],
    rows: dict[int, int],
    draw_P: Float[np.ndarray, " P"],
    are_drawn: bool,
) -> list[Total]:
    """The documents of each format that the corpus has; `draw_P`: how often a place was drawn over its chance."""
    totals = []
    for kind in (_PARQUET, _LINES):
        own = [file.bytes for file in files if _kind(file.path) == kind]
        if not own:
            continue
        if kind == _PARQUET and not are_drawn:
            known = sum(place.rows or 0 for place in places if place.kind == kind)
            estimate, how = _known(known), f"rows in the footers of all {len(own):,} files"
        elif not are_drawn and len(rows) == len(places):
            known = sum(count for index, count in rows.items() if places[index].kind == kind)
            estimate, how = _known(known), f"lines of all {len(own):,} files, read"
        else:
            known_P = [rows.get(index) if place.rows is None else place.rows for index, place in enumerate(places)]
            by_file = kind == _PARQUET or len(rows) == len(places)
            listed = _file_densities(files, places, known_P) if by_file else _place_densities(places, rows, draw_P)
            chosen = [density for density in listed if _kind(density.path) == kind]
            estimate, how = _by_density(chosen, sum(own), "drawn files" if by_file else "drawn places")
        totals.append(Total(kind, len(own), sum(own), estimate, how))
    return totals


@dataclasses.dataclass
class _Density:
    """Documents and bytes of a file or place, and how often it was drawn in proportion to its bytes."""

    path: str
    draws: int | float
    rows: int
    bytes: int


def _file_densities(
    files: Sequence[DocumentFile], places: Sequence[Place], rows_P: Sequence[int | None]
) -> list[_Density]:
    found: dict[int, _Density] = {}
    total = sum(file.bytes for file in files)
    for place, rows in zip(places, rows_P, strict=True):
        draws = round(place.weight * MOST_FILES * files[place.file].bytes / total)
        own = found.setdefault(place.file, _Density(place.path, draws, 0, files[place.file].bytes))
        own.rows += rows or 0
    return list(found.values())


def _place_densities(places: Sequence[Place], rows: dict[int, int], draw_P: Float[np.ndarray, " P"]) -> list[_Density]:
    return [
        _Density(places[index].path, float(draw_P[index]) * places[index].bytes, count, places[index].bytes)
        for index, count in rows.items()
    ]


def _by_density(found: Sequence[_Density], corpus_bytes: int, what: str) -> tuple[Estimate, str]:
    """Bytes of the corpus times the mean of documents per byte, as if drawn in proportion to bytes."""
    if not found:
        return Estimate(0.0, 0.0, 0.0, 0), f"none of the {what} was of this format"
    density_D = [each.rows / each.bytes for each in found]
    draws_D = np.array([each.draws for each in found], float)
    mean = clustered_mean(density_D, range(len(found)), weights=draws_D, bounded=False)
    value, low, high = (number * corpus_bytes for number in (mean.value, mean.low, mean.high))
    how = f"{corpus_bytes:,} bytes * {1e6 * mean.value:,.2f} documents/MB, the mean over {len(found):,} {what}"
    return Estimate(value, low, high, len(found)), how


def _known(count: int) -> Estimate:
    return Estimate(float(count), float(count), float(count), count)


def _kind(path: str) -> str:
    return _PARQUET if path.endswith(documents.PARQUET) else _LINES


def _decoded(text: bytes | None) -> str | None:
    try:
        return None if text is None else text.decode()
    except UnicodeDecodeError:
        return None


def _ignore(_: Any) -> None:
    """Rows that can't be used are in their block all the same."""
