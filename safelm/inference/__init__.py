"""Decodes many prompts at once: greedy decoding, sampling, beam search and SafeBeam."""

from safelm.inference.continuations import ContinuationScore, score_continuations
from safelm.inference.decode import Generation, generate, run_all
from safelm.inference.engine import Engine
from safelm.inference.knobs import Knob, read_knob
from safelm.inference.methods import AnyDepth, Beam, Greedy, Method, SafeBeam, Sampling, SelfStop, TagPenalty
from safelm.inference.planning import planner
from safelm.inference.requests import EngineRequest, TraceCandidate, Update
from safelm.inference.tag_probability import tag_probability
from safelm.inference.until import generate_until

__all__ = [
    "AnyDepth",
    "Beam",
    "ContinuationScore",
    "Engine",
    "EngineRequest",
    "Generation",
    "Greedy",
    "Knob",
    "Method",
    "SafeBeam",
    "Sampling",
    "SelfStop",
    "TagPenalty",
    "TraceCandidate",
    "Update",
    "generate",
    "generate_until",
    "planner",
    "read_knob",
    "run_all",
    "score_continuations",
    "tag_probability",
]
