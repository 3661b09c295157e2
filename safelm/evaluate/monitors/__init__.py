"""Compares monitors at equal cost: what they tell of prompts, answers and tokens, how late, and at which cost."""
