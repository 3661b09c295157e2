"""Decodes many prompts at once: greedy decoding, sampling, beam search and SafeBeam."""

from safelm.inference.continuations import ContinuationScore, score_continuations
from safelm.inference.decode import Generation, generate, run_all
from safelm.inference.engine import Engine
from safelm.inference.methods import Beam, Greedy, Method, SafeBeam, Sampling, TagPenalty
from safelm.inference.requests import EngineRequest, TraceCandidate, Update
from safelm.inference.tag_probability import tag_probability
from safelm.inference.until import generate_until

__all__ = [
    "Beam",
    "ContinuationScore",
    "Engine",
    "EngineRequest",
    "Generation",
    "Greedy",
    "Method",
    "SafeBeam",
    "Sampling",
    "TagPenalty",
    "TraceCandidate",
    "Update",
    "generate",
    "generate_until",
    "run_all",
    "score_continuations",
    "tag_probability",
]
