"""Trains a token-level classifier: a linear head on hidden states, from the labels of spans (arXiv 2601.21571).

A token has the harm score of the spans that have a character of it, the largest; in none it is 0. So with labels of
sentences all tokens of a sentence have its score, and it is left to the head to find which of them tell. Documents are
split by their text, always in the same way: eight tenths train a head for each layer, one tenth (development) chooses
the layer and the threshold, one tenth (test) says how good they are.
"""

import dataclasses
import hashlib
import heapq
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, Int32

from safelm import documents
from safelm.documents import annotations, spans
from safelm.documents.annotations import AnnotationFolder
from safelm.documents.spans import Span
from safelm.io.progress import Bar
from safelm.safety.classifier.checkpoint import check_free
from safelm.safety.classifier.examples import part_of
from safelm.safety.embedding import Backbone, load_backbone
from safelm.safety.monitors import fitting, token_states
from safelm.safety.monitors.folder import SavedHead, save_head, stream_fingerprint
from safelm.stats.comparison import clustered_rate
from safelm.tags import MAX_SCORE, MIN_SCORE

_logger = logging.getLogger(__name__)
_MOST_VALUES = 1 << 28  # of the training tokens' states, all layers together: a gigabyte
_LEAST_DOCUMENTS = 10
PARTS = TRAIN, DEVELOPMENT, TEST = ("train", "dev", "test")


@dataclasses.dataclass(frozen=True)
class TokenRecipe:
    """How a token-level classifier is trained.

    Attributes:
      layers: numbers of blocks to choose among; none: up to 8, evenly spread.
      min_score: the harm score from which on a token is harmful.
      harmful_labels: labels of spans that are no scores and count as 5; other such labels count as 0.
      kinds: of spans to look at; none: all.
      max_documents: at most so many are read, chosen by their text's hash.
      max_tokens: at most so many train, evenly from all documents.
      max_window: tokens read at once; 0: what the model takes, up to 512.
      l2: weight of half the kernel's squared norm.
      seed: of the choice of tokens.
    """

    layers: tuple[int, ...] = ()
    min_score: int = 4
    harmful_labels: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    max_documents: int = 4000
    max_tokens: int = 100_000
    max_window: int = 0
    l2: float = fitting.L2
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.min_score <= MAX_SCORE:
            raise ValueError(f"--min_score={self.min_score}: must be 1 to {MAX_SCORE}")
        for name in ("max_documents", "max_tokens", "l2"):
            if not getattr(self, name) > 0:
                raise ValueError(f"--{name}={getattr(self, name)}: must be above 0")

    def score_of(self, label: str) -> int:
        """The harm score that a span's label stands for."""
        if label in self.harmful_labels:
            return MAX_SCORE
        is_score = label.isascii() and label.isdigit() and MIN_SCORE <= int(label) <= MAX_SCORE
        return int(label) if is_score else MIN_SCORE


@dataclasses.dataclass(frozen=True)
class Labelled:
    """A document with its spans; `key` is a hash of its text."""

    key: str
    text: str = dataclasses.field(repr=False)
    spans: tuple[Span, ...]


@dataclasses.dataclass(frozen=True)
class _Tokens:
    """Tokens of a part: their states [L, n, D], scores and documents."""

    states_LND: np.ndarray
    scores_N: Int[np.ndarray, " N"]
    documents_N: np.ndarray


def read_labelled(
    paths: Sequence[str], folders: Sequence[AnnotationFolder], recipe: TokenRecipe, text_column: str = "text"
) -> tuple[list[Labelled], dict[str, int]]:
    """The documents of files with their spans, at most `max_documents` different ones, and counts of rows.

    Memory is bounded by `max_documents`. Of a text that recurs the first spans count. The counts are `read`,
    `malformed`, and `other_spans`: those that repeat the text of a document that was taken, with spans unlike its own.

    Raises ValueError, naming file and row, for spans that don't fit the text, where there is no column of spans, and
    where a file has more malformed rows than `MalformedLimit` allows.
    """
    order: list[tuple[int, str]] = []  # a heap whose first is the taken document with the largest hash
    taken: dict[str, Labelled] = {}
    other_spans, counts = Counter[str](), Counter(read=0, malformed=0)
    for file in Bar(documents.find(paths), desc="documents", unit=" files", disable=None):
        tally = documents.RowTally(file.path, documents.MalformedLimit())
        for labelled in _of_file(file.path, folders, recipe, text_column, tally):
            if labelled.key in taken:
                other_spans[labelled.key] += labelled.spans != taken[labelled.key].spans
                continue
            heapq.heappush(order, (-int(labelled.key[:15], 16), labelled.key))
            taken[labelled.key] = labelled
            if len(order) > recipe.max_documents:
                _, largest = heapq.heappop(order)  # one that was passed over is passed over again where it recurs
                del taken[largest], other_spans[largest]
        counts.update(read=tally.rows, malformed=tally.malformed)
    if len(taken) < _LEAST_DOCUMENTS:
        raise ValueError(f"--data: {len(taken)} different documents with text, want at least {_LEAST_DOCUMENTS}")
    counts["other_spans"] = other_spans.total()
    if counts["malformed"] or counts["other_spans"]:
        _logger.warning(
            "of %d rows %d are malformed, and %d repeat a text with other spans than its first: not learned from",
            *(counts[name] for name in ("read", "malformed", "other_spans")),
        )
    return [taken[key] for _, key in sorted(order, reverse=True)], dict(counts)


