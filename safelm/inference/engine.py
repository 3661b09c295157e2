"""Continuous batching: many requests at once, each replaced by the next as soon as it is finished.

Requests whose methods share a program form a lane (`safelm.inference.lane`): greedy decoding and sampling together,
others by their numbers of beams and candidates. Each has a row of a slotted cache per beam. A request waits until its
rows and the tokens that it may come to fit what is left of both; requests are admitted in the order they came, so none
waits forever.
"""

import collections
import contextlib
import dataclasses
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from safelm.inference import ahead, programs
from safelm.inference.adjustments import check_adjustment
from safelm.inference.catalog import Catalog, Size
from safelm.inference.compiling import BackgroundCompiler
from safelm.inference.entry import Entry
from safelm.inference.lane import Lane
from safelm.inference.lookup import MOST_LOOKUP_TOKENS, Lookups
from safelm.inference.methods import Greedy, Method, check_ids, is_planned, steps_of
from safelm.inference.monitors import check_monitor
from safelm.inference.placement import place
from safelm.inference.plans import Plans
from safelm.inference.prefixes import Prefixes
from safelm.inference.prompts import TooLongError, check_prompt
from safelm.inference.reading import Reader
from safelm.inference.requests import EngineRequest, TraceCandidate, Update
from safelm.inference.token_mask import check_method
from safelm.inference.weights import Weights, prepare
from safelm.models import decoder as model
from safelm.models.config import ModelConfig

__all__ = ["Engine", "EngineRequest", "TraceCandidate", "Update"]


