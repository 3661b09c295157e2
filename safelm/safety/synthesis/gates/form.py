"""Checks that need neither a model nor knowledge of harm: language, length, repetition."""

import collections
import functools
import zlib
from collections.abc import Sequence
from typing import Any

from safelm.safety.synthesis.gate import Bounds, Finding
from safelm.safety.synthesis.gates.settings import GateSettings, fingerprint
from safelm.safety.synthesis.gates.words import Words, ngrams, words
from safelm.safety.synthesis.kinds import Draft, Kind

MAX_LANGUAGE_CHARS = 4000


class Language:
    """Requires the source's language: the one in its metadata, otherwise the one detected in it.

    Languages are detected by py3langid (BSD; a maintained fork of langid.py, Lui and Baldwin 2012), whose model comes
    with the package.
    """

    name, worth_another = "language", True

    def __init__(self, settings: GateSettings):
        self._settings, self._identifier = settings, language_identifier()
        fields = "language_confidence language_words"
        self.fingerprint = fingerprint(self.name, 1, settings, fields, library=_langid_version())

    def check(self, drafts: Sequence[Draft]) -> list[Finding]:
        """Reasons for failure: "another_language", "unclear_language"."""
        return [self._check(draft) for draft in drafts]

    def _check(self, draft: Draft) -> Finding:
        if len(words(draft.text)) < self._settings.language_words:
            return Finding(self.name, True, values={"language": ""})
        language, confidence = self._identifier.classify(draft.text[:MAX_LANGUAGE_CHARS])
        expected = self._expected(draft)
        reason = ""
        if confidence < self._settings.language_confidence:
            reason = "unclear_language"
        elif expected and language != expected:
            reason = "another_language"
        return Finding(self.name, not reason, reason, {"language": language, "language_confidence": confidence})

    def _expected(self, draft: Draft) -> str:
        """Two letters; "" if the source's language is unknown and unclear."""
        if named := draft.source.named("language"):
            code = named.replace("_", "-").split("-")[0].lower()
            code = _ISO_639_3.get(code, code)
            if code in self._identifier.labels:
                return code
        language, confidence = self._identifier.classify(draft.source.text[:MAX_LANGUAGE_CHARS])
        return language if confidence >= self._settings.language_confidence else ""


# Web corpora name languages by two letters, or by three and a script ("eng_Latn").
_ISO_639_3 = {
    "eng": "en",
    "deu": "de",
    "fra": "fr",
    "spa": "es",
    "por": "pt",
    "ita": "it",
    "nld": "nl",
    "rus": "ru",
    "pol": "pl",
    "ces": "cs",
    "tur": "tr",
    "jpn": "ja",
    "cmn": "zh",
    "zho": "zh",
    "kor": "ko",
    "arb": "ar",
    "ara": "ar",
    "hin": "hi",
    "ind": "id",
    "vie": "vi",
    "ukr": "uk",
    "swe": "sv",
    "dan": "da",
    "fin": "fi",
    "ell": "el",
    "ron": "ro",
    "hun": "hu",
    "fas": "fa",
    "heb": "he",
    "tha": "th",
}


@functools.cache
def language_identifier() -> Any:
    """py3langid's identifier; `classify(text)` gives (code, confidence). Raises OSError if it is not installed."""
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ModuleNotFoundError as error:
        raise OSError("detecting languages needs py3langid: scripts/install.sh synthesis") from error
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def _langid_version() -> str:
    import importlib.metadata

    return importlib.metadata.version("py3langid")


