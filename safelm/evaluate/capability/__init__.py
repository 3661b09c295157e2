"""The nine capability tasks of Maini et al. 2025 (table 1) through lm-evaluation-harness, on local files."""
