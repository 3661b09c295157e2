"""A lane: the prompts that one decoding program steps together, and their cache."""

import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from safelm.inference import asked, programs
from safelm.inference.adjustments import NEUTRAL
from safelm.inference.compiling import BackgroundCompiler, Program
from safelm.inference.entry import Entry
from safelm.inference.forward import Cache
from safelm.inference.lookup import Lookups
from safelm.inference.prefixes import Prefix
from safelm.inference.prompts import SMALLEST_BUCKET, bucket
from safelm.inference.requests import Update
from safelm.inference.tag_probability import LOGITS_AT_ONCE
from safelm.inference.token_mask import MaskedText
from safelm.inference.weights import Weights
from safelm.models.config import ModelConfig

SHORTEST_CACHE = 128  # tokens of a row
MOST_JUMPED, FEWEST_JUMPED = 16, 4  # tokens of a text in one forward, filling included
Size = tuple[int, int]


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
        read_at_once: int,
        compiler: BackgroundCompiler | None = None,
    ):
        self._config, self._weights, self._shape = config, weights, shape
        self._harm_tag_id, self._max_prompts, self._steps_per_call = harm_tag_id, max_prompts, steps_per_call
        self._compiler, self._read_at_once = compiler, read_at_once
        self._is_beamless = isinstance(shape, programs.Sequences)  # every token is final at once
        self._monitor = getattr(shape, "monitor", None)
        self._has_levels = harm_tag_id is not None or self._monitor is not None
        self._slots: list[Entry | None] = []
        self._max_len = 0
        self._state: programs.DecodeState | None = None
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
        is_masked = any(entry.mask is not None for entry in self.entries)
        updates, jumped = self._follow_masks() if is_masked else ([], ())
        is_wanted_P = np.array([e is not None and slot not in jumped for slot, e in enumerate(self._slots)])
        self._state, self._cache, report = programs.run(
            self._config,
            self._shape,
            self._weights,
            self._state,
            self._cache,
            is_wanted_P,
            np.bool_(stops_early),
            np.int32(1 if is_masked else self._steps_per_call),
            num_steps=self._steps_per_call,
        )
        wants_trace = any(entry.request.want_trace for entry in self.entries)
        report = jax.device_get({key: value for key, value in report.items() if key != "tried" or wants_trace})
        for slot, entry in enumerate(self._slots):
            if entry is None:
                continue
            is_over, num_tokens = bool(report["is_over_P"][slot]), int(report["step_P"][slot])
            if "tried" in report:
                entry.note(report["tried"], slot, num_tokens)
            entry.num_tokens = num_tokens
            if is_over or self._is_beamless:
                outcome = [array[slot] for array in report["outcome"]]
                update = entry.update(outcome, is_over=is_over, has_tag=self._has_levels)
                updates += [update] if update.tokens or update.finished else []
            if is_over:
                self._slots[slot] = None
        return updates

    def _follow_masks(self) -> tuple[list[Update], Collection[int]]:
        """Advances masks by the next tokens, sets the masks of the tokens after them, and adds forced tokens to texts.

        Returns updates for failed masks, and the slots that forced tokens were added to.
        """
        next_PC, step_P, ends_P = jax.device_get((self._state.next_tokens_PC, self._state.step_P, self._state.ends_P))
        most = min(MOST_JUMPED, LOGITS_AT_ONCE // (self._config.padded_vocab_size * len(self._slots)))
        masked: dict[int, MaskedText] = {}
        coming: dict[int, tuple[int, ...]] = {}
        for slot, entry in enumerate(self._slots):
            left = 0 if entry is None else entry.request.max_new_tokens - int(step_P[slot])
            if entry is None or entry.mask is None or left < 2 or ends_P[slot] != asked.RUNNING:
                continue  # nothing is chosen behind its next token
            masked[slot] = entry.mask
            entry.mask.follow([int(next_PC[slot, 0])])
            coming[slot] = (int(next_PC[slot, 0]), *entry.mask.forced(min(left, most) - 1))
        jumps = {slot: tokens for slot, tokens in coming.items() if len(tokens) > 1}
        jumps = jumps if self._can_jump(jumps) else {}
        allowed_PX = programs.all_ids(self._config, self._shape, len(self._slots))
        for slot, mask in masked.items():
            mask.follow(jumps.get(slot, ())[1:])
            allowed_PX[slot] = mask.allowed()
        updates = []
        for slot, mask in masked.items():
            if mask.error:
                updates.append(Update(self._slots[slot].request_id, finished="error", error=mask.error))
                self._slots[slot] = None
                jumps.pop(slot, None)
        self._state = self._state.replace(asked=self._state.asked.replace(allowed_PX=allowed_PX))
        if jumps:
            self._jump(jumps)
        return updates, jumps

    def _jump_size(self, jumps: Mapping[int, Sequence[int]]) -> Size:
        height = bucket(len(jumps), 1, len(self._slots), factor=4)
        return height, bucket(max(map(len, jumps.values())), FEWEST_JUMPED, MOST_JUMPED)

    def _can_jump(self, jumps: Mapping[int, Sequence[int]]) -> bool:
        """Whether the program is compiled or may be compiled here; if not, the masks force the tokens one by one."""
        if self._compiler is None or not jumps:
            return bool(jumps)
        size, of_jump = (len(self._slots), self._max_len), self._jump_size(jumps)
        compile_it = functools.partial(programs.compile_jump, self._config, self._shape, self._weights)
        lane = functools.partial(self._abstract, size)
        return self._compiler.has([(("jump", self._shape, size, of_jump), lambda: compile_it(lane(), *of_jump))])

    def _jump(self, jumps: Mapping[int, Sequence[int]]) -> None:
        height, width = self._jump_size(jumps)
        slots_J, counts_J = np.full(height, len(self._slots), np.int32), np.zeros(height, np.int32)
        tokens_JT = np.zeros((height, width), np.int32)
        for row, (slot, tokens) in enumerate(jumps.items()):
            slots_J[row], counts_J[row], tokens_JT[row, : len(tokens)] = slot, len(tokens), tokens
        self._state, self._cache = programs.jump(
            self._config, self._shape, self._weights, self._state, self._cache, slots_J, tokens_JT, counts_J
        )

    def _abstract(self, size: Size) -> Any:
        """Shapes of state and cache of a size."""
        return programs.abstract(self._config, self._shape, size, harm_tag_id=self._harm_tag_id)

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
        a_block = self._steps_per_call * (self._shape.tokens_per_step if self._is_beamless else 1)
        most = [max(a_block, MOST_JUMPED if e.request.mask else 0) for e in entries]
        reached = (min(len(e.prompt) + e.num_tokens + new, e.need) for e, new in zip(entries, most, strict=True))
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
        lane, steps = self._abstract, self._steps_per_call
        found: list[Program] = []
        if self.entries and now != size:
            found.append((("resize", shape, now, size), lambda: programs.compile_resize(shape, lane(now), size)))
        readings = self._readings(joining)
        for reading in {(height, width, alike[0].prefix_len): None for height, width, alike in readings}:
            read = functools.partial(programs.compile_read, config, weights, *reading)
            join = functools.partial(programs.compile_join, config, shape, weights, *reading)
            found.append((("read", *reading), read))
            joined = functools.partial(lane, (reading[0], 1))
            key = ("join", shape, *reading, size)
            found.append((key, lambda join=join, joined=joined: join(lane(size), joined())))
        found.append(
            (("run", shape, size), lambda: programs.compile_run(config, shape, weights, lane(size), num_steps=steps))
        )
        return found

    def _readings(self, joining: Sequence[Entry]) -> list[tuple[int, int, list[Entry]]]:
        """Prompts read together: number of rows (a power of four), of tokens (a power of two), and the entries."""
        by_width: dict[tuple[int, Prefix | None], list[Entry]] = {}
        for entry in joining:
            width = bucket(len(entry.to_read), SMALLEST_BUCKET, self._config.max_seq_len)
            by_width.setdefault((width, entry.prefix), []).append(entry)
        found = []
        for (width, _), alike in by_width.items():
            while alike:
                height = 1
                while 3 * height <= len(alike) and 4 * height * width <= self._read_at_once:  # 3 of 4 rows are filled
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
        allowed_PX, prefix = programs.all_ids(self._config, self._shape, height), entries[0].prefix
        for row, entry in enumerate(entries):
            request, new = entry.request, entry.to_read
            tokens_PT[row, : len(new)], lengths_P[row], slots_P[row] = new, len(new), next(free)
            rows[row] = entry.settings()
            self._slots[slots_P[row]] = entry
            if request.mask is not None:
                of_request = (request.mask, request.method, request.end_ids)
                entry.mask = MaskedText(self._config, *of_request, self._harm_tag_id)
                allowed_PX[row] = entry.mask.allowed()
        before = () if prefix is None else (prefix.cache, np.int32(len(prefix.ids)))
        new_kv, logits_PV = programs.read_prompts(self._config, self._weights, tokens_PT, lengths_P, *before)
        self._watch(entries, logits_PV)
        pool = self._shape.num_dropped_from
        own = [entry.request.adjustment for entry in entries]
        adjustments = [*own, *[NEUTRAL] * (height - len(own))] if self._is_beamless else None
        tag = self._harm_tag_id
        wanted = asked.ask(rows, harm_tag_id=tag, max_pool=pool, allowed_PX=allowed_PX, adjustments=adjustments)
        levels = () if self._monitor is None else (self._prompt_levels(entries, new_kv, logits_PV),)
        self._state, self._cache = programs.join(
            self._config, self._shape, self._state, self._cache, wanted, slots_P, new_kv, logits_PV, *levels
        )
        if isinstance(self._shape, Lookups):
            text_PS = np.array(self._state.text_PS)
            for row, entry in enumerate(entries):
                text_PS[slots_P[row], : len(entry.prompt)] = entry.prompt
            self._state = self._state.replace(text_PS=text_PS)

    def _prompt_levels(self, entries: Sequence[Entry], new_kv: Cache, logits_PV: jax.Array) -> jax.Array:
        """The log of the monitor's level after every prompt."""
        lengths_P, last_P = np.zeros(len(logits_PV), np.int32), np.zeros(len(logits_PV), np.int32)
        for row, entry in enumerate(entries):
            lengths_P[row], last_P[row] = len(entry.prompt), entry.prompt[-1]
        model = self._config, self._monitor, self._weights
        return programs.prompt_log_levels(*model, new_kv, lengths_P, last_P, logits_PV)

    def _watch(self, entries: Sequence[Entry], logits_PV: jax.Array) -> None:
        """Computes the log-probs of the ids that these requests watch."""
        most = max(len(entry.request.watch_ids) for entry in entries)
        if not most:
            return
        ids_PI = np.zeros((len(logits_PV), bucket(most, 8, np.inf)), np.int32)
        for row, entry in enumerate(entries):
            ids_PI[row, : len(entry.request.watch_ids)] = entry.request.watch_ids
        found_PI = programs.log_probs_of(logits_PV, ids_PI)
        for row, entry in enumerate(entries):
            entry.watched = (found_PI, row)
