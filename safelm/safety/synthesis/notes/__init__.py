"""Reflections and preflections (arXiv 2606.19168): notes on documents by a constitution of the user's, kept beside
the text."""
