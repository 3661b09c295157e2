"""HTTP to untrusted servers: replies are bounded in time and size, without redirects or unneeded headers."""

import asyncio
import zlib
from collections.abc import Callable
from typing import Any

import httpx2

MOST_BYTES = 8 << 20  # of a reply, on the wire and decompressed
TROUBLE = "safelm_trouble"  # a response's extension: why a reply with status 2xx counts as a failure that may pass
_GZIP = 31  # zlib's wbits
_SENT = (
    "accept",
    "accept-encoding",
    "authorization",
    "connection",
    "content-length",
    "content-type",
    "host",
    "idempotency-key",
    "transfer-encoding",
    "user-agent",
)


class UnusableReplyError(httpx2.RequestError):
    """A reply that is too large or in an encoding that wasn't requested."""


class BoundedClient(httpx2.AsyncClient):
    """A client that reads every reply within `timeout_s` and MOST_BYTES, and only from the requested host.

    Headers from the environment (an organization's or project's name, custom ones) are not sent.
    """

    def __init__(self, key: str, *, timeout_s: float, find_trouble: Callable[[bytes], str]):
        """Makes a client with the given key.

        Args:
          find_trouble: takes the body of a reply with status 2xx and returns why a retry may help, or "". A reply with
            a reason gets status 502, so that it is retried, and the extension TROUBLE.
        """
        super().__init__(follow_redirects=False, timeout=timeout_s)
        self._key, self._timeout_s, self._find_trouble = key, timeout_s, find_trouble

    async def send(self, request: httpx2.Request, **_: Any) -> httpx2.Response:
        """The whole reply. Raises httpx2.ReadTimeout or UnusableReplyError if it exceeds the bounds."""
        for name in [name for name in request.headers if name not in _SENT and not name.startswith("x-stainless-")]:
            del request.headers[name]
        request.headers["Authorization"] = f"Bearer {self._key}"
        request.headers["Accept-Encoding"] = "gzip"
        try:
            async with asyncio.timeout(self._timeout_s):
                response = await super().send(request, stream=True)
                try:
                    content = await _read(response)
                finally:
                    await response.aclose()
        except TimeoutError:
            raise httpx2.ReadTimeout(f"no whole reply within {self._timeout_s} s", request=request) from None
        trouble = self._find_trouble(content) if response.is_success else ""
        kept = [(name, value) for name, value in response.headers.items() if name != "content-encoding"]
        return httpx2.Response(
            502 if trouble else response.status_code,
            headers=kept,
            content=content,
            request=request,
            extensions={TROUBLE: trouble} if trouble else {},
        )


async def _read(response: httpx2.Response) -> bytes:
    encoding = response.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("identity", "gzip"):
        raise UnusableReplyError(f"a reply with Content-Encoding {encoding[:20]!r}, which was not asked for")
    inflate = zlib.decompressobj(_GZIP) if encoding == "gzip" else None
    content, num_received = bytearray(), 0
    async for raw in response.aiter_raw():
        num_received += len(raw)
        while raw:
            try:
                content += raw if inflate is None else inflate.decompress(raw, MOST_BYTES + 1 - len(content))
            except zlib.error:
                raise UnusableReplyError("a reply that is not the gzip it says it is") from None
            raw = b"" if inflate is None else inflate.unconsumed_tail
            if max(len(content), num_received) > MOST_BYTES:
                raise UnusableReplyError(f"a reply of more than {MOST_BYTES >> 20} MB")
    if inflate is not None and not inflate.eof:
        raise UnusableReplyError("a reply whose gzip ends too early")
    return bytes(content)
