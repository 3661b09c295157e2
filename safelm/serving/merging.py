"""Several streams as one."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import TypeVar

T = TypeVar("T")


async def merged(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncIterator[tuple[int, T | None]]:
    """The items of all streams as they come, each with its stream's index; None at the end of each.

    The first failure ends all; they are closed also where nobody takes more.
    """
    if len(streams) == 1:  # nothing to merge: no task between a reply and its client
        try:
            async for item in streams[0]:
                yield 0, item
            yield 0, None
        finally:
            await streams[0].aclose()
        return
    found: asyncio.Queue[tuple[int, T | None, Exception | None]] = asyncio.Queue()

    async def pass_on(index: int) -> None:
        try:
            async for item in streams[index]:
                found.put_nowait((index, item, None))
            found.put_nowait((index, None, None))
        except Exception as error:
            found.put_nowait((index, None, error))

    tasks = [asyncio.ensure_future(pass_on(index)) for index in range(len(streams))]
    try:
        left = len(streams)
        while left:
            index, item, error = await found.get()
            if error is not None:
                raise error
            left -= item is None
            yield index, item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for stream in streams:
            await stream.aclose()
