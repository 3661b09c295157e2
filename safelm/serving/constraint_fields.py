"""Reads the fields of a request that change which tokens are chosen: `logit_bias`, penalties, `response_format`."""

import json
import re
from collections.abc import Mapping
from typing import Any

from safelm.inference.adjustments import MOST_BIASED, Adjustment, takes_adjustments
from safelm.inference.methods import METHODS, Method, is_planned
from safelm.inference.token_mask import check_method
from safelm.io import records
from safelm.serving.errors import ApiError, bad_field, shown
from safelm.serving.fields import Fields

_MOST_BIAS, _MOST_PENALTY = 100.0, 2.0  # nats, OpenAI's bounds
_LARGEST_SCHEMA = 64 * 1024  # characters
Schema = Mapping[str, Any]


def read_adjustment(fields: Fields, method: Method) -> Adjustment:
    """Takes `logit_bias`, `presence_penalty` and `frequency_penalty`; a method that can't take them is named."""
    presence, frequency = (
        fields.number(name, -_MOST_PENALTY, _MOST_PENALTY) or 0.0 for name in ("presence_penalty", "frequency_penalty")
    )
    adjustment = Adjustment(_read_bias(fields), presence, frequency)
    given = {"logit_bias": adjustment.logit_bias, "presence_penalty": presence, "frequency_penalty": frequency}
    for name, value in given.items():
        is_counted = name != "logit_bias"  # over the new text, which a planned method makes in pieces
        if value and (not takes_adjustments(method) or (is_counted and is_planned(method))):
            raise ApiError(400, f"{name}: method {_name_of(method)} does not take it", param=name)
    return adjustment


def read_response_format(fields: Fields, method: Method) -> Schema | None:
    """Takes `response_format`: a JSON schema that the text must keep to; None for any text."""
    own = fields.object("response_format")
    kind = own.choice("type", ("text", "json_object", "json_schema"))
    named = own.object("json_schema")
    if kind != "json_schema":
        named.refuse_rest()
    own.refuse_rest()
    if kind in (None, "text"):
        return None
    try:
        check_method(method)
    except ValueError:
        message = f"response_format: method {_name_of(method)} does not take it; want greedy or sample"
        raise ApiError(400, message, param="response_format") from None
    return {"type": "object"} if kind == "json_object" else _read_schema(named)


def _read_schema(named: Fields) -> Schema:
    named.text("name")
    named.text("description")
    named.flag("strict")
    schema, where = named.take("schema"), named.name_of("schema")
    named.refuse_rest()
    if not isinstance(schema, dict):
        raise ApiError(400, f"{where}: want an object", param=where)
    try:
        records.check_depth(schema, where)
    except ValueError as error:
        raise ApiError(400, str(error), param=where) from None
    if len(json.dumps(schema)) > _LARGEST_SCHEMA:
        raise ApiError(400, f"{where}: longer than {_LARGEST_SCHEMA} characters", param=where)
    return schema


def _read_bias(fields: Fields) -> tuple[tuple[int, float], ...]:
    own = fields.take("logit_bias")
    if own is None:
        return ()
    if not isinstance(own, dict) or len(own) > MOST_BIASED:
        raise ApiError(
            400, f"logit_bias: want an object of at most {MOST_BIASED} token ids and numbers", param="logit_bias"
        )
    found: dict[int, float] = {}
    for key, value in own.items():
        if not re.fullmatch(r"0|[1-9][0-9]{0,9}", key):
            raise ApiError(400, f"logit_bias: {shown(key)}: want a token id", param="logit_bias")
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not -_MOST_BIAS <= value <= _MOST_BIAS:
            raise bad_field(f"logit_bias.{key}", value, f"a number from {-_MOST_BIAS:g} to {_MOST_BIAS:g}")
        found[int(key)] = float(value)
    return tuple((token, bias) for token, bias in found.items() if bias)


def _name_of(method: Method) -> str:
    return next(name for name, kind in METHODS.items() if isinstance(method, kind))
