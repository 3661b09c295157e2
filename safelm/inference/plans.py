"""Plans: several requests to the engine that together answer one, for methods and knobs that look before they go on.

A plan is a generator. It yields an `Ask`, is sent the whole result of that request as an `Update`, and so on; at the
end it yields the answer as an `Update` or, where its last request streamed, just returns. `safelm.inference.planning`
has the plans; the engine runs them, so they work wherever requests do.
"""

import dataclasses
from collections.abc import Callable, Generator
from typing import Any

from safelm.inference.requests import EngineRequest, Update

Stops = Callable[[Update], bool]


@dataclasses.dataclass(frozen=True)
class Ask:
    """A request of a plan.

    Attributes:
      streams: its tokens are the answer's, told as they come, and its end is the answer's.
      stops: looks at every update; whether the request can end there.
      untold: of one that streams, `Update.untold` of the answer.
    """

    request: EngineRequest
    streams: bool = False
    stops: Stops | None = None
    untold: int = 0


Plan = Generator["Ask | Update", Update, None]
MakePlan = Callable[[EngineRequest], Plan]


@dataclasses.dataclass
class _Running:
    plan: Plan
    ask: Ask
    answer_id: int = -1  # the request that it answers
    result: Update = dataclasses.field(default_factory=lambda: Update(-1))


class Plans:
    """The plans under way in an engine."""

    def __init__(self, submit: Callable[[EngineRequest], int], cancel: Callable[[int], None]):
        """`submit` and `cancel` are the engine's for requests without a plan."""
        self._submit, self._cancel = submit, cancel
        self._running: dict[int, _Running] = {}  # by the request under way
        self._left: set[int] = set()  # requests that a plan gave up

    def begin(self, request: EngineRequest) -> int:
        """Submits a plan's first request, whose id is the answer's. Raises ValueError as `Engine.submit` does."""
        plan = request.plan(dataclasses.replace(request, plan=None))
        ask = next(plan)
        answer_id = self._submit(ask.request)
        self._running[answer_id] = _Running(plan, ask, answer_id)
        return answer_id

    def under_way(self, answer_id: int) -> int:
        """The id of the request that is under way for an answer; its own where it has no plan."""
        return next((id_ for id_, run in self._running.items() if run.answer_id == answer_id), answer_id)

    def clear(self) -> None:
        """Drops all plans."""
        self._running.clear()
        self._left.clear()

    def advance(self, updates: list[Update]) -> list[Update]:
        """The engine's updates, with those of plans' requests replaced by their answers'."""
        told: list[Update] = []
        for update in updates:
            if update.request_id in self._running:
                told += self._take(update)
            elif update.request_id in self._left:
                self._left -= {update.request_id} if update.finished else set()
            else:
                told.append(update)
        return told

    def _take(self, update: Update) -> list[Update]:
        run = self._running[update.request_id]
        ends = bool(update.finished)
        if update.finished in ("cancelled", "error") or (run.ask.streams and ends):
            del self._running[update.request_id]
        if update.finished in ("cancelled", "error"):
            return [dataclasses.replace(update, request_id=run.answer_id)]
        if run.ask.streams:
            untold, run.ask = run.ask.untold, dataclasses.replace(run.ask, untold=0)
            return [dataclasses.replace(update, request_id=run.answer_id, untold=untold)]
        run.result = update.behind(run.result)
        if not ends and not (run.ask.stops and run.ask.stops(update)):
            return []
        del self._running[update.request_id]
        if not ends:
            self._left.add(update.request_id)
            self._cancel(update.request_id)
        return self._go_on(run)

    def _go_on(self, run: _Running) -> list[Update]:
        """Sends a plan its result, and submits what it asks next."""
        result, run.result = run.result, Update(-1)
        try:
            step: Any = run.plan.send(result)
            if isinstance(step, Update):
                return [dataclasses.replace(step, request_id=run.answer_id)]
            run.ask = step
            self._running[self._submit(step.request)] = run
        except ValueError as error:
            return [Update(run.answer_id, finished="error", error=str(error))]
        return []
