"""Renders chat templates: one JSON line in, one out. `safelm.text.template_worker` runs this file as a process.

It imports nothing of ours, so that it starts at once and knows nothing. A line holds the template, the values that it
may use, and the marks to put where `{% generation %}` begins and ends.
"""

import datetime
import functools
import json
import resource
import signal
import sys
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox

_ANY_DAY = datetime.date(2026, 1, 1)  # for templates that tell the date: a score must not depend on it


class Generation(jinja2.ext.Extension):
    """`{% generation %}`: what the assistant has to learn, between the values `generation_marks`."""

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
    """`raise_exception` of templates."""
    raise jinja2.TemplateError(message)


def to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """The filter `tojson`, without HTML's escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.lru_cache(maxsize=16)
def compiled(source: str) -> jinja2.Template:
    """A template as transformers has it: its blocks' line ends trimmed, loop controls, `raise_exception`."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = _ANY_DAY.strftime
    environment.filters["tojson"] = to_json
    return environment.from_string(source)


def answer(line: bytes) -> dict[str, str]:
    """The reply to one line: "text", or "error" with why there is none."""
    request = json.loads(line)
    try:
        return {"text": compiled(request["template"]).render(**request["values"])}
    except MemoryError:
        return {"error": "it needs too much memory"}
    except Exception as error:  # a template may raise anything
        return {"error": " ".join(str(error).split())[:300] or type(error).__name__}


def main(memory: int, seconds: float) -> None:
    """Serves standard input. Only what a rendering may use is left: memory, its own time, no files."""
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
