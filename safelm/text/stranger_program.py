"""Runs what strangers wrote: reads one JSON line, writes one.

`safelm.text.stranger_worker` runs this file as a process.

The file imports nothing from SafeLM, so that the process starts fast and holds no secrets. A line has a chat template,
the values it may use, and the marks to insert where `{% generation %}` begins and ends; or the parts of a tokenizer
that cut texts, and texts to try them on.
"""

import datetime
import functools
import json
import resource
import signal
import sys
import time
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox

_SECONDS = 0.5  # of processor time for cutting one text, which takes some milliseconds
_GROWTH = 64  # of a text by its normalizer
_ANY_DAY = datetime.date(2026, 1, 1)  # for templates that tell the date: a score must not depend on it


class GenerationTag(jinja2.ext.Extension):
    """The tag `{% generation %}`: puts the marks `generation_marks` around text that the assistant is trained on."""

    tags = frozenset({"generation"})

    def parse(self, parser: Any) -> list[Any]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return [self._mark(0, line), *body, self._mark(1, line)]

    def _mark(self, place: int, line: int) -> Any:
        marks = jinja2.nodes.Name("generation_marks", "load", lineno=line)
        mark = jinja2.nodes.Getitem(marks, jinja2.nodes.Const(place, lineno=line), "load", lineno=line)
        return jinja2.nodes.Output([mark], lineno=line)


def refuse(message: str) -> None:
    """The function `raise_exception` of templates."""
    raise jinja2.TemplateError(message)


def to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """The filter `tojson` without HTML escapes, as transformers has it."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.lru_cache(maxsize=16)
def compiled(source: str) -> jinja2.Template:
    """A template compiled with transformers' settings: trimmed blocks, loop controls, `raise_exception`."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, "jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = _ANY_DAY.strftime
    environment.filters["tojson"] = to_json
    return environment.from_string(source)


def try_cutting(parts: dict[str, Any], texts: list[str]) -> None:
    """Cuts texts as a tokenizer does. Raises ValueError if that takes too long or the texts grow too much."""
    import tokenizers  # templates don't need it

    model = {"type": "BPE", "vocab": {}, "merges": []}
    spec = {"version": "1.0", "added_tokens": [], "post_processor": None, "model": model, **parts}
    backend = tokenizers.Tokenizer.from_str(json.dumps(spec))
    for text in texts:
        signal.setitimer(signal.ITIMER_VIRTUAL, 4 * _SECONDS)  # `tokenizers` can't be interrupted, only ended
        started = time.process_time()
        normal = text if backend.normalizer is None else backend.normalizer.normalize_str(text)
        if len(normal) > _GROWTH * len(text):
            raise ValueError(f"it makes {len(normal)} characters of {len(text)}")
        if backend.pre_tokenizer is not None:
            backend.pre_tokenizer.pre_tokenize_str(normal)
        if backend.decoder is not None:
            backend.decoder.decode([text])
        if time.process_time() - started > _SECONDS:
            raise ValueError(f"a text of {len(text)} characters takes longer than {_SECONDS:g} seconds")


def answer(line: bytes) -> dict[str, str]:
    """The reply to one request line: "text", or "error" with the reason."""
    request = json.loads(line)
    try:
        if "texts" in request:
            try_cutting(request["parts"], request["texts"])
            return {"text": ""}
        return {"text": compiled(request["template"]).render(**request["values"])}
    except MemoryError:
        return {"error": "it needs too much memory"}
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a template may raise anything, a panic of `tokenizers` is no Exception
        return {"error": " ".join(str(error).split())[:300] or type(error).__name__}


def main(memory: int, seconds: float) -> None:
    """Serves standard input, within limits of memory (bytes) and time (seconds) and without access to files."""
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds)  # its signal ends this process, should nobody else do it
        reply = json.dumps(answer(line)).encode() + b"\n"
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        sys.stdout.buffer.write(reply)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]))