class Length:
    """Rejects drafts that are too short, too long or cut off; SafeWeb's limits depend on the source's length."""

    name, worth_another = "length", True

    def __init__(self, settings: GateSettings):
        self._settings = settings
        fields = "min_words max_words min_length_ratio max_length_ratio short_source_words"
        self.fingerprint = fingerprint(self.name, 1, settings, fields)

    def check(self, drafts: Sequence[Draft]) -> list[Finding]:
        """Reasons for failure: "empty", "cut", "too_short", "too_long", "shorter_than_source", "longer_than_source"."""
        return [self._check(draft) for draft in drafts]

    def limits(self, kind: Kind) -> dict[str, Bounds]:
        """(least, most) that passes, by the value's name."""
        limits = self._settings
        found: dict[str, Bounds] = {"words": (limits.min_words, limits.max_words)}
        if kind == "safeweb":
            found["length_ratio"] = (limits.min_length_ratio, limits.max_length_ratio)
        return found

    def _check(self, draft: Draft) -> Finding:
        limits, count, source = self._settings, len(words(draft.text)), len(words(draft.source.text))
        ratio = count / max(source, 1)
        ends = draft.kind == "safeweb"  # the others carry over a topic, whatever the source's length
        reasons = {
            "empty": count == 0,
            "cut": draft.is_cut,
            "too_short": count < limits.min_words,
            "too_long": count > limits.max_words,
            "shorter_than_source": ends and ratio < limits.min_length_ratio,
            "longer_than_source": ends and count > limits.max_length_ratio * max(source, limits.short_source_words),
        }
        reason = next((name for name, applies in reasons.items() if applies), "")
        return Finding(self.name, not reason, reason, {"words": count, "length_ratio": ratio})


class Repetition:
    """Rejects drafts that repeat themselves, by repeated lines and n-grams and by how well they compress.

    Measures and limits for lines and n-grams are from Rae et al. 2021 (Gopher), appendix A.1.1 and table A1. Repeated
    n-grams count from their second occurrence, each character once. Speaker labels of a dialogue don't count as words.
    """

    name, worth_another = "repetition", True

    def __init__(self, settings: GateSettings):
        self._settings = settings
        fields = "repetition_words max_duplicate_lines max_top_ngram max_duplicate_ngrams max_compression"
        self.fingerprint = fingerprint(self.name, 1, settings, fields)

    def check(self, drafts: Sequence[Draft]) -> list[Finding]:
        """Reasons for failure: "repeated_lines", "repeated_ngrams", "frequent_ngram", "compresses_too_well"."""
        return [self._check(draft) for draft in drafts]

    def _check(self, draft: Draft) -> Finding:
        limits, text, found = self._settings, draft.text, words(draft.text)
        if len(found) < limits.repetition_words:
            return Finding(self.name, True)
        compression = len(text.encode("utf-8", "surrogatepass")) / len(zlib.compress(text.encode("utf-8", "replace")))
        lines = _duplicate_lines(text)
        tops = [_top_ngram(found, n) for n in range(2, 2 + len(limits.max_top_ngram))]
        duplicates = [_duplicate_ngrams(found, n) for n in range(5, 5 + len(limits.max_duplicate_ngrams))]
        reasons = {
            "repeated_lines": lines > limits.max_duplicate_lines,
            "frequent_ngram": any(t > limit for t, limit in zip(tops, limits.max_top_ngram, strict=True)),
            "repeated_ngrams": any(d > limit for d, limit in zip(duplicates, limits.max_duplicate_ngrams, strict=True)),
            "compresses_too_well": compression > limits.max_compression,
        }
        reason = next((name for name, applies in reasons.items() if applies), "")
        values = {"duplicate_lines": lines, "duplicate_5grams": duplicates[0] if duplicates else 0.0}
        return Finding(self.name, not reason, reason, values | {"compression": compression})


def _duplicate_lines(text: str) -> float:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return 1 - len(set(lines)) / len(lines) if len(lines) > 1 else 0.0


def _characters(found: Words) -> int:
    return max(sum(map(len, found.words)), 1)


def _top_ngram(found: Words, n: int) -> float:
    """Share of characters in the most frequent n-gram, if it occurs at least twice."""
    counts = ngrams(found.words, n)
    times = max(counts.values(), default=0)
    if times < 2:
        return 0.0
    longest = max(sum(map(len, gram)) for gram, count in counts.items() if count == times)
    return longest * times / _characters(found)


def _duplicate_ngrams(found: Words, n: int) -> float:
    """Share of characters in n-grams that occurred before."""
    seen: collections.Counter[tuple[str, ...]] = collections.Counter()
    repeated = [False] * len(found)
    for start in range(len(found) - n + 1):
        gram = found.words[start : start + n]
        if seen[gram]:
            repeated[start : start + n] = [True] * n
        seen[gram] += 1
    covered = sum(len(word) for word, is_repeated in zip(found.words, repeated, strict=True) if is_repeated)
    return covered / _characters(found)
