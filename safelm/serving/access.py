"""The checks before every route: who may ask and from where, and how failures are reported and logged."""

import asyncio
import contextlib
import hmac
import ipaddress
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable

from aiohttp import web

from safelm.serving.errors import ApiError, log_defect
from safelm.serving.metrics import Metrics

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
_OPEN_TO_ALL = ("/", "/health")  # and the page's files
_HOST = re.compile(r"(?:\[([^\[\]]*)\]|([^:\[\]]*))(?::\d*)?")  # an IPv6 address in brackets, or a name; a port
_CHARSETS = ("utf-8", "utf8", "us-ascii")
_HTTP_MESSAGES = {404: "no such path", 405: "this path does not take this method"}


def count_and_tell_errors(metrics: Metrics, *, seconds_to_send: float) -> Callable[..., Awaitable[web.StreamResponse]]:
    """The outermost middleware: turns every failure into an error in OpenAI's form; counts and times replies."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        began = time.monotonic()
        route = request.match_info.route.resource.canonical if request.match_info.route.resource else "none"
        if request.transport is not None:  # so that a reply counts as sent only when it has left this process
            request.transport.set_write_buffer_limits(high=0)
        status = 499  # the client went away, unless it turns out otherwise
        try:
            response = await _answer(request, handler)
            status = response.status
            async with patience(request, seconds_to_send):
                await response.prepare(request)
                await response.write_eof()
            request.protocol.note_reply()
            return response
        finally:
            metrics.requests.labels(route, str(status)).inc()
            metrics.request_seconds.labels(route).observe(time.monotonic() - began)

    return middleware


@contextlib.asynccontextmanager
async def patience(request: web.Request, seconds: float) -> AsyncIterator[None]:
    """Cuts the connection (ConnectionResetError) if the client doesn't take the block's data in time."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        if request.transport is not None:
            request.transport.abort()
        raise ConnectionResetError("the client stopped reading") from None


async def _answer(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        response = await handler(request)
    except ApiError as error:
        response = web.json_response(error.body(), status=error.status, headers=error.headers)
        if error.ends_connection:
            response.force_close()
    except web.HTTPException as error:
        told = ApiError(error.status, _HTTP_MESSAGES.get(error.status, error.reason))
        headers = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else {}
        response = web.json_response(told.body(), status=error.status, headers=headers)
    except (asyncio.CancelledError, ConnectionError):
        raise
    except Exception as error:
        log_defect(f"{request.method} {request.path} failed", error)
        response = web.json_response(ApiError(500, "a defect of the server").body(), status=500)
    if not response.prepared:
        response.headers.setdefault("X-Content-Type-Options", "nosniff")
        response.headers.setdefault("Cache-Control", "no-store")
    return response


def allow(*, key: str, is_loopback: bool) -> Callable[..., Awaitable[web.StreamResponse]]:
    """Refuses requests without the key (if there is one) and, on loopback, requests from foreign web pages.

    A foreign page can make a browser send requests here. To send JSON the browser must ask first, and this server never
    agrees. If the page points its own host name at this address, that name appears in the Host header (or in the path,
    if a client sends a whole address).
    """

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        if is_loopback and not all(_is_local(host) for host in _hosts(request)):
            raise ApiError(403, "this server answers to localhost only (Host header)", code="wrong_host")
        is_open = request.path in _OPEN_TO_ALL or request.path.startswith("/playground/")
        if key and not is_open and not _has_key(request, key):
            raise ApiError(
                401,
                "want the server's key as 'Authorization: Bearer KEY'",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        if request.method == "POST" and not _is_json(request):
            raise ApiError(415, "want Content-Type: application/json, in UTF-8", code="wrong_content_type")
        if request.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise ApiError(
                415,
                "want no Content-Encoding",
                code="wrong_content_encoding",
                headers={"Accept-Encoding": "identity"},
                ends_connection=True,
            )
        return await handler(request)

    return middleware


def is_loopback(host: str) -> bool:
    """Whether an address is reachable from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _hosts(request: web.Request) -> list[str]:
    """The hosts that a request names: its Host headers, and the host of a whole address used as path."""
    hosts = request.headers.getall("Host", [])
    if not request.raw_path.startswith(("/", "*")):
        hosts.append(request.url.raw_authority)
    return hosts


def _is_local(host: str) -> bool:
    """Whether a Host header names this machine. No foreign page can have a loopback address as its host name."""
    found = _HOST.fullmatch(host)
    return found is not None and is_loopback(found[1] or found[2])


def _is_json(request: web.Request) -> bool:
    """Whether the body is declared as JSON in UTF-8."""
    charset = request.charset
    return request.content_type == "application/json" and (charset is None or charset.lower() in _CHARSETS)


def _has_key(request: web.Request, key: str) -> bool:
    scheme, _, given = request.headers.get("Authorization", "").partition(" ")
    is_same = hmac.compare_digest(given.strip().encode(errors="replace"), key.encode())
    return is_same and scheme.lower() == "bearer"
