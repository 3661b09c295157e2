"""Finds harmful stretches of texts by a token-level classifier: spans in characters and in tokens."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from safelm.documents.spans import Span
from safelm.safety import spec as specs
from safelm.safety.embedding import Backbone, load_backbone
from safelm.safety.monitors import fitting, token_states
from safelm.safety.monitors.folder import SavedHead, read_head

KIND = "token"


@dataclasses.dataclass(frozen=True)
class TokenClassifier:
    """A loaded token-level classifier.

    Attributes:
      threshold: the level from which on a token is in a span.
      bridge: spans with at most so many tokens between them become one.
    """

    head: SavedHead
    backbone: Backbone
    threshold: float
    bridge: int = 0

    @property
    def facts(self) -> dict[str, Any]:
        """What its spans depend on, for settings and metadata; never where it lies."""
        return {
            "fingerprint": self.head.identity,
            "threshold": self.threshold,
            "bridge": self.bridge,
            "max_tokens": self.backbone.max_tokens,
            "vocab_hash": self.vocab_hash,
        }

    @property
    def vocab_hash(self) -> str:
        """Of the vocabulary that tokens are counted with."""
        return token_states.vocab_hash(self.backbone)

    def find(self, texts: Sequence[str]) -> list[list[Span]]:
        """The spans of every text, in order.

        A span goes from the first character of its first token to the last of its last. Its label is the harmful score
        that is likeliest over its tokens, its score the mean level.
        """
        windows = token_states.windows(self.backbone, texts)
        shares: list[np.ndarray] = [np.zeros(0)] * len(windows)
        for place, states_LnD in token_states.states(self.backbone, windows, (self.head.layer,)):
            shares[place] = fitting.probabilities(states_LnD[0], self.head.kernel_DC, self.head.bias_C)
        found: list[list[Span]] = [[] for _ in texts]
        by_text: dict[int, list[int]] = {}
        for place, window in enumerate(windows):
            by_text.setdefault(window.text, []).append(place)
        for text, places in by_text.items():
            offsets_N2 = np.concatenate([windows[place].offsets_n2 for place in places])
            shares_NC = np.concatenate([shares[place] for place in places])
            found[text] = list(self._spans(offsets_N2, shares_NC))
        return found

    def _spans(self, offsets_N2: np.ndarray, shares_NC: np.ndarray) -> Iterator[Span]:
        level_N = shares_NC[:, self.head.min_score :].sum(1)
        for first, last in stretches(level_N >= self.threshold, self.bridge):
            start, end = int(offsets_N2[first:last, 0].min()), int(offsets_N2[first:last, 1].max())
            if start >= end:
                continue  # tokens without characters
            score = self.head.min_score + int(shares_NC[first:last, self.head.min_score :].mean(0).argmax())
            yield Span(start, end, KIND, str(score), float(level_N[first:last].mean()), first, last)


def stretches(is_in_N: np.ndarray, bridge: int) -> Iterator[tuple[int, int]]:
    """(first, behind the last) of every run, runs with at most `bridge` others between them together."""
    places = np.flatnonzero(is_in_N)
    if not len(places):
        return
    cuts = np.flatnonzero(np.diff(places) > bridge + 1)
    for first, last in zip([0, *(cuts + 1)], [*cuts, len(places) - 1], strict=True):
        yield int(places[first]), int(places[last]) + 1


@functools.lru_cache(maxsize=1)
def load(spec: str) -> TokenClassifier:
    """The classifier of `FOLDER`, perhaps with `?threshold=P`, `?bridge=TOKENS`, `?backbone=FOLDER`.

    Raises ValueError for another option, a folder of a probe, or where the backbone is another than the one trained on;
    FileNotFoundError where one is missing.
    """
    folder, _, query = spec.partition("?")
    options = specs.options(query, what="token classifier")
    head = read_head(folder)
    threshold, bridge = options.pop("threshold", head.threshold), options.pop("bridge", 0)
    source = options.pop("backbone", head.source)
    if options:
        raise ValueError(f"{spec}: no option {min(options)!r}; there is threshold, bridge, backbone")
    if head.kind != "token":
        raise ValueError(f"{folder}: a {head.kind}, no token-level classifier (train_classifier --unit=token)")
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 <= threshold <= 1:
        raise ValueError(f"{spec}: threshold={threshold!r}: must be a probability")
    if isinstance(bridge, bool) or not isinstance(bridge, int) or bridge < 0:
        raise ValueError(f"{spec}: bridge={bridge!r}: must be a number of tokens, at least 0")
    backbone = load_backbone(source, max_tokens=head.training.get("max_tokens"))
    if not head.reads(backbone.params, token_states.vocab_hash(backbone), token_states.tag_id(backbone)):
        raise ValueError(f"{folder}: trained on another model than {source}: its weights or vocabulary differ")
    return TokenClassifier(head, backbone, float(threshold), bridge)
