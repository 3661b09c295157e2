"""Errors as clients see them, in OpenAI's form."""

import logging
import reprlib
import traceback
from collections.abc import Mapping
from typing import Any

log = logging.getLogger(__name__)

_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_SHOWN = 80  # characters of a value that an error repeats
_SHORTENED = reprlib.Repr()
_SHORTENED.maxstring = _SHORTENED.maxlong = _SHORTENED.maxother = _SHOWN


class ApiError(Exception):
    """A request that was refused or failed; its message names the field and never contains a text.

    Attributes:
      status: the HTTP status.
      param: the field at fault, dotted if nested ("safelm.num_beams").
      code: a code for programs ("model_not_found").
      headers: extra headers of the reply.
      ends_connection: whether to close the connection after the reply.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
        ends_connection: bool = False,
    ):
        super().__init__(message)
        self.ends_connection = ends_connection
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The JSON object of the reply."""
        kind = _KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def timed_out(message: str) -> ApiError:
    """The error of a request whose time has passed; it would pass again."""
    return ApiError(408, message, code="timeout", headers={"x-should-retry": "false"})


def bad_field(name: str, value: Any, want: str) -> ApiError:
    """The error for a field of the wrong type or outside its bounds."""
    return ApiError(400, f"{name}={shown(value)}: want {want}", param=name)


def shown(value: Any) -> str:
    """A client's value for an error message, short however long or deeply nested it is."""
    text = _SHORTENED.repr(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + ".."


def log_defect(what: str, error: Exception) -> None:
    """Logs a defect's place and exception type, but not its message, which may contain a text."""
    where = "".join(traceback.format_tb(error.__traceback__))
    log.error("%s: %s\n%s", what, type(error).__name__, where.rstrip())