def _of_file(
    path: str,
    folders: Sequence[AnnotationFolder],
    recipe: TokenRecipe,
    text_column: str,
    tally: documents.RowTally,
) -> Iterator[Labelled]:
    wanted = [folder.column(spans.COLUMN) for folder in folders] or [spans.COLUMN]
    rows = documents.iter_rows(
        path, tally.add, text_column=text_column, columns=[text_column, *wanted], annotated=folders
    )
    has_spans = False
    for row in rows:
        tally.add()
        text, where = row.values[text_column], f"{path}, row {row.number}"
        has_spans |= any(name in row.values for name in wanted)
        found = spans.merged([spans.parse(row.values.get(name), text, where) for name in wanted], where)
        if text.strip():
            kept = tuple(span for span in found if not recipe.kinds or span.kind in recipe.kinds)
            yield Labelled(hashlib.sha256(text.encode("utf-8", "replace")).hexdigest(), text, kept)
    tally.finish()
    if not has_spans:
        raise ValueError(f"{path}: no column {wanted[0]!r}: give --annotations, or write it by safelm annotate --unit")


def token_scores(labelled: Labelled, offsets_n2: Int32[np.ndarray, "n 2"], recipe: TokenRecipe) -> np.ndarray:
    """The harm score of each token: the largest of the spans that have a character of it."""
    scores_n = np.zeros(len(offsets_n2), np.int64)
    for span in labelled.spans:
        inside_n = (offsets_n2[:, 0] < span.end) & (offsets_n2[:, 1] > span.start)
        scores_n[inside_n] = np.maximum(scores_n[inside_n], recipe.score_of(span.label))
    return scores_n


