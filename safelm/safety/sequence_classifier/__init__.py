"""Published Hugging Face sequence classifiers as harm scorers: one encoder, their heads, a table of their labels."""

from safelm.safety.sequence_classifier.scorer import SequenceClassifier, load

__all__ = ["SequenceClassifier", "load"]
