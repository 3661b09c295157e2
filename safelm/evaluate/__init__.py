"""Measures safety and capability; every figure has an interval and the frozen protocol under which it was taken."""