def train(
    backbone: str,
    paths: Sequence[str],
    output: str,
    recipe: TokenRecipe,
    *,
    annotated: str = "",
    text_column: str = "text",
) -> dict[str, Any]:
    """Trains a head and writes its folder; what was measured, as in its config.json.

    Args:
      backbone: a checkpoint of ours, a Hugging Face folder or name, a GGUF file, "minilm" or "smollm2".
      paths: files of documents.
      annotated: folders of annotations of these files, by comma; empty: the documents have a column `spans`.

    Raises:
      ValueError: something stands at `output`, the spans don't fit, or a part of the documents has tokens of one kind.
      FileNotFoundError: the backbone or a file isn't there.
    """
    check_free(output)
    reader = load_backbone(backbone, **({"max_tokens": recipe.max_window} if recipe.max_window else {}))
    layers = recipe.layers or fitting.spread_layers(reader.config.num_layers)
    folders = annotations.parse(annotated)
    labelled, rows = read_labelled(paths, folders, recipe, text_column)
    parts = _parts(labelled)
    room = min(recipe.max_tokens, _MOST_VALUES // (len(layers) * reader.config.d_model))
    tokens = {
        name: _tokens(reader, of_part, layers, recipe, room if name == TRAIN else max(1, room // 4), name)
        for name, of_part in parts.items()
    }
    fitted, threshold = _fit(tokens, layers, recipe)
    vocab_hash = token_states.vocab_hash(reader)
    training = {
        "recipe": dataclasses.asdict(recipe) | {"layers": list(layers)},
        "annotations": [folder.identity for folder in folders],
        "vocab_hash": vocab_hash,
        "max_tokens": reader.max_tokens,
        "rows": rows,
        "documents": {name: len(of_part) for name, of_part in parts.items()},
        "tokens": {name: len(of.scores_N) for name, of in tokens.items()},
        "development_auroc": {str(layer): value for layer, value in fitted.development.items()},
        "measured": _measure(tokens[TEST], fitted, layers, threshold, recipe),
    }
    head = SavedHead(
        kind="token",
        source=str(reader.spec["source"]),
        fingerprint=stream_fingerprint(reader.params, vocab_hash, token_states.tag_id(reader)),
        is_encoder=token_states.is_encoder(reader),
        layer=fitted.layer,
        kernel_DC=fitted.kernel_DC,
        bias_C=fitted.bias_C,
        min_score=recipe.min_score,
        threshold=threshold,
        training=training,
    )
    save_head(output, head)
    return {"layer": head.layer, "threshold": threshold, **training}


def _parts(found: Sequence[Labelled]) -> dict[str, list[Labelled]]:
    parts = {name: [each for each in found if part_of(each.key) == name] for name in PARTS}
    if empty := [name for name, of_part in parts.items() if not of_part]:
        raise ValueError(f"--data: of {len(found)} documents none is in the part {empty[0]!r}: give more")
    return parts


def _fit(tokens: Mapping[str, _Tokens], layers: tuple[int, ...], recipe: TokenRecipe) -> tuple[fitting.Fitted, float]:
    """The head of the best layer, and the threshold that calls development tokens best."""
    train_tokens, development = tokens[TRAIN], tokens[DEVELOPMENT]
    is_harmful_M = development.scores_N >= recipe.min_score
    fitted = fitting.choose_layer(
        train_tokens.states_LND,
        train_tokens.scores_N,
        development.states_LND,
        is_harmful_M,
        layers,
        min_score=recipe.min_score,
        l2=recipe.l2,
    )
    return fitted, fitting.best_threshold(_levels(development, fitted, layers, recipe), is_harmful_M)


def _levels(tokens: _Tokens, fitted: fitting.Fitted, layers: tuple[int, ...], recipe: TokenRecipe) -> np.ndarray:
    x_ND = tokens.states_LND[layers.index(fitted.layer)]
    return fitting.level_of(x_ND, fitted.kernel_DC, fitted.bias_C, recipe.min_score)


def _tokens(
    reader: Backbone, found: Sequence[Labelled], layers: tuple[int, ...], recipe: TokenRecipe, most: int, part: str
) -> _Tokens:
    """The tokens of documents, at most `most`, drawn evenly."""
    windows = token_states.windows(reader, [labelled.text for labelled in found])
    scores = [token_scores(found[window.text], window.offsets_n2, recipe) for window in windows]
    total = sum(map(len, scores))
    rng = np.random.default_rng([recipe.seed, total])
    chosen_N = np.sort(rng.permutation(total)[:most])
    bounds = np.cumsum([0, *map(len, scores)])
    states_LND = np.zeros((len(layers), len(chosen_N), reader.config.d_model), np.float32)
    with Bar(total=len(windows), desc=part, unit=" windows", disable=None) as bar:
        for place, states_LnD in token_states.states(reader, windows, layers):
            first, last = np.searchsorted(chosen_N, bounds[place : place + 2])
            states_LND[:, first:last] = states_LnD[:, chosen_N[first:last] - bounds[place]]
            bar.update()
    documents_N = np.repeat([window.text for window in windows], list(map(len, scores)))
    return _Tokens(states_LND, np.concatenate(scores)[chosen_N], documents_N[chosen_N])


def _measure(
    tokens: _Tokens, fitted: fitting.Fitted, layers: tuple[int, ...], threshold: float, recipe: TokenRecipe
) -> Mapping[str, Any]:
    """On tokens of test documents: AUROC, precision and recall at the threshold, intervals by document."""
    level_N = _levels(tokens, fitted, layers, recipe)
    is_harmful_N, called_N = tokens.scores_N >= recipe.min_score, level_N >= threshold
    measured: dict[str, Any] = {"harmful_tokens": int(is_harmful_N.sum())}
    if is_harmful_N.any() and not is_harmful_N.all():
        measured["auroc"] = dataclasses.asdict(fitting.clustered_area(level_N, is_harmful_N, tokens.documents_N))
    for name, of_N, value_N in (("precision", called_N, is_harmful_N), ("recall", is_harmful_N, called_N)):
        if of_N.any():
            found = clustered_rate(value_N[of_N].astype(float), tokens.documents_N[of_N].tolist())
            measured[name] = dataclasses.asdict(found)
    return measured
