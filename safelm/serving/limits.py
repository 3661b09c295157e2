"""The server's limits, and the count of requests being answered."""

import asyncio
import contextlib
import dataclasses
import math
from collections.abc import Iterator

from safelm.inference.methods import Method
from safelm.serving.errors import ApiError


@dataclasses.dataclass(frozen=True)
class Limits:
    """The server's limits, each a flag of `safelm.serve`.

    Attributes:
      body_bytes: size of a request's body.
      body_seconds: time for a request's body, and for its headers, to arrive.
      prompt_tokens: length of a prompt.
      score_tokens: length of a text to score.
      new_tokens: tokens to generate in one request; a request may ask for fewer.
      choices: texts of one reply: its prompts times `n`.
      open_requests: requests being generated or scored at once, including those that wait for a slot.
      request_seconds: time from a request's arrival to the end of its reply.
      shapes: different pairs of beams and candidates, by method; each is compiled on first use.
      beams, candidates: of beam search, SafeBeam and tag-penalty sampling.
      connections: open connections.
      grace_seconds: time for open requests after the server is told to end.
    """

    body_bytes: int = 256 * 1024
    body_seconds: float = 15.0
    prompt_tokens: int = 4096
    score_tokens: int = 1024
    new_tokens: int = 1024
    choices: int = 32
    open_requests: int = 64
    request_seconds: float = 300.0
    beams: int = 8
    candidates: int = 16
    shapes: int = 24
    connections: int = 512
    grace_seconds: float = 30.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"--{field.name}={value}: must be above 0")
        if self.connections <= self.open_requests:
            raise ValueError(f"--connections={self.connections}: must be above --open_requests={self.open_requests}")


class Admission:
    """Counts the requests being answered; refuses those beyond the limit, and all while the server drains.

    Attributes:
      num_open: requests being answered now.
      is_draining: whether the server was told to end.
    """

    def __init__(self, open_requests: int):
        self.num_open, self.is_draining = 0, False
        self._most = open_requests
        self._is_empty = asyncio.Event()
        self._is_empty.set()

    @contextlib.contextmanager
    def enter(self, num_choices: int = 1) -> Iterator[None]:
        """Context manager that counts a request by its choices; one is taken whatever their number if nothing is open.

        Raises ApiError 503 while draining, 429 if there are too few places.
        """
        if self.is_draining:
            raise ApiError(
                503,
                "the server is shutting down",
                code="shutting_down",
                headers={"Retry-After": "5"},
                ends_connection=True,
            )
        if self.num_open and self.num_open + num_choices > self._most:
            raise ApiError(
                429,
                f"{self.num_open} requests are being answered, as many as this server takes; try again",
                code="server_busy",
                headers={"Retry-After": "1"},
            )
        self.num_open += num_choices
        self._is_empty.clear()
        try:
            yield
        finally:
            self.num_open -= num_choices
            if not self.num_open:
                self._is_empty.set()

    async def wait_until_empty(self) -> None:
        """Returns when no request is being answered."""
        await self._is_empty.wait()


class Shapes:
    """Bounds the programs that clients can have compiled: one for each pair of beams and candidates.

    A shape stays allowed once it was used; that of greedy decoding and sampling always is.
    """

    def __init__(self, most: int):
        self._most = most
        self._used: set[tuple[str, int, int]] = set()

    def take(self, method: Method) -> None:
        """Registers a method's shape. Raises ApiError if it would be one too many."""
        shape = (type(method).__name__, getattr(method, "num_beams", 1), getattr(method, "num_candidates", 1))
        if shape[1:] == (1, 1):
            return
        if shape not in self._used and len(self._used) >= self._most:
            raise ApiError(
                400,
                f"num_beams={shape[1]}, num_candidates={shape[2]}: this server has programs for "
                f"{self._most} pairs, its limit; want one that was used before",
                param="safelm.num_beams",
                code="too_many_shapes",
            )
        self._used.add(shape)
