"""All limits of the gates with their defaults and origins."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from safelm.io import records


@dataclasses.dataclass(frozen=True)
class GateSettings:
    """Limits of the gates. A word is a run of letters and digits; an upper limit is the largest value that passes.

    Attributes:
      language_confidence: below it the draft's language counts as unclear and fails (mixed or broken text).
      language_words: a shorter draft's language is not judged.
      min_words, max_words: of a draft.
      min_length_ratio, max_length_ratio: words of a SafeWeb draft over words of its source; for the upper limit a
        source has at least `short_source_words`, since a style needs room.
      repetition_words: a shorter draft is not judged for repetition.
      max_duplicate_lines: share of lines that occurred before; 0.30 in Rae et al. 2021, table A1 (Gopher).
      max_top_ngram: share of characters in the most frequent n-gram, for n = 2, 3, 4; same table.
      max_duplicate_ngrams: share of characters in n-grams that occurred before, for n = 5 to 10; same table.
      max_compression: bytes over their zlib size; prose has about 2, a repeated sentence 10 or more.
      max_score: highest harm score of a SafeWeb or Moral Education text, by the paper's method.
      max_sentence_score: highest score of any sentence alone.
      max_answer_score: highest score of a refusal, read without the request.
      max_request_score: highest score of the request in a RefuseWeb dialogue; it names a harm, so it is not 0.
      max_request_hits: harmful n-grams (the report card's queries) in the request.
      max_request_copied_words: longest run of the source's words in the request.
      max_request_words: longest request.
      min_refusal_parts: how many of acknowledge, cannot, why, alternative the first answer needs; "cannot" and "why"
        are always needed. Default 3, since an alternative isn't always apt.
      min_similarity, min_topic_similarity, max_similarity: bounds of the cosine of source and draft by an embedder;
        `min_topic_similarity` is for RefuseWeb and Moral Education, which carry over only the topic.
      min_word_similarity, min_topic_word_similarity, max_word_similarity: the same for similarity by words, without an
        embedder.
      min_details: share of the source's names and numbers that a SafeWeb draft must keep.
      max_details: largest such share for RefuseWeb and Moral Education, which must not pass on details.
      min_details_counted: a source with fewer distinct names and numbers is not judged by them.
      max_new_numbers: largest share of a SafeWeb draft's numbers that its source lacks (invented facts).
      copied_words: shortest run of the source's words that is a copy and must not be harmful by its score.
      copied_query_words: shortest run that must not contain a harmful n-gram.
      max_copied_score: highest harm score of a copied run.
      max_copied_share: share of the draft's words in copied runs.
      note_words: least words of a note in each voice.
      note_shared_words: least words of five letters and more that a note has in common with the text before it.
      max_note_new_details: largest number of names and numbers in a note that the text before it lacks.
      note_copied_words: `copied_words` and, at most, `copied_query_words` of notes: a quotation.
      max_note_copied_share: `max_copied_share` of notes.
      leaked_words: shortest run of the prompt's words that is a leak.
      duplicate_threshold: estimated Jaccard similarity of word 5-grams from which two drafts are near-duplicates; 0.7
        to 0.8 in most published web corpora.
    """

    language_confidence: float = 0.5
    language_words: int = 12
    min_words: int = 25
    max_words: int = 4000
    min_length_ratio: float = 0.3
    max_length_ratio: float = 4.0
    short_source_words: int = 100
    repetition_words: int = 50
    max_duplicate_lines: float = 0.30
    max_top_ngram: tuple[float, ...] = (0.20, 0.18, 0.16)
    max_duplicate_ngrams: tuple[float, ...] = (0.15, 0.14, 0.13, 0.12, 0.11, 0.10)
    max_compression: float = 4.0
    max_score: int = 1
    max_sentence_score: int = 1
    max_answer_score: int = 2
    max_request_score: int = 4
    max_request_hits: int = 2
    max_request_copied_words: int = 15
    max_request_words: int = 120
    min_refusal_parts: int = 3
    min_similarity: float = 0.45
    min_topic_similarity: float = 0.2
    max_similarity: float = 0.985
    min_word_similarity: float = 0.1
    min_topic_word_similarity: float = 0.02
    max_word_similarity: float = 0.95
    min_details: float = 0.2
    max_details: float = 0.6
    min_details_counted: int = 4
    max_new_numbers: float = 0.5
    copied_words: int = 12
    copied_query_words: int = 6
    max_copied_score: int = 1
    max_copied_share: float = 0.8
    note_words: int = 8
    note_shared_words: int = 2
    max_note_new_details: int = 0
    note_copied_words: int = 5
    max_note_copied_share: float = 0.5
    leaked_words: int = 12
    duplicate_threshold: float = 0.7

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            values = getattr(self, field.name)
            for value in values if isinstance(values, tuple) else (values,):
                if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
                    raise ValueError(f"gate settings: {field.name}={value!r} is no number of at least 0")
        for low, high in _ORDERED:
            if getattr(self, low) > getattr(self, high):
                raise ValueError(f"gate settings: {low}={getattr(self, low)} is above {high}={getattr(self, high)}")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> "GateSettings":
        """The defaults with some values changed. Raises ValueError for an unknown name."""
        names = {field.name for field in dataclasses.fields(cls)}
        if unknown := values.keys() - names:
            raise ValueError(f"gate settings: no setting {min(unknown)!r}; there are {', '.join(sorted(names))}")
        return cls(**{name: _typed(name, getattr(cls, name), value) for name, value in values.items()})


def _typed(name: str, default: Any, value: Any) -> Any:
    """The value in its default's type.

    Raises ValueError for a list in place of a number, or a fraction in place of an integer.
    """
    if isinstance(default, tuple):
        return tuple(map(float, value if isinstance(value, list | tuple) else [value]))
    if isinstance(value, list | tuple) or (isinstance(default, int) and value != int(value)):
        raise ValueError(
            f"gate settings: {name}={value!r}: expected {'one' if isinstance(default, float) else 'a whole'} number"
        )
    return value if isinstance(value, bool) else type(default)(value)


_ORDERED = (
    ("min_words", "max_words"),
    ("min_length_ratio", "max_length_ratio"),
    ("min_similarity", "max_similarity"),
    ("min_topic_similarity", "max_similarity"),
    ("min_word_similarity", "max_word_similarity"),
    ("min_topic_word_similarity", "max_word_similarity"),
)


def fingerprint(name: str, version: int, settings: GateSettings, fields: str = "", **parts: str) -> str:
    """SHA-256 (hex) of a gate's name, code version, settings and other dependencies.

    Args:
      fields: names of the settings, separated by spaces.
      parts: fingerprints and versions of scorers, embedders, queries, libraries.
    """
    facts = [name, version, {field: getattr(settings, field) for field in fields.split()}, parts]
    return records.fingerprint(facts)
