"""How monitors are named: `tag`, `refusal?header=TEXT&words=A|B`, or the folder of a linear head.

`?every=8` reads every eighth token only, where a whole text is read; `?header=` is where a refusal is read: by default
the header of the assistant's turn in the model's chat template. `?words=` are the beginnings of refusals.
"""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from safelm.inference.monitors import Monitor, RefusalProbability, TagProbability, check_monitor
from safelm.lm import LanguageModel
from safelm.safety import spec as specs
from safelm.safety.monitors.folder import is_head, read_head, stream_fingerprint
from safelm.text.prompting import assistant_header
from safelm.text.tokenizer import Tokenizer

TAG, REFUSAL = "tag", "refusal"
REFUSALS = ("I'm sorry", "I can't", "I cannot", "Sorry", "Unfortunately")
HELP = "tag (P(tag)), refusal[?header=TEXT&words=A|B] (P(refusal) at the header re-inserted), or a linear head's folder"


def load_monitor(spec: str, lm: LanguageModel, *, name: str = "") -> Monitor:
    """The monitor that a string names, for this model.

    Raises:
      ValueError: an unknown option, a head of another model or of an encoder, a model without the harm tag or, where
        no header is given, without a chat template.
      FileNotFoundError: no such folder.
    """
    place, options = _split(spec)
    every = options.pop("every", 1)
    if isinstance(every, bool) or not isinstance(every, int):
        raise ValueError(f"monitor {spec!r}: every={every!r}: must be a whole number")
    if place == REFUSAL:
        monitor: Monitor = _refusal(spec, options, every, lm.tokenizer, name)
    else:
        if options or (place == TAG and every != 1):
            raise ValueError(f"monitor {spec!r}: no option {min(options, default='every')!r} here")
        monitor = (
            TagProbability(lm.tokenizer.harm_tag_id, name or TAG) if place == TAG else _head(place, lm, name, every)
        )
    check_monitor(monitor, lm.config)
    return monitor


def add_monitor_flags(add: Callable[..., Any]) -> None:
    """Adds --monitor and --drop_above to a command that compares methods of decoding."""
    adds = "adds the method safe_beam_NAME, SafeBeam by this monitor in the place of P(tag); repeatable"
    add("--monitor", action="append", default=[], metavar="[NAME=]WHAT", help=f"{adds}: {HELP}")
    add("--drop_above", type=float, default=0.0, help="of --monitor: level up to which nothing is dropped (default 0)")


def parse_monitors(flags: Sequence[str], usual: Sequence[str] = ()) -> dict[str, str]:
    """`[NAME=]WHAT` flags as names and what they stand for. Raises ValueError for a name that comes twice."""
    found: dict[str, str] = {}
    for flag in flags or usual:
        name, equals, spec = flag.partition("=")
        if not equals or not name.isidentifier():
            name, spec = pathlib.PurePath(flag.partition("?")[0]).name, flag
        if name in found:
            raise ValueError(f"--monitor={flag}: {name} is there already; NAME={spec} names it")
        found[name] = spec
    return found


def header_ids(tokenizer: Tokenizer, header: str) -> tuple[int, ...]:
    """The ids of a header: of its text, or of the assistant's turn where it is empty."""
    return tuple(tokenizer.encode(header)) if header else assistant_header(tokenizer)


def refusal_ids(tokenizer: Tokenizer, words: Sequence[str]) -> tuple[int, ...]:
    """The first tokens of the beginnings of refusals. Raises ValueError for an empty one."""
    ids = [tokenizer.encode(word)[:1] for word in words]
    if not ids or not all(ids):
        raise ValueError("words of refusals: an empty one; want A|B")
    return tuple(sorted({first for (first,) in ids}))


def _split(spec: str) -> tuple[str, dict[str, Any]]:
    place, _, query = spec.partition("?")
    if not place:
        raise ValueError(f"monitor {spec!r}: want {HELP}")
    return place, specs.options(query, what="monitor")


def _refusal(spec: str, options: dict[str, Any], every: int, tokenizer: Tokenizer, name: str) -> RefusalProbability:
    header, words = str(options.pop("header", "")), str(options.pop("words", "|".join(REFUSALS)))
    if options:
        raise ValueError(f"monitor {spec!r}: no option {min(options)!r}; there is header, words, every")
    if not all(words.split("|")):
        raise ValueError(f"monitor {spec!r}: words={words}: an empty one; want A|B")
    ids = header_ids(tokenizer, header), refusal_ids(tokenizer, words.split("|"))
    return RefusalProbability(*ids, every=every, name=name or REFUSAL)


def _head(folder: str, lm: LanguageModel, name: str, every: int) -> Monitor:
    if not is_head(folder):
        raise FileNotFoundError(f"monitor {folder!r}: no monitor's folder; want {HELP}")
    head = read_head(folder)
    if head.is_encoder:
        raise ValueError(f"monitor {folder}: reads the encoder {head.source}, no decoder has its states")
    if not head.reads(lm.params, lm.tokenizer.hash, lm.tokenizer.harm_tag_id):
        own = stream_fingerprint(lm.params, lm.tokenizer.hash, lm.tokenizer.harm_tag_id)
        raise ValueError(
            f"monitor {folder}: trained on another model: {head.source} with fingerprint {head.fingerprint[:12]}, this "
            f"one has {own[:12]}"
        )
    return head.monitor(name, every)
