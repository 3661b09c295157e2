"""Prompts: public benchmarks in their published columns, prompts that they share, suites."""
