"""Measures of safety and capability, each with its interval and the frozen protocol it was taken under."""
