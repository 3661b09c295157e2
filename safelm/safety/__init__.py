"""Scores documents for harm, rewrites them and reports on corpora, all from text to text. Independent of training."""
