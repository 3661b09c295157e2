"""A lane: the prompts that one decoding program steps together, and their cache."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from safelm.inference import asked, chunks, programs
from safelm.inference.adjustments import NEUTRAL
from safelm.inference.catalog import Catalog, Size
from safelm.inference.compiling import BackgroundCompiler, Program
from safelm.inference.entry import Entry, watch
from safelm.inference.kv_cache import Cache
from safelm.inference.lookup import Lookups
from safelm.inference.prompts import bucket
from safelm.inference.reading import Reader, Reading
from safelm.inference.requests import Update
from safelm.inference.tag_probability import LOGITS_AT_ONCE
from safelm.inference.token_mask import MaskedText
from safelm.inference.weights import Weights
from safelm.models.config import ModelConfig

MOST_JUMPED, FEWEST_JUMPED = 16, 4  # tokens of a text in one forward, filling included


class Lane:
    """Slots for prompts whose methods share a program, with a cache that grows and shrinks as needed.

    The cache has `shape.num_rows` times a power of four rows (or the largest possible number). Its length is a power of
    two that holds the longest prompt after the next block of steps. Reservations count what the prompts may still grow
    to. With a compiler a larger cache that has its programs is preferred to a smaller one that hasn't.
    Rows and not blocks: XLA reads a row where it lies, blocks it would gather into a copy at every step.
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
        catalog: Catalog,
        reader: Reader,
        compiler: BackgroundCompiler | None = None,
        ahead: Sequence[Size] = (),
    ):
        """`ahead`: sizes whose programs were compiled ahead."""
        self._config, self._weights, self._shape = config, weights, shape
        self._harm_tag_id, self._max_prompts, self._steps_per_call = harm_tag_id, max_prompts, steps_per_call
        self._catalog, self._reader, self._compiler = catalog, reader, compiler
        self._ahead = sorted(ahead, key=lambda size: (size[0] * size[1], size))
        self._is_beamless = isinstance(shape, programs.Sequences)  # every token is final at once
        self._has_levels = harm_tag_id is not None or getattr(shape, "monitor", None) is not None
        self._slots: list[Entry | None] = []
        self._unread: list[Entry] = []
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

    @property
    def num_read(self) -> int:
        """The requests whose prompts are read."""
        return len(self.entries) - len(self._unread)

    @property
    def num_unread(self) -> int:
        """The others with a slot."""
        return len(self._unread)

    def remove(self, request_id: int) -> bool:
        """Frees a request's slot; returns False if it has none here."""
        for slot, entry in enumerate(self._slots):
            if entry is not None and entry.request_id == request_id:
                self._free(slot)
                self._unread = [other for other in self._unread if other is not entry]
                return True
        return False

    def admit(self, joining: Sequence[Entry], room: int) -> None:
        """Gives these requests slots, and resizes the cache for the next block; it has at most `room` positions."""
        if not self.entries and not joining:
            self._slots, self._state, self._cache = [], None, None
            return
        size = self._ready_size(joining, room) or self._least_size(joining)
        if self._compiler is not None:
            self._compiler.note(self._programs(size))
        self._fit(*size)
        free = iter([slot for slot, entry in enumerate(self._slots) if entry is None])
        for entry in joining:
            self._slots[next(free)] = entry
        self._unread += joining

    def read(self, budget: int, *, may_wait: bool) -> None:
        """Reads the prompts that wait, up to `budget` tokens of them; 0: all. `may_wait` as in `Reader.next`."""
        left = budget
        while self._unread and (left > 0 or not budget):
            reading = self._reader.next(self._unread, self._needs, may_wait=may_wait)
            if reading is None:
                return
            left -= reading.size
            self._read(reading)

    def is_ready(self, joining: Sequence[Entry], room: int) -> bool:
        """Whether these can be admitted without compiling here; if not, compilation starts in another thread."""
        return self._ready_size(joining, room) is not None

    def look_ahead(self) -> None:
        """Starts compiling the programs that the current requests will need as they grow."""
        needs = [entry.need for entry in self.entries]
        if self._compiler is not None and needs and self._catalog.length(max(needs)) > self._max_len:
            self._compiler.has(self._programs((len(self._slots), self._catalog.length(self._max_len + 1))))

    def run(self, *, stops_early: bool, most_steps: int) -> list[Update]:
        """Runs one block of up to `most_steps` steps; with `stops_early` only until the first prompt is over."""
        is_masked = any(entry.mask is not None for entry in self.entries)
        updates, jumped = self._follow_masks() if is_masked else ([], ())
        is_wanted_P = np.array([e is not None and e.is_read and i not in jumped for i, e in enumerate(self._slots)])
        self._state, self._cache, report = programs.run(
            self._config,
            self._shape,
            self._weights,
            self._state,
            self._cache,
            is_wanted_P,
            np.bool_(stops_early),
            np.int32(1 if is_masked else most_steps),
            num_steps=self._steps_per_call,
        )
        wants_trace = any(entry.request.want_trace for entry in self.entries)
        report = jax.device_get({key: value for key, value in report.items() if key != "tried" or wants_trace})
        for slot, entry in enumerate(self._slots):
            if entry is None or not entry.is_read:
                continue
            is_over, num_tokens = bool(report["is_over_P"][slot]), int(report["step_P"][slot])
            if "tried" in report:
                entry.note(report["tried"], slot, num_tokens)
            entry.num_tokens = num_tokens
            if is_over or not entry.request.want_trace:  # a trace is of a whole text
                tokens_T, levels_T, _, *others = (array[slot] for array in report["outcome"])
                outcome = tokens_T, levels_T, report["num_final_P"][slot], *others
                update = entry.update(outcome, is_over=is_over, has_tag=self._has_levels)
                updates += [update] if update.tokens or update.finished else []
                if update.finished:
                    self._free(slot)
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
            is_last = left < 2 or ends_P[slot] != asked.RUNNING  # nothing is chosen behind its next token
            if entry is None or not entry.is_read or entry.mask is None or (is_last and not entry.mask.error):
                continue
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
        size = len(self._slots), self._max_len
        return self._compiler.has([self._catalog.jump(self._shape, size, *self._jump_size(jumps))])

    def _jump(self, jumps: Mapping[int, Sequence[int]]) -> None:
        height, width = self._jump_size(jumps)
        slots_J, counts_J = np.full(height, len(self._slots), np.int32), np.zeros(height, np.int32)
        tokens_JT = np.zeros((height, width), np.int32)
        for row, (slot, tokens) in enumerate(jumps.items()):
            slots_J[row], counts_J[row], tokens_JT[row, : len(tokens)] = slot, len(tokens), tokens
        self._state, self._cache = programs.jump(
            self._config, self._shape, self._weights, self._state, self._cache, slots_J, tokens_JT, counts_J
        )

    def _tokens(self, entries: Sequence[Entry]) -> int:
        longest = max((entry.need for entry in entries), default=0)
        return self._num_slots(len(entries)) * self._shape.num_rows * self._catalog.length(longest) if entries else 0

    def _num_slots(self, num_entries: int) -> int:
        return bucket(num_entries, 1, self._max_prompts, factor=4)

    def _least_size(self, joining: Sequence[Entry]) -> Size:
        """Number of slots and cache length that the next block needs."""
        entries = [*self.entries, *joining]
        a_block = self._steps_per_call * (self._shape.tokens_per_step if self._is_beamless else 1)
        most = [max(a_block, MOST_JUMPED if e.request.mask else 0) for e in entries]
        reached = (min(len(e.prompt) + e.num_tokens + new, e.need) for e, new in zip(entries, most, strict=True))
        return self._num_slots(len(entries)), self._catalog.length(max(reached))

    def _ready_size(self, joining: Sequence[Entry], room: int) -> Size | None:
        """The least size, one in which nothing shrinks, or one compiled ahead, whose programs are compiled.

        None if there is none of at most `room` positions.
        """
        least = self._least_size(joining)
        if self._compiler is None:
            return least
        roomy = max(least[0], len(self._slots)), max(least[1], self._max_len if self._slots else 0)
        ahead = (size for size in self._ahead if size[0] >= roomy[0] and size[1] >= roomy[1])
        fitting = (size for size in ahead if size[0] * size[1] * self._shape.num_rows <= room)
        sizes = least, roomy, *fitting
        return next((size for size in sizes if self._compiler.has(self._wanted(size, joining))), None)

    def _programs(self, size: Size) -> list[Program]:
        """The programs that `admit` and `run` will call."""
        now, run = (len(self._slots), self._max_len), self._catalog.run(self._shape, size)
        return [self._catalog.resize(self._shape, now, size), run] if self.entries and now != size else [run]

    def _wanted(self, size: Size, joining: Sequence[Entry]) -> list[Program]:
        """Those, and what puts the prompts that wait into a lane of this size."""
        unread, found = [*self._unread, *joining], self._programs(size)
        if unread:
            found += [self._catalog.place(self._shape, size, chunk) for chunk in self._reader.sizes]
        if (longest := max((len(entry.prompt) for entry in unread), default=0)) > self._reader.sizes[-1]:
            lengths = self._catalog.lengths(longest)
            found += [self._catalog.put_behind(self._shape, size, length) for length in lengths]
        return found

    def _needs(self, reading: Reading) -> list[Program]:
        """The programs that put a chunk into the lane."""
        size = len(self._slots), self._max_len
        if not reading.finished:
            return []
        found = [self._catalog.start(self._shape, reading.size), self._catalog.place(self._shape, size, reading.size)]
        if any(part.begin for part in reading.finished):
            found.append(self._catalog.put_behind(self._shape, size, reading.behind_len))
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

    def _read(self, reading: Reading) -> None:
        chunk, new_kv, logits_GV = self._reader.read(reading)
        ended = reading.finished
        if not ended:
            return
        slot_of = {id(entry): slot for slot, entry in enumerate(self._slots) if entry is not None}
        slots = [slot_of[id(part.entry)] for part in ended]
        for slot, part in zip(slots, ended, strict=True):
            if part.begin:
                self._cache = programs.put_behind(self._shape, self._cache, np.int32(slot), reading.behind.cache)
        entries = [part.entry for part in ended]
        watch(entries, logits_GV)
        self._place(chunk, entries, slots, new_kv, logits_GV)
        self._unread = [entry for entry in self._unread if entry not in entries]
        for slot, entry in zip(slots, entries, strict=True):
            entry.is_read, entry.behind = True, None
            self._keep(slot, entry.prompt)

    def _place(
        self, chunk: chunks.Chunk, entries: Sequence[Entry], slots: Sequence[int], new_kv: Cache, logits_GV: jax.Array
    ) -> None:
        """Puts the prompts that end in a chunk, the first ones of its tokens, into their slots."""
        height = len(chunk.last_G)
        slots_G, slots_T = (np.full(size, len(self._slots), np.int32) for size in (height, len(chunk.tokens_T)))
        rows: list[Any] = [None] * height
        allowed_GX = programs.all_ids(self._config, self._shape, height)
        for row, (entry, slot) in enumerate(zip(entries, slots, strict=True)):
            slots_G[row], rows[row] = slot, entry.settings()
            slots_T[chunk.prompts_T == row] = slot
            if (mask := entry.request.mask) is not None:
                of_request = (mask, entry.request.method, entry.request.end_ids)
                entry.mask = MaskedText(self._config, *of_request, self._harm_tag_id)
                allowed_GX[row] = entry.mask.allowed()
        own = [entry.request.adjustment for entry in entries]
        adjustments = [*own, *[NEUTRAL] * (height - len(own))] if self._is_beamless else None
        pool, tag = self._shape.num_dropped_from, self._harm_tag_id
        wanted = asked.ask(rows, harm_tag_id=tag, max_pool=pool, allowed_PX=allowed_GX, adjustments=adjustments)
        fresh = programs.start(self._config, self._shape, wanted, logits_GV)
        model, of_chunk = (self._config, self._shape, self._weights), (slots_G, chunk, slots_T, new_kv, logits_GV)
        self._state, self._cache = programs.place(*model, self._state, self._cache, fresh, *of_chunk)
        if isinstance(self._shape, Lookups):
            text_PS = np.array(self._state.text_PS)
            for entry, slot in zip(entries, slots, strict=True):
                text_PS[slot, : len(entry.prompt)] = entry.prompt
            self._state = self._state.replace(text_PS=text_PS)

    def _free(self, slot: int) -> None:
        """Frees a slot; what was read and said there is kept for prompts that go on from it."""
        entry, self._slots[slot] = self._slots[slot], None
        if entry.is_read and self._is_beamless and len(entry.tokens) > 1:  # the last one may not be in the cache
            self._keep(slot, [*entry.prompt, *entry.tokens[:-1]])

    def _keep(self, slot: int, ids: Sequence[int]) -> None:
        """Keeps a slot's first tokens, if they are wanted and no program has to be compiled here."""
        max_len, size = self._catalog.length(len(ids)), (len(self._slots), self._max_len)
        if not self._reader.prefixes.wants(ids, max_len):
            return
        if self._compiler is None or self._compiler.has([self._catalog.take_slot(self._shape, size, max_len)]):
            row = programs.take_slot(self._shape, self._cache, np.int32(slot), max_len=max_len)
            self._reader.prefixes.add(ids, row)
