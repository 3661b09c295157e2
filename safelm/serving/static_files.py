"""Serves pages: a few files of this package, read once, under a policy that forbids all other content."""

import hashlib
import importlib.resources
from collections.abc import Awaitable, Callable

from aiohttp import web

_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
_POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
    ]
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def routes(name: str) -> list[web.RouteDef]:
    """The files of a folder of `safelm.serving`: `/` is its index.html, the others stand under `/NAME/`."""
    folder = importlib.resources.files("safelm.serving") / name
    found = []
    for file in sorted(folder.iterdir(), key=lambda each: each.name):
        kind = _TYPES.get(file.name.rpartition(".")[2])
        if kind is not None:
            path = "/" if file.name == "index.html" else f"/{name}/{file.name}"
            found.append(web.get(path, _handler(file.read_bytes(), kind)))
    return found


def _handler(content: bytes, kind: str) -> Callable[[web.Request], Awaitable[web.Response]]:
    etag = hashlib.sha256(content).hexdigest()[:16]

    async def serve_file(request: web.Request) -> web.Response:
        headers = _HEADERS | {"Content-Type": kind, "ETag": f'"{etag}"'}
        if any(each.value == etag for each in request.if_none_match or ()):
            return web.Response(status=304, headers=headers)
        return web.Response(body=content, headers=headers)

    return serve_file
