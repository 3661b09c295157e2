"""A harm classifier of single words and the character n-grams inside them: numpy alone, thousands of pages a second.

Weights of one come with the package: `load_bundled`, what `safelm.score` takes where no scorer is named.
"""

from safelm.safety.ngrams.scorer import NgramScorer, is_ngrams, load, load_bundled

__all__ = ["NgramScorer", "is_ngrams", "load", "load_bundled"]
