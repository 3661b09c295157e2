"""Decoding: greedy, sampling, beam search and SafeBeam, each one compiled program over a batch of prompts."""

from safelm.inference.continuations import ContinuationScore, score_continuations
from safelm.inference.decode import Generation, generate
from safelm.inference.methods import Beam, Greedy, Method, SafeBeam, Sampling, TagPenaltySampling
from safelm.inference.tag_probability import tag_probability
from safelm.inference.until import generate_until

__all__ = [
    "Beam",
    "ContinuationScore",
    "Generation",
    "Greedy",
    "Method",
    "SafeBeam",
    "Sampling",
    "TagPenaltySampling",
    "generate",
    "generate_until",
    "score_continuations",
    "tag_probability",
]
