"""Prompts: public benchmarks in their makers' columns, prompts they share, suites."""
