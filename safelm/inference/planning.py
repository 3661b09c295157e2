"""The plans of methods and knobs that look before they go on, bound to a vocabulary.

Any-Depth Alignment (Zhang et al. 2025, arXiv 2510.18081, the variant that rethinks): every `check_every` tokens the
assistant's header is put behind the answer so far, as if its turn began anew, and the model continues greedily for
`rethink_tokens`. If it refuses there, the refusal is the answer; if not, the header and what followed are forgotten.

Self-stopping: a model that learned notes with a verdict (`docs/notes.md`) is made to begin one every `check_every`
tokens, and where it begins one by itself; the answer is withheld once P(unsafe) over that of both verdicts reaches the
threshold. A note that it wrote by itself stays in what the model reads and is left out of the answer.

An answer that may still be withheld is told whole, at its end: only refusal tokens, which decide at the start, stream.
What is said in the place of one has no more tokens than it might have had.
"""

import dataclasses
import math
from collections.abc import Sequence

from safelm.documents.notes import VERDICTS
from safelm.inference.knobs import REFUSAL, BoundKnob, Knob
from safelm.inference.methods import AnyDepth, Greedy, Method, SelfStop, is_planned, steps_of
from safelm.inference.plans import Ask, Plan
from safelm.inference.requests import EngineRequest, Update
from safelm.models.config import ModelConfig
from safelm.text.control_tokens import control_id
from safelm.text.prompting import assistant_header
from safelm.text.refusals import has_refusal
from safelm.text.tokenizer import Tokenizer

_LONGEST_NOTE = 128  # tokens


@dataclasses.dataclass(frozen=True)
class Planner:
    """Makes the plan of a request: `EngineRequest.plan`.

    Attributes:
      message: of a red flag's knob, what is said in place of an answer.
      context: tokens that the model can read; where a look would go beyond them, there is none.
    """

    tokenizer: Tokenizer
    method: Method
    is_chat: bool
    knob: BoundKnob | None = None
    message: str = ""
    context: int = 0

    @property
    def flag_id(self) -> int | None:
        """What takes the harm tag's place in the engine; None: nothing."""
        return self.knob.flag_id if self.knob else None

    def __call__(self, request: EngineRequest) -> Plan:
        """The plan of a request. Raises ValueError for what the method takes from none."""
        if is_planned(self.method):
            _check_pieces(request, self.method)
        if self.knob is None:
            return self._by_method(request)
        return self._from_the_start(request) if self.knob.kind == REFUSAL else self._until_flagged(request)

    def _by_method(self, request: EngineRequest) -> Plan:
        if isinstance(self.method, AnyDepth):
            return _any_depth(request, self.method, self)
        if isinstance(self.method, SelfStop):
            return _self_stop(request, self.method, self)
        return _plain(request)

    def _from_the_start(self, request: EngineRequest) -> Plan:
        first = yield Ask(_look(request, request.prompt, self.knob.token_ids))
        chosen = self.knob.choice(first.watched)
        left = request.max_new_tokens - 1
        if left < 1:
            yield dataclasses.replace(first, tokens=(), tag_probs=(), finished="length", log_prob=0.0, untold=1)
            return
        request = dataclasses.replace(request, prompt=(*request.prompt, chosen), max_new_tokens=left)
        yield from _opened(self._by_method(request))

    def _until_flagged(self, request: EngineRequest) -> Plan:
        (threshold,), watching = self.knob.thresholds, (*self.knob.token_ids, *request.watch_ids)

        def is_flagged(update: Update) -> bool:
            at_start = update.watched[:1] and self.knob.values_at_start(update.watched)[0] >= threshold
            return bool(at_start) or any(prob >= threshold for prob in update.tag_probs)

        result = yield Ask(dataclasses.replace(request, watch_ids=watching), stops=is_flagged)
        if is_flagged(result):
            yield _withheld(request, self.tokenizer.encode(self.message))
        else:
            yield dataclasses.replace(result, watched=result.watched[1:])


def planner(
    config: ModelConfig, tokenizer: Tokenizer, method: Method, *, is_chat: bool = False, knob: Knob | None = None
) -> Planner | None:
    """The plans of a method with a knob; None where requests need no plan.

    Raises ValueError where the vocabulary lacks a control token, or knob and method don't go together.
    """
    if knob is None and not is_planned(method):
        return None
    if knob is not None and knob.kind != REFUSAL and is_planned(method):
        raise ValueError(f"a knob of {knob.kind} doesn't go with {type(method).__name__}, which withholds by itself")
    if knob is not None and knob.kind != REFUSAL and getattr(method, "monitor", None) is not None:
        raise ValueError(f"a knob of {knob.kind} steers SafeBeam by itself, in the place of a monitor")
    if isinstance(method, AnyDepth):
        _header(method, tokenizer, is_chat)
    if isinstance(method, SelfStop):
        _verdicts(tokenizer)
        control_id(tokenizer, method.open_token)
    message = knob.message if knob else ""
    bound = knob.bound(tokenizer) if knob else None
    return Planner(tokenizer, method, is_chat, bound, message, config.max_seq_len)


def _check_pieces(request: EngineRequest, method: Method) -> None:
    """Raises ValueError for what counts from an answer's beginning, where answers are made in pieces."""
    penalties = request.adjustment.presence_penalty or request.adjustment.frequency_penalty
    if request.mask is not None or penalties or request.want_trace:
        raise ValueError(f"{type(method).__name__} takes no token mask, no penalties and has no trace")


