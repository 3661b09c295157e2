"""Canaries: planted triggers, secrets and facts at stated doses, what a run saw of them, and what it learned."""
