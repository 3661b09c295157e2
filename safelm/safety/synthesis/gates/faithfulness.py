"""Checks that a draft is about its source and no copy of it, by similarity and by shared names and numbers."""

import collections
import itertools
import re
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from safelm.safety.synthesis.gate import Bounds, Finding
from safelm.safety.synthesis.gates.settings import GateSettings, fingerprint
from safelm.safety.synthesis.gates.words import words
from safelm.safety.synthesis.kinds import Draft, Kind

_NUMBER = re.compile(r"(?<![\w.])\d[\d.,:/]*")
_DIGITS = re.compile(r"\d+")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3})")
_NAME = re.compile(r"(?<=[a-z0-9,;:)] )[A-Z][\w'’-]+(?: [A-Z][\w'’-]+)*")
_MOST_NAMES = 1000  # of a text: the first ones decide
_ORDINAL_WORDS = frozenset({"I", "I'm", "I've", "I'd", "I'll"})


@runtime_checkable
class Similarity(Protocol):
    """Measures how similar two texts are, from -1 or 0 to 1.

    `is_embedding` decides which limits of GateSettings apply.
    """

    name: str
    fingerprint: str
    is_embedding: bool

    def compare(self, sources: Sequence[str], texts: Sequence[str]) -> Float[np.ndarray, " N"]:
        """The similarity of each pair."""
        ...


class EmbeddingSimilarity:
    """Cosine of the mean embeddings of two texts' chunks.

    Args:
      embedder: a `safelm.safety.embedding.Embedder`, e.g. of MiniLM or SmolLM2.
    """

    is_embedding = True

    def __init__(self, embedder: Any):
        self._embedder = embedder
        self.name, self.fingerprint = embedder.backbone.name, embedder.backbone.fingerprint

    def compare(self, sources: Sequence[str], texts: Sequence[str]) -> Float[np.ndarray, " N"]:
        """The cosine of each pair; 0 if a text's embedding is zero."""
        both = [*sources, *texts]
        embedding_CD, text_C = self._embedder.embed(both)
        sum_ND = np.zeros((len(both), embedding_CD.shape[1]), np.float64)
        norm_C1 = np.linalg.norm(embedding_CD, axis=1, keepdims=True)
        np.add.at(sum_ND, text_C, embedding_CD / np.maximum(norm_C1, 1e-9))
        return _cosines(sum_ND[: len(sources)], sum_ND[len(sources) :])


class WordSimilarity:
    """Cosine of word counts on a log scale, without the most common English words.

    Needs no model and ignores meaning.
    """

    name, is_embedding = "words", False
    fingerprint = "words-1"

    def compare(self, sources: Sequence[str], texts: Sequence[str]) -> Float[np.ndarray, " N"]:
        """The cosine of each pair; 0 if a text has no words left."""
        return np.array([self._cosine(source, text) for source, text in zip(sources, texts, strict=True)])

    @staticmethod
    def _cosine(source: str, text: str) -> float:
        counts = [
            {word: 1 + np.log(count) for word, count in collections.Counter(words(one).words).items() if len(word) > 3}
            for one in (source, text)
        ]
        dot = sum(weight * counts[1].get(word, 0.0) for word, weight in counts[0].items())
        norms = [sum(weight**2 for weight in one.values()) ** 0.5 for one in counts]
        return float(dot / (norms[0] * norms[1])) if all(norms) else 0.0


def load_similarity(backbone: str | None) -> Similarity:
    """Similarity by a backbone ("minilm", "smollm2", a folder), or by words for None."""
    if backbone is None:
        return WordSimilarity()
    from safelm.safety import embedding

    return EmbeddingSimilarity(embedding.Embedder(embedding.load_backbone(backbone)))


