"""SafeLM: safety pretraining of language models in JAX.

    lm = safelm.load("runs/quickstart/safety")
    lm.generate("How to log autumn rain", safelm.SafeBeam(), max_new_tokens=40).text
    lm.tag_probabilities("How to log autumn rain")

Importing this loads neither JAX nor TensorFlow: what is below is imported when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from safelm import xla_flags

if TYPE_CHECKING:
    from safelm.api import load_scorer, report_card, score
    from safelm.inference.knobs import Knob, read_knob
    from safelm.inference.methods import AnyDepth, Beam, Greedy, SafeBeam, Sampling, SelfStop, TagPenalty
    from safelm.lm import Completion, LanguageModel, load
    from safelm.safety.monitors.loading import load_monitor
    from safelm.tags import HARM_TAG
    from safelm.text.harm_tags import inject_harm_tag, remove_harm_tags

__all__ = [
    "HARM_TAG",
    "AnyDepth",
    "Beam",
    "Completion",
    "Greedy",
    "Knob",
    "LanguageModel",
    "SafeBeam",
    "Sampling",
    "SelfStop",
    "TagPenalty",
    "inject_harm_tag",
    "load",
    "load_monitor",
    "load_scorer",
    "read_knob",
    "remove_harm_tags",
    "report_card",
    "score",
]

_COMMANDS = ("report_card", "score")  # modules that can be called: `safelm.cli.make_callable`
_MODULE_OF = {
    "HARM_TAG": "tags",
    **dict.fromkeys(
        ("AnyDepth", "Beam", "Greedy", "SafeBeam", "Sampling", "SelfStop", "TagPenalty"), "inference.methods"
    ),
    **dict.fromkeys(("Knob", "read_knob"), "inference.knobs"),
    **dict.fromkeys(("Completion", "LanguageModel", "load"), "lm"),
    **dict.fromkeys(("inject_harm_tag", "remove_harm_tags"), "text.harm_tags"),
    "load_monitor": "safety.monitors.loading",
    "load_scorer": "api",
}

xla_flags.guard_cpu_reductions()  # here, because every command and library use imports this before XLA starts


def __getattr__(name: str) -> Any:
    if name in _COMMANDS:
        return importlib.import_module(f"safelm.{name}")
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"safelm.{_MODULE_OF[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