def _opened(plan: Plan) -> Plan:
    """A plan whose answer begins with a token that isn't told."""
    step = next(plan)
    while step is not None:
        is_answer = isinstance(step, Update) or step.streams
        result = yield dataclasses.replace(step, untold=1) if is_answer else step
        step = None if is_answer else plan.send(result)


def _plain(request: EngineRequest) -> Plan:
    yield Ask(request, streams=True)


def _look(request: EngineRequest, prompt: Sequence[int], ids: Sequence[int]) -> EngineRequest:
    """Asks for the log-probs of some ids as the next token."""
    return EngineRequest(tuple(prompt), Greedy(), 1, request.end_ids, watch_ids=tuple(ids))


def _withheld(request: EngineRequest, tokens: Sequence[int]) -> Update:
    return Update(-1, tokens=tuple(tokens[: request.max_new_tokens]), finished="withheld")


def _any_depth(request: EngineRequest, method: AnyDepth, planner: Planner) -> Plan:
    header, said = _header(method, planner.tokenizer, planner.is_chat), Update(-1)
    inner = steps_of(method)
    while True:
        left = request.max_new_tokens - len(said.tokens)
        prompt = (*request.prompt, *said.tokens)
        piece = yield Ask(
            dataclasses.replace(
                request, prompt=prompt, method=inner, max_new_tokens=min(method.check_every, left), watch_ids=()
            )
        )
        said = _longer(said, piece)
        seen = said.tokens[:-1] if piece.finished in ("eos", "tag") else said.tokens
        rethink = min(method.rethink_tokens, planner.context - len(request.prompt) - len(seen) - len(header))
        if seen and rethink > 0:
            again = (*request.prompt, *seen, *header)
            thought = yield Ask(
                dataclasses.replace(request, prompt=again, method=inner, max_new_tokens=rethink, watch_ids=())
            )
            own = thought.tokens[:-1] if thought.finished in ("eos", "tag") else thought.tokens
            if has_refusal(planner.tokenizer.decode(own, keep_special=False)):
                yield _withheld(request, own)
                return
        if piece.finished != "length" or len(said.tokens) >= request.max_new_tokens:
            yield said
            return


def _self_stop(request: EngineRequest, method: SelfStop, planner: Planner) -> Plan:
    tokenizer = planner.tokenizer
    open_id, close_id = (control_id(tokenizer, token) for token in (method.open_token, method.close_token))
    verdict, unsafe, safe = _verdicts(tokenizer)
    inner, context, said = steps_of(method), tuple(request.prompt), Update(-1)
    while True:
        left = min(request.max_new_tokens - len(said.tokens), planner.context - len(context))
        ends = {"end_ids": (*request.end_ids, open_id), "watch_ids": (), "method": inner}
        piece = yield Ask(
            dataclasses.replace(request, prompt=context, max_new_tokens=min(method.check_every, left), **ends)
        )
        begins_note = piece.tokens[-1:] == (open_id,)
        if begins_note:
            piece = dataclasses.replace(piece, tokens=piece.tokens[:-1], tag_probs=piece.tag_probs[:-1])
        said = _longer(said, piece)
        context = (*context, *piece.tokens)
        read = context[:-1] if piece.finished in ("eos", "tag") and not begins_note else context
        ask = (*read, open_id, *verdict)
        if len(ask) < planner.context:
            found = yield Ask(_look(request, ask, (unsafe, safe)))
            if 1 / (1 + math.exp(min(found.watched[1] - found.watched[0], 700.0))) >= method.threshold:
                yield _withheld(request, tokenizer.encode(method.message))
                return
        room = planner.context - len(context) - 1
        if begins_note and room > 0:
            note = yield Ask(
                dataclasses.replace(
                    request,
                    prompt=(*context, open_id),
                    method=inner,
                    max_new_tokens=min(_LONGEST_NOTE, room),
                    end_ids=(*request.end_ids, close_id),
                    watch_ids=(),
                )
            )
            context = (*context, open_id, *note.tokens)
        over = piece.finished != "length" and not begins_note
        if over or len(said.tokens) >= request.max_new_tokens or len(context) + 1 >= planner.context:
            yield dataclasses.replace(said, finished="length" if not over else piece.finished)
            return


def _longer(said: Update, piece: Update) -> Update:
    """An answer so far with its next piece, which is a request of its own."""
    return dataclasses.replace(piece.behind(said), log_prob=said.log_prob + piece.log_prob, watched=piece.watched)


def _header(method: AnyDepth, tokenizer: Tokenizer, is_chat: bool) -> tuple[int, ...]:
    if method.header:
        return tuple(tokenizer.encode(method.header))
    if not is_chat:
        raise ValueError("any_depth re-inserts the assistant's header: it needs a chat, or a header that is given")
    return assistant_header(tokenizer)


def _verdicts(tokenizer: Tokenizer) -> tuple[tuple[int, ...], int, int]:
    """The ids of a note's words up to its verdict, and the first ids in which the two verdicts differ."""
    safe, unsafe = (tokenizer.encode(f"Verdict: {verdict} (") for verdict in VERDICTS)
    at = next((i for i, (a, b) in enumerate(zip(safe, unsafe, strict=False)) if a != b), 0)
    if not at:
        raise ValueError(f"{tokenizer.origin}: the two verdicts can't be told apart by a token behind 'Verdict:'")
    return tuple(safe[:at]), unsafe[at], safe[at]
