"""A scorer of the tiny runs' texts, by name."""

from safelm.safety.scorer import Verdict


class Words:
    """5 for a text with letters that only the harmful words of the tiny runs have, otherwise 0."""

    name, fingerprint = "words", "tiny-words-1"

    def score(self, texts):
        return [Verdict(5 if any(letter in text for letter in "zvqxjwfp") else 0) for text in texts]