class Engine:
    """Decodes requests as they come. For one thread at a time.

    engine.submit(request)
    while not engine.is_idle:
        for update in engine.step(): ...
    """

    def __init__(
        self,
        config: ModelConfig,
        params: model.Params | Weights,
        *,
        harm_tag_id: int | None,
        slots: int = 8,
        max_tokens: int = 0,
        steps_per_call: int = 8,
        read_at_once: int = 512,
        read_between: int = 0,
        prefix_tokens: int = 0,
        lookup_tokens: int = 0,
        weights: str = "",
        products: str = "auto",
        mesh: Mesh | None = None,
        compiles_aside: bool = False,
    ):
        """An idle engine.

        Args:
          harm_tag_id: None if the vocabulary has no tag.
          slots: sequences decoded at once; beam methods take `num_beams` of them.
          max_tokens: of the cache: slots times the context, or up to 2,048 tokens of it, when 0.
          weights: one of `weights.WEIGHTS_DTYPES`; the config's dtype when empty. Prepared `params` stay as they are.
          products: "auto", "xla" or "native", the C++ kernels of CPUs: see `safelm.models.cpu_kernels`.
          mesh: splits weights and cache over its devices by `safelm.models.sharding`'s table.
          steps_per_call: tokens of every sequence between two looks at what is new: fewer answer (and cancel) sooner,
            more spend less time between steps.
          read_at_once: tokens of prompts in one forward, filling included; longer prompts are read in parts.
          read_between: tokens of prompts read between two blocks of steps; while prompts wait to be read, or have just
            been, a block is one step. So first tokens come soon and running replies don't stall. 0: prompts are read as
            soon as they have a slot, which takes the least time for all together.
          prefix_tokens: positions of keys and values kept of prompts and replies, for prompts that begin as they do;
            beside `max_tokens`. See `safelm.inference.prefixes`.
          lookup_tokens: of a sequence without beams, guessed from its prompt and text and checked in one forward pass
            with its next token: the same text in fewer passes where it copies; 0: none. See `safelm.inference.lookup`.
          compiles_aside: while requests are decoded, programs for new ones are compiled in another thread, and the new
            ones wait. When a request is decoded beside which then depends on time; its result doesn't, but for float
            rounding. Not with a mesh.

        Raises:
          ValueError: a size below 1, a tag outside the vocabulary, a mesh that doesn't divide the model, or one with
            `compiles_aside`; or `products` can't run here.
        """
        _check_sizes(slots=slots, steps=steps_per_call, read_at_once=read_at_once)
        _check_sizes(least=0, max_tokens=max_tokens, read_between=read_between)
        if not 0 <= lookup_tokens <= MOST_LOOKUP_TOKENS:
            raise ValueError(f"engine: lookup_tokens={lookup_tokens}: must be 0 to {MOST_LOOKUP_TOKENS}")
        if harm_tag_id is not None and not 0 <= harm_tag_id < config.vocab_size:
            raise ValueError(f"harm_tag_id={harm_tag_id} is not in the model's vocabulary of {config.vocab_size}")
        if compiles_aside and mesh is not None:
            raise ValueError("engine: compiles_aside=True: not with a mesh")
        self._config, self._harm_tag_id = config, harm_tag_id
        self._mesh = mesh
        self._weights = _prepared(config, params, weights, products, mesh)
        self._num_slots = slots
        self._max_tokens = max_tokens or slots * min(config.max_seq_len, 2048)
        self._lookup_tokens = lookup_tokens
        self._steps_per_call, self._read_between = steps_per_call, read_between
        self.prefixes = Prefixes(prefix_tokens)
        self._compiler = BackgroundCompiler() if compiles_aside else None
        of_all = {"harm_tag_id": harm_tag_id, "steps_per_call": steps_per_call}
        self._catalog = Catalog(config, self._weights, **of_all)
        most = min(read_at_once, read_between or read_at_once, config.max_seq_len)
        model = config, self._weights, self._catalog
        self._reader = Reader(*model, self.prefixes, most_tokens=most, compiler=self._compiler)
        self._ahead: dict[programs.StepShape, list[Size]] = {}
        self._lanes: dict[programs.StepShape, Lane] = {}
        self._waiting: collections.deque[Entry] = collections.deque()
        self._cancelled: list[int] = []
        self._num_submitted = 0
        self._plans = Plans(self.submit, self._cancelled.append)

    @property
    def num_waiting(self) -> int:
        """Requests without a slot yet."""
        return len(self._waiting)

    @property
    def num_active(self) -> int:
        """Requests with a slot."""
        return sum(len(lane.entries) for lane in self._lanes.values())

    @property
    def tokens_reserved(self) -> int:
        """Tokens of cache that the active requests may come to, all rows together; at most `max_tokens`."""
        return sum(lane.tokens_with() for lane in self._lanes.values())

    @property
    def is_idle(self) -> bool:
        """Whether nothing is active, waiting or still to be told."""
        return not (self._waiting or self._cancelled or self.num_active)

    def compile_ahead(self, methods: Sequence[Method], *, longest: int) -> Iterator[None]:
        """Compiles what requests of these methods need up to a length of prompt and reply, a program at each step.

        So that with `compiles_aside` none of them waits for the compiler. Methods with more beams than slots are left.
        """
        longest = min(longest, self._config.max_seq_len)
        for shape in dict.fromkeys(map(self._shape_of, methods)):
            most = {"max_prompts": self._num_slots // shape.num_rows, "max_tokens": self._max_tokens}
            sizes = ahead.sizes_ahead(self._catalog, shape, longest=longest, **most)
            for key, compile_it in ahead.programs_ahead(self._catalog, shape, sizes, self._reader.sizes):
                with self._on_mesh():
                    self._compile(key, compile_it)
                yield
            self._ahead[shape] = sizes
            self._lanes = {other: lane for other, lane in self._lanes.items() if other != shape or lane.entries}
        for key, compile_it in ahead.reading_ahead(self._catalog, longest, self._reader.sizes):
            with self._on_mesh():
                self._compile(key, compile_it)
            yield

    def _compile(self, key: Hashable, compile_it: Callable[[], object]) -> None:
        if self._compiler is None:
            compile_it()
        elif not self._compiler.is_made(key):
            self._compiler.note([(key, compile_it)])
            compile_it()

    def keep_prefix(self, ids: Sequence[int]) -> None:
        """Reads a prefix once; prompts submitted later that begin with it start from its keys and values.

        If a prompt begins with several kept prefixes, the longest is used. Their cache is not part of `max_tokens`.

        Raises:
          ValueError: the prefix is empty, leaves no room in the context, or has an id outside the vocabulary.
        """
        prefix = check_prompt(self._config, ids, max_new_tokens=2, name="prefix")
        if self.prefixes.is_pinned(prefix):
            return
        request = EngineRequest(tuple(prefix), Greedy(), 1, ())
        with self._on_mesh():
            self.prefixes.pin(prefix, self._reader.row_of(Entry(-1, request, prefix)))

    def drop_prefix(self, ids: Sequence[int]) -> None:
        """Drops a kept prefix; requests that started from it aren't affected."""
        self.prefixes.unpin(ids)

    def check(self, request: EngineRequest) -> list[int]:
        """The prompt's ids.

        Raises:
          ValueError: it can never run: an id is outside the vocabulary, the method needs more slots or the harm tag and
            there are none, or it takes no token mask or no adjustment. TooLongError: prompt and new tokens don't fit
            the context or the cache.
        """
        if request.plan is not None:
            request = dataclasses.replace(request, method=steps_of(request.method))
        if is_planned(request.method):
            raise ValueError(f"{type(request.method).__name__} needs a request's plan (safelm.inference.planning)")
        check_ids(self._config, request.method, request.end_ids, self._harm_tag_id, request.watch_ids)
        check_adjustment(request.adjustment, request.method, self._config.vocab_size)
        if request.mask is not None:
            check_method(request.method)
        prompt = check_prompt(self._config, request.prompt, max_new_tokens=request.max_new_tokens, name="prompt")
        if (monitor := getattr(request.method, "monitor", None)) is not None:
            check_monitor(monitor, self._config, num_tokens=len(prompt) + request.max_new_tokens)
        shape = self._shape(request)
        if shape.num_rows > self._num_slots:
            raise ValueError(f"num_beams={shape.num_rows} is more than the engine's {self._num_slots} slots")
        tokens = self._lane(shape).tokens_alone(Entry(-1, request, prompt))
        if tokens > self._max_tokens:
            raise TooLongError(
                f"the prompt's {len(prompt)} tokens and max_new_tokens={request.max_new_tokens} take {tokens} tokens "
                f"of cache, the engine's has {self._max_tokens}"
            )
        return prompt

    def submit(self, request: EngineRequest) -> int:
        """Queues a request; returns its id. Raises ValueError as `check` does, or its plan."""
        prompt = self.check(request)
        if request.plan is not None:
            return self._plans.begin(request)
        self._waiting.append(Entry(self._num_submitted, request, prompt))
        self._num_submitted += 1
        return self._num_submitted - 1

    def cancel(self, request_id: int) -> None:
        """Frees the request's slot, or its place in the queue, at the next step; of a finished one: nothing."""
        self._cancelled.append(self._plans.under_way(request_id))

    def clear(self) -> None:
        """Drops all requests without updates."""
        self._waiting.clear()
        self._lanes.clear()
        self._cancelled.clear()
        self._plans.clear()

    def step(self) -> list[Update]:
        """Admits what fits, runs one block of steps for what is active; returns what is new ([] when idle)."""
        with self._on_mesh():
            updates = self._step()
        return self._plans.advance(updates)

    def _on_mesh(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)

    def _step(self) -> list[Update]:
        updates = self._drop_cancelled()
        for lane in self._lanes.values():  # what runs comes first
            lane.look_ahead()
        joining = self._admissible()
        for shape, lane in list(self._lanes.items()):
            try:
                lane.admit(joining.get(shape, ()), self._room(shape))
                num_read, is_busy = lane.num_read, self._compiler is not None and self._is_decoding
                lane.read(self._read_between, may_wait=is_busy)
                if lane.num_read:
                    is_news = self._read_between and (lane.num_unread or lane.num_read > num_read)
                    most_steps = 1 if is_news else self._steps_per_call
                    updates += lane.run(stops_early=bool(self._waiting), most_steps=most_steps)
            except jax.errors.JaxRuntimeError as error:  # out of memory, a lost device: of this lane's requests alone
                failed = {entry.request_id: entry for entry in [*lane.entries, *joining.get(shape, ())]}
                updates += [Update(request_id, finished="error", error=str(error)) for request_id in failed]
                del self._lanes[shape]
        return updates

    @property
    def _is_decoding(self) -> bool:
        return any(lane.num_read for lane in self._lanes.values())

    def _room(self, shape: programs.StepShape) -> int:
        """Positions that a lane's cache may have beside what the others may grow to."""
        return self._max_tokens - sum(lane.tokens_with() for other, lane in self._lanes.items() if other != shape)

    def _shape(self, request: EngineRequest) -> programs.StepShape:
        """That of the request's lane; a masked text is followed token by token, so nothing is looked up for it."""
        return self._shape_of(request.method) if request.mask is None else programs.step_shape(request.method)

    def _shape_of(self, method: Method) -> programs.StepShape:
        """Of unmasked texts."""
        shape = programs.step_shape(method)
        if self._lookup_tokens and shape == programs.Sequences():
            return Lookups(tokens_per_step=1 + self._lookup_tokens)
        return shape

    def _lane(self, shape: programs.StepShape) -> Lane:
        if shape not in self._lanes:
            self._lanes[shape] = Lane(
                self._config,
                self._weights,
                shape,
                harm_tag_id=self._harm_tag_id,
                max_prompts=self._num_slots // shape.num_rows,
                steps_per_call=self._steps_per_call,
                catalog=self._catalog,
                reader=self._reader,
                compiler=self._compiler,
                ahead=self._ahead.get(shape, ()),
            )
        return self._lanes[shape]

    def _drop_cancelled(self) -> list[Update]:
        updates = []
        for request_id in self._cancelled:
            is_waiting = any(entry.request_id == request_id for entry in self._waiting)
            if is_waiting or any(lane.remove(request_id) for lane in self._lanes.values()):
                updates.append(Update(request_id, finished="cancelled"))
        cancelled = set(self._cancelled)
        self._waiting = collections.deque(entry for entry in self._waiting if entry.request_id not in cancelled)
        self._cancelled.clear()
        return updates

    def _admissible(self) -> dict[programs.StepShape, Sequence[Entry]]:
        """Takes from the queue's head what fits into the slots and the cache, and needs no compiling meanwhile."""
        is_busy = self._compiler is not None and self._is_decoding
        joining: dict[programs.StepShape, list[Entry]] = {}
        rows_left = self._num_slots - sum(len(lane.entries) * shape.num_rows for shape, lane in self._lanes.items())
        tokens = {shape: lane.tokens_with() for shape, lane in self._lanes.items()}
        while self._waiting:
            entry = self._waiting[0]
            shape = self._shape(entry.request)
            lane = self._lane(shape)
            with_it = lane.tokens_with([*joining.get(shape, ()), entry])
            others = sum(count for other, count in tokens.items() if other != shape)
            if shape.num_rows > rows_left or others + with_it > self._max_tokens:
                break
            if is_busy and not lane.is_ready([*joining.get(shape, ()), entry], self._max_tokens - others):
                break
            tokens[shape] = with_it
            rows_left -= shape.num_rows
            joining.setdefault(shape, []).append(self._waiting.popleft())
        return joining


def _check_sizes(least: int = 1, **sizes: int) -> None:
    for name, value in sizes.items():
        if value < least:
            raise ValueError(f"engine: {name}={value}: must be at least {least}")


def _prepared(
    config: ModelConfig, params: model.Params | Weights, dtype: str, products: str, mesh: Mesh | None
) -> Weights:
    """The weights as the engine uses them, on the mesh's devices if there is one."""
    if not isinstance(params, Weights):
        params = prepare(config, params, dtype, products=products, has_mesh=mesh is not None)
    return params if mesh is None else place(config, params, mesh)
