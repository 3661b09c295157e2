"""Decoding: greedy, sampling, beam search and SafeBeam, each one compiled program over a batch of prompts."""

from safelm.inference.decode import Generation, generate
from safelm.inference.methods import Beam, Greedy, Method, SafeBeam, Sampling, TagPenaltySampling
from safelm.inference.tag_probability import tag_probability

__all__ = [
    "Beam",
    "Generation",
    "Greedy",
    "Method",
    "SafeBeam",
    "Sampling",
    "TagPenaltySampling",
    "generate",
    "tag_probability",
]
