"""The page of `safelm.label`: one annotator's documents, one at a time, on this machine only."""

import json
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

from safelm.safety.classifier.harm_kinds import KINDS
from safelm.safety.labelling.journal import MAX_NOTE_CHARACTERS
from safelm.safety.labelling.session import Session, StaleError
from safelm.serving import access, static_files
from safelm.serving.errors import ApiError, bad_field
from safelm.serving.fields import Fields, read_body
from safelm.serving.listening import Listener, listening, told_to_end
from safelm.serving.metrics import Metrics
from safelm.tags import MAX_SCORE, MIN_SCORE

log = logging.getLogger(__name__)
HOST = "127.0.0.1"
_BODY_BYTES, _SECONDS, _CONNECTIONS = 64 << 10, 15.0, 64
_SHARED = ("playground.css", "icon.svg", "elements.js")  # with the playground


class LabelRoutes:
    """The page's paths; each answers with what to show next."""

    def __init__(self, session: Session):
        self._session = session

    def routes(self) -> list[web.RouteDef]:
        """Every path, the page's files included."""
        shared = [
            route for route in static_files.routes("playground") if route.path.removeprefix("/playground/") in _SHARED
        ]
        return [
            *static_files.routes("labelling"),
            *shared,
            web.get("/state", self.state),
            web.get(r"/documents/{number:\d{1,9}}/{start:\d{1,9}}", self.text),
            web.post("/label", self.label),
            web.post("/skip", self.skip),
            web.post("/undo", self.undo),
            web.post("/export", self.export),
        ]

    async def state(self, _: web.Request) -> web.Response:
        """What to show."""
        return self._answer()

    async def text(self, request: web.Request) -> web.Response:
        """More of a long text."""
        try:
            found = self._session.text(int(request.match_info["number"]), int(request.match_info["start"]))
        except IndexError:
            raise ApiError(404, "no such document", code="document_not_found") from None
        return _json(found)

    async def label(self, request: web.Request) -> web.Response:
        """Keeps a label."""
        fields = await self._fields(request)
        number, score = _number(fields), fields.integer("score", MIN_SCORE, MAX_SCORE)
        kinds, note = fields.take("kinds") or [], fields.text("note") or ""
        fields.refuse_rest()
        if score is None:
            raise bad_field("score", None, f"a whole number from {MIN_SCORE} to {MAX_SCORE}")
        if not isinstance(kinds, list) or any(kind not in KINDS for kind in kinds):
            raise bad_field("kinds", kinds, f"a list of {', '.join(KINDS)}")
        if len(note) > MAX_NOTE_CHARACTERS:
            raise ApiError(400, f"note: want at most {MAX_NOTE_CHARACTERS} characters", param="note")
        return self._do(lambda: self._session.label(number, score, kinds, note))

    async def skip(self, request: web.Request) -> web.Response:
        """Passes a document over."""
        fields = await self._fields(request)
        number = _number(fields)
        fields.refuse_rest()
        return self._do(lambda: self._session.skip(number))

    async def undo(self, request: web.Request) -> web.Response:
        """Takes the last answer back."""
        (await self._fields(request)).refuse_rest()
        return self._do(self._session.undo)

    async def export(self, request: web.Request) -> web.Response:
        """Writes the training file."""
        (await self._fields(request)).refuse_rest()
        exported: dict[str, Any] = {}
        return self._do(lambda: exported.update(self._session.export()), exported)

    async def _fields(self, request: web.Request) -> Fields:
        return Fields(await read_body(request, most_bytes=_BODY_BYTES, seconds=_SECONDS))

    def _do(self, action: Callable[[], None], exported: dict[str, Any] | None = None) -> web.Response:
        try:
            action()
        except StaleError as error:
            raise ApiError(409, str(error), code="stale") from None
        except ValueError as error:
            raise ApiError(400, str(error)) from None
        except OSError as error:
            raise ApiError(507, f"not kept: {error.strerror} ({error.filename})", code="not_kept") from None
        return self._answer(exported)

    def _answer(self, exported: dict[str, Any] | None = None) -> web.Response:
        return _json(self._session.state() | ({"exported": exported} if exported else {}))


def _json(value: Any) -> web.Response:
    return web.Response(text=json.dumps(value), content_type="application/json")


def _number(fields: Fields) -> int:
    number = fields.integer("number", 0)
    if number is None:
        raise bad_field("number", None, "the number of a document")
    return number


@asynccontextmanager
async def labelling(session: Session, port: int) -> AsyncIterator[Listener]:
    """A server of the page for as long as the block runs. OSError if it can't listen there."""
    app = web.Application(
        middlewares=[
            access.count_and_tell_errors(Metrics(), seconds_to_send=_SECONDS),
            access.allow(key="", is_loopback=True),
        ],
        client_max_size=_BODY_BYTES,
    )
    app.add_routes(LabelRoutes(session).routes())
    async with listening(app, HOST, port, connections=_CONNECTIONS, seconds=_SECONDS) as listener:
        yield listener


async def serve(session: Session, port: int, *, started: Callable[[str], None]) -> None:
    """Serves until SIGTERM or SIGINT. `started` is told the URL."""
    first = told_to_end()
    async with labelling(session, port) as listener:
        started(listener.url)
        await first.wait()