class Faithfulness:
    """Requires a draft about the same topic as its source: too low a similarity is another text, too high a copy.

    SafeWeb keeps facts, so it must keep some of the source's names and numbers and invent no numbers. RefuseWeb and
    Moral Education carry over the topic, so they must not pass on its details. A name is a capitalised word within a
    sentence, a rough rule for English; sources with few names are not judged by them. A name or number is kept if it
    occurs anywhere in the draft.
    """

    name, worth_another = "faithfulness", True

    def __init__(self, settings: GateSettings, similarity: Similarity):
        self._settings, self._similarity = settings, similarity
        fields = "min_similarity min_topic_similarity max_similarity min_word_similarity min_topic_word_similarity "
        fields += "max_word_similarity min_details max_details min_details_counted max_new_numbers"
        self.fingerprint = fingerprint(self.name, 1, settings, fields, similarity=similarity.fingerprint)

    def limits(self, kind: Kind) -> dict[str, Bounds]:
        """(least, most) that passes, by the value's name."""
        kept = (self._settings.min_details, None) if kind == "safeweb" else (None, self._settings.max_details)
        return {"similarity": self._bounds(kind == "safeweb"), "details_kept": kept}

    def check(self, drafts: Sequence[Draft]) -> list[Finding]:
        """Reasons for failure: "another_text", "near_copy", "details_lost", "details_kept", "numbers_invented"."""
        cosines_N = self._similarity.compare([draft.source.text for draft in drafts], [draft.text for draft in drafts])
        return [self._finding(draft, float(cosine)) for draft, cosine in zip(drafts, cosines_N, strict=True)]

    def _finding(self, draft: Draft, cosine: float) -> Finding:
        limits, keeps_facts = self._settings, draft.kind == "safeweb"
        low, high = self._bounds(keeps_facts)
        there = details(draft.source.text)
        kept = _share_kept(there, draft.text)
        judged = len(there) >= limits.min_details_counted
        new_numbers = _share_new(draft)
        wrong = {
            "another_text": cosine < low,
            "near_copy": cosine > high,
            "details_lost": judged and keeps_facts and kept < limits.min_details,
            "details_kept": judged and not keeps_facts and kept > limits.max_details,
            "numbers_invented": keeps_facts and new_numbers > limits.max_new_numbers,
        }
        reason = next((name for name, applies in wrong.items() if applies), "")
        values = {"similarity": cosine, "similarity_by": self._similarity.name, "new_numbers": new_numbers}
        return Finding(self.name, not reason, reason, values | ({"details_kept": kept} if there else {}))

    def _bounds(self, keeps_facts: bool) -> tuple[float, float]:
        limits = self._settings
        if self._similarity.is_embedding:
            return (limits.min_similarity if keeps_facts else limits.min_topic_similarity), limits.max_similarity
        low = limits.min_word_similarity if keeps_facts else limits.min_topic_word_similarity
        return low, limits.max_word_similarity


def details(text: str) -> set[str]:
    """The first names and all numbers of a text, normalised: "2,500" and "2500" are equal, "New York" is one name."""
    names = (match[0].casefold() for match in _NAME.finditer(text) if match[0] not in _ORDINAL_WORDS)
    return set(itertools.islice(names, _MOST_NAMES)) | numbers(text)


def numbers(text: str) -> set[str]:
    """Numbers with at least two digits, without thousands separators."""
    found = {_THOUSANDS.sub("", match[0]).rstrip(".,:/") for match in _NUMBER.finditer(text)}
    return {number for number in found if len(number) > 1}


def _share_kept(there: set[str], text: str) -> float:
    if not there:
        return 1.0
    here, folded = numbers(text), text.casefold()
    return sum(detail in here or (not detail[0].isdigit() and detail in folded) for detail in there) / len(there)


def _share_new(draft: Draft) -> float:
    """Share of the draft's numbers that its source lacks; 0 for fewer than two numbers."""
    own, there = numbers(draft.text), set(_DIGITS.findall(_THOUSANDS.sub("", draft.source.text)))
    new = {number for number in own if not there.issuperset(_DIGITS.findall(number))}
    return len(new) / len(own) if len(new) > 1 else 0.0


def _cosines(a_ND: Float[np.ndarray, "N D"], b_ND: Float[np.ndarray, "N D"]) -> Float[np.ndarray, " N"]:
    norms_N = np.linalg.norm(a_ND, axis=1) * np.linalg.norm(b_ND, axis=1)
    return np.where(norms_N > 0, np.einsum("nd,nd->n", a_ND, b_ND) / np.maximum(norms_N, 1e-12), 0.0)
