"""Reads the `safelm` object of a request: the decoding method with its settings, and what to report."""

import dataclasses
from typing import Any

from safelm.inference.methods import METHODS, Method, draws, settings_of
from safelm.serving.errors import ApiError
from safelm.serving.fields import Fields
from safelm.serving.limits import Limits

_PENALTY_MOST = 1000.0  # nats
_TEMPERATURE_MOST = 2.0
_CHECK_LEAST, _RETHINK_MOST = 8, 64  # tokens: every look reads the answer anew


@dataclasses.dataclass(frozen=True)
class Steering:
    """A request's settings beyond the OpenAI API.

    Attributes:
      stop_above: ends the text before the first token with a higher P(tag); 1 never ends it.
      want_trace: whether to report every candidate of every step (beam search and SafeBeam).
    """

    method: Method
    stop_above: float
    want_trace: bool


def read_steering(fields: Fields, limits: Limits, *, default_method: str) -> Steering:
    """Takes `temperature`, `top_p` and the `safelm` object out of a request's fields.

    Without `safelm.method` the server's default method is used; if that is "sample", a temperature of 0 means greedy.
    Every other method that draws refuses it: greedy would take the likeliest token unsteered. A default method without
    randomness ignores temperature and top_p, which clients send unasked. A method that the request names without
    randomness refuses them.
    """
    temperature = fields.number("temperature", 0.0, _TEMPERATURE_MOST)
    top_p = fields.number("top_p", 0.0, 1.0)
    own = fields.object("safelm")
    named = own.choice("method", tuple(METHODS))
    name = named or default_method
    if temperature == 0 and draws(METHODS[name]):
        if named is not None or name != "sample":
            method = f"{own.name_of('method')}={named}" if named else f"the server's method {name}"
            raise ApiError(400, f"temperature=0.0: {method} draws; ask for greedy instead", param="temperature")
        name = "greedy"
    settings = _settings(own, limits)
    stop_above, want_trace = own.number("stop_above", 0.0, 1.0), own.flag("want_trace")
    own.refuse_rest()
    drawing = {"temperature": temperature, "top_p": top_p}
    if draws(METHODS[name]):
        settings |= {key: value for key, value in drawing.items() if value is not None}
    elif named is not None:
        for key, value in drawing.items():
            if value is not None and value != (0.0 if key == "temperature" else 1.0):
                raise ApiError(400, f"{key}={value}: {own.name_of('method')}={named} does not draw", param=key)
    if want_trace and name not in ("beam", "safe_beam"):
        raise ApiError(
            400,
            f"{own.name_of('want_trace')}: method {name} has no candidates to show; want beam or safe_beam",
            param=own.name_of("want_trace"),
        )
    return Steering(_build(name, settings, own), 1.0 if stop_above is None else stop_above, want_trace)


def _settings(own: Fields, limits: Limits) -> dict[str, Any]:
    """All settings given, whichever method they belong to."""
    read = {
        "num_beams": own.integer("num_beams", 1, limits.beams),
        "num_candidates": own.integer("num_candidates", 1, limits.candidates),
        "drop_fraction": own.number("drop_fraction", 0.0, 0.99),
        "drop_above": own.number("drop_above", 0.0, 1.0),
        "anchor": own.number("anchor", 0.0, 1.0),
        "length_penalty": own.number("length_penalty", 0.0, 10.0),
        "top_k": own.integer("top_k", 0, 2**31 - 1),
        "threshold": own.number("threshold", 0.0, 1.0),
        "penalty": own.number("penalty", 0.0, _PENALTY_MOST),
        "check_every": own.integer("check_every", _CHECK_LEAST, 2**31 - 1),
        "rethink_tokens": own.integer("rethink_tokens", 1, _RETHINK_MOST),
        "tag_candidate": own.choice("tag_candidate", ("mask", "stop", "allow")),
    }
    return {name: value for name, value in read.items() if value is not None}


def _build(name: str, settings: dict[str, Any], own: Fields) -> Method:
    known = settings_of(name)
    for setting in settings:
        if setting not in known:
            raise ApiError(400, f"{own.name_of(setting)}: method {name} does not take it", param=own.name_of(setting))
    try:
        return METHODS[name](**settings)
    except ValueError as error:
        raise ApiError(400, str(error), param="safelm") from None
