"""The embedding classifier of harm: an embedder and a linear head over the six scores (Maini et al. 2025, 3.1)."""

from safelm.safety.classifier.harm_classifier import Classifier, highest, load
from safelm.safety.classifier.labels import LABEL_TABLE
from safelm.safety.classifier.training import Recipe, train

__all__ = ["LABEL_TABLE", "Classifier", "Recipe", "highest", "load", "train"]
