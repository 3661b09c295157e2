"""A lane: the prompts that one decoding program steps together, and their cache."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from safelm.inference import asked, programs
from safelm.inference.compiling import BackgroundCompiler, Program
from safelm.inference.forward import Cache
from safelm.inference.prompts import SMALLEST_BUCKET, bucket
from safelm.inference.requests import EngineRequest, Finished, TraceCandidate, Update
from safelm.inference.weights import Weights
from safelm.models.config import ModelConfig

READ_AT_ONCE = 4096  # tokens of prompts, padding included
SHORTEST_CACHE = 128  # tokens of a row
Size = tuple[int, int]
_FINISHED: dict[int, Finished] = {asked.RUNNING: "length", asked.ENDED_BY_EOS: "eos", asked.ENDED_BY_TAG: "tag"}


@dataclasses.dataclass
class Entry:
    """A request with a slot.

    Attributes:
      num_tokens: number of tokens generated so far.
      num_told: number of those already reported in updates.
    """

    request_id: int
    request: EngineRequest
    prompt: list[int]
    num_tokens: int = 0
    num_told: int = 0
    trace: list[tuple[TraceCandidate, ...]] = dataclasses.field(default_factory=list)

    @property
    def need(self) -> int:
        """The cache tokens that a row will need in the end."""
        return len(self.prompt) + self.request.max_new_tokens


class Lane:
    """Slots for prompts whose methods share a program, with a cache that grows and shrinks as needed.

    The cache has `shape.num_rows` times a power of four rows (or the largest possible number). Its length is a power of
    two that holds the longest prompt after the next block of steps. Reservations count what the prompts may still grow
    to.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        shape: programs.StepShape,
        *,
        harm_tag_id: int | None,
        max_prompts: int,
        steps_per_call: int,
        compiler: BackgroundCompiler | None = None,
    ):
        self._config, self._weights, self._shape = config, weights, shape
        self._harm_tag_id, self._max_prompts, self._steps_per_call = harm_tag_id, max_prompts, steps_per_call
        self._compiler = compiler
        self._is_beamless = isinstance(shape, programs.Sequences)  # every token is final at once
        self._slots: list[Entry | None] = []
        self._max_len = 0
        self._state: Any = None
        self._cache: Cache | None = None

    @property
    def entries(self) -> list[Entry]:
        """The requests that have a slot."""
        return [entry for entry in self._slots if entry is not None]

    def tokens_with(self, joining: Sequence[Entry] = ()) -> int:
        """The cache tokens that the requests with a slot and these may grow to, over all rows."""
        return self._tokens([*self.entries, *joining])

    def tokens_alone(self, entry: Entry) -> int:
        """The cache tokens that a request may grow to by itself."""
        return self._tokens([entry])

    def remove(self, request_id: int) -> bool:
        """Frees a request's slot; returns False if it has none here."""
        for slot, entry in enumerate(self._slots):
            if entry is not None and entry.request_id == request_id:
                self._slots[slot] = None
                return True
        return False

    def admit(self, joining: Sequence[Entry]) -> None:
        """Reads these requests' prompts, gives them slots, and resizes the cache for the next block."""
        if not self.entries and not joining:
            self._slots, self._state, self._cache = [], None, None
            return
        size = self._ready_size(joining) or self._least_size(joining)
        if self._compiler is not None:
            self._compiler.note(self._programs(size, joining))
        self._fit(*size)
        free = iter([slot for slot, entry in enumerate(self._slots) if entry is None])
        for height, width, alike in self._readings(joining):
            self._read(alike, height, width, free)

    def is_ready(self, joining: Sequence[Entry]) -> bool:
        """Whether these can be admitted without compiling here; if not, compilation starts in another thread."""
        return self._ready_size(joining) is not None

    def look_ahead(self) -> None:
        """Starts compiling the programs that the current requests will need as they grow."""
        needs = [entry.need for entry in self.entries]
        if self._compiler is not None and needs and self._length(max(needs)) > self._max_len:
            self._compiler.has(self._programs((len(self._slots), self._length(self._max_len + 1)), ()))

    def run(self, *, stops_early: bool) -> list[Update]:
        """Runs one block of steps; with `stops_early` only until the first prompt is over."""
        is_wanted_P = np.array([entry is not None for entry in self._slots])
        self._state, self._cache, report = programs.run(
            self._config,
            self._shape,
            self._weights,
            self._state,
            self._cache,
            is_wanted_P,
            np.bool_(stops_early),
            num_steps=self._steps_per_call,
        )
        wants_trace = any(entry.request.want_trace for entry in self.entries)
        report = jax.device_get({key: value for key, value in report.items() if key != "tried" or wants_trace})
        updates = []
        for slot, entry in enumerate(self._slots):
            if entry is None:
                continue
            if "tried" in report:
                self._note(entry, report, slot)
            is_over = bool(report["is_over_P"][slot])
            entry.num_tokens = int(report["step_P"][slot])
            if is_over or self._is_beamless:
                update = self._update(entry, [array[slot] for array in report["outcome"]], is_over)
                updates += [update] if update.tokens or update.finished else []
            if is_over:
                self._slots[slot] = None
        return updates

    def _tokens(self, entries: Sequence[Entry]) -> int:
        longest = max((entry.need for entry in entries), default=0)
        return self._num_slots(len(entries)) * self._shape.num_rows * self._length(longest) if entries else 0

    def _num_slots(self, num_entries: int) -> int:
        return bucket(num_entries, 1, self._max_prompts, factor=4)

    def _length(self, num_tokens: int) -> int:
        return bucket(num_tokens, SHORTEST_CACHE, self._config.max_seq_len)

    def _least_size(self, joining: Sequence[Entry]) -> Size:
        """Number of slots and cache length that the next block needs."""
        entries = [*self.entries, *joining]
        reached = (min(len(e.prompt) + e.num_tokens + self._steps_per_call, e.need) for e in entries)
        return self._num_slots(len(entries)), self._length(max(reached))

    def _ready_size(self, joining: Sequence[Entry]) -> Size | None:
        """The least size, or one in which nothing shrinks, whose programs are compiled; None if there is none."""
        least = self._least_size(joining)
        if self._compiler is None:
            return least
        roomy = max(least[0], len(self._slots)), max(least[1], self._max_len if self._slots else 0)
        return next((size for size in (least, roomy) if self._compiler.has(self._programs(size, joining))), None)

    def _programs(self, size: Size, joining: Sequence[Entry]) -> list[Program]:
        """The programs that `admit` and `run` will call."""
        config, shape, weights, now = self._config, self._shape, self._weights, (len(self._slots), self._max_len)
        lane = functools.partial(programs.abstract, config, shape, harm_tag_id=self._harm_tag_id)
        steps = self._steps_per_call
        found: list[Program] = []
        if self.entries and now != size:
            found.append((("resize", shape, now, size), lambda: programs.compile_resize(shape, lane(now), size)))
        for height, width in {(height, width): None for height, width, _ in self._readings(joining)}:
            read = functools.partial(programs.compile_read, config, weights, height, width)
            join = functools.partial(programs.compile_join, config, shape, weights, height, width)
            found.append((("read", height, width), read))
            joined = functools.partial(lane, (height, 1))
            key = ("join", shape, height, width, size)
            found.append((key, lambda join=join, joined=joined: join(lane(size), joined())))
        run = lambda: programs.compile_run(config, shape, weights, lane(size), num_steps=steps)  # noqa: E731
        return [*found, (("run", shape, size), run)]

    def _readings(self, joining: Sequence[Entry]) -> list[tuple[int, int, list[Entry]]]:
        """Prompts read together: number of rows (a power of four), of tokens (a power of two), and the entries."""
        by_width: dict[int, list[Entry]] = {}
        for entry in joining:
            width = bucket(len(entry.prompt), SMALLEST_BUCKET, self._config.max_seq_len)
            by_width.setdefault(width, []).append(entry)
        found = []
        for width, alike in by_width.items():
            while alike:
                height = 1
                while 3 * height <= len(alike) and 4 * height * width <= READ_AT_ONCE:  # 3 of 4 rows are filled
                    height *= 4
                found.append((height, width, alike[:height]))
                alike = alike[height:]
        return found

    def _fit(self, num_slots: int, max_len: int) -> None:
        """Resizes state and cache if they have another size."""
        if (num_slots, max_len) == (len(self._slots), self._max_len) and self._state is not None:
            return
        taken = [slot for slot, entry in enumerate(self._slots) if entry is not None]
        sizes = {"num_prompts": num_slots, "max_len": max_len}
        if not taken:
            self._state = self._cache = None
            self._state, self._cache = programs.empty_state(
                self._config, self._shape, harm_tag_id=self._harm_tag_id, **sizes
            )
        else:
            slots_P = np.full(num_slots, len(self._slots), np.int32)
            slots_P[: len(taken)] = taken
            self._state, self._cache = programs.resize(self._shape, self._state, self._cache, slots_P, max_len=max_len)
        self._slots = [self._slots[slot] for slot in taken] + [None] * (num_slots - len(taken))
        self._max_len = max_len

    def _read(self, entries: Sequence[Entry], height: int, width: int, free: Any) -> None:
        tokens_PT, lengths_P = np.zeros((height, width), np.int32), np.zeros(height, np.int32)
        slots_P = np.full(height, len(self._slots), np.int32)
        rows: list[Any] = [None] * height
        for row, entry in enumerate(entries):
            request, length = entry.request, len(entry.prompt)
            tokens_PT[row, :length], lengths_P[row], slots_P[row] = entry.prompt, length, next(free)
            rows[row] = (length, request.max_new_tokens, request.end_ids, request.method, request.seed)
            self._slots[slots_P[row]] = entry
        new_kv, logits_PV = programs.read_prompts(self._config, self._weights, tokens_PT, lengths_P)
        pool = self._shape.num_dropped_from
        wanted = asked.ask(rows, harm_tag_id=self._harm_tag_id, max_pool=pool)
        self._state, self._cache = programs.join(
            self._config, self._shape, self._state, self._cache, wanted, slots_P, new_kv, logits_PV
        )

    def _update(self, entry: Entry, outcome: Sequence[Any], is_over: bool) -> Update:
        tokens_T, tag_log_probs_T, num_tokens, log_prob, end = outcome
        if np.isnan(log_prob):
            return Update(entry.request_id, finished="error", error="the model's log-probs are not numbers")
        news = slice(entry.num_told, int(num_tokens))
        entry.num_told = int(num_tokens)
        return Update(
            entry.request_id,
            tokens=tuple(tokens_T[news].tolist()),
            tag_probs=() if self._harm_tag_id is None else tuple(np.exp(tag_log_probs_T[news]).tolist()),
            finished=_FINISHED[int(end)] if is_over else "",
            log_prob=float(log_prob),
            trace=tuple(entry.trace) if is_over and entry.request.want_trace and not self._is_beamless else None,
        )

    def _note(self, entry: Entry, report: dict[str, Any], slot: int) -> None:
        """Adds the steps that the request went through to its trace."""
        if not entry.request.want_trace or report["tried"] is None:
            return
        for step in range(int(report["step_P"][slot]) - entry.num_tokens):
            entry.trace.append(_candidates(jax.tree.map(lambda leaf: leaf[step, slot], report["tried"])))  # noqa: B023


def _candidates(tried: Any) -> tuple[TraceCandidate, ...]:
    """One prompt's candidates of a step."""
    beam_at = {int(place): beam for beam, place in enumerate(tried.place_PW) if tried.is_beam_PW[beam]}
    num_candidates = len(tried.tokens_PM) // len(tried.place_PW)
    return tuple(
        TraceCandidate(
            parent=place // num_candidates,
            token=None if tried.is_held_PM[place] else int(tried.tokens_PM[place]),
            log_prob=float(tried.log_prob_PM[place]),
            tag_prob=None if np.isnan(tried.tag_log_prob_PM[place]) else float(np.exp(tried.tag_log_prob_PM[place])),
            outcome="dropped" if tried.is_dropped_PM[place] else "kept" if place in beam_at else "outranked",
            beam=beam_at.get(place),
        )
        for place in np.flatnonzero(np.isfinite(tried.log_prob_PM)).tolist()
    )
