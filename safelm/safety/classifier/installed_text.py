"""Safe prose that any Python installation carries: what its packages say of themselves, and Python's own help.

A classifier that has seen harmless answers of assistants only takes every web page for harmful. These pages are written
by many hands, for readers of web pages, and need no download: the long descriptions (README) of the installed
distributions and the topics of Python's `help()`. Code, markup, badges, tables, addresses and licences are left out;
what is left is cut into pages of some hundred words. Which pages there are depends on what is installed: a classifier's
config.json holds their counts and hash.
"""

import functools
import html
import importlib.metadata
import re
from collections.abc import Iterator

from safelm.safety.classifier.examples import INSTALLED, Example, limit_of, text_key
from safelm.safety.classifier.harm_kinds import HARMLESS

PAGE_WORDS = 200  # a page ends with the paragraph that reaches them
_LEAST_PAGE_WORDS = 60
_PAGES_PER_DISTRIBUTION = 4
_HELP_PAGES = 24
_LEAST_PAGES = 20
_HELP = "python-help"

_BLOCK_BEGINS = re.compile(
    r"^[ \t]*+(?P<fence>```|~~~)"  # fenced code
    r"|(?P<comment><!--)|<(?P<element>script|style|pre|table|svg)\b"
    r"|^[ \t]*+\.\. [^\n]*+\n(?:[ \t]++[^\n]*+\n|\n)*+",  # directives of reStructuredText with what hangs on them
    re.MULTILINE | re.IGNORECASE,
)
_MOST = 2000  # characters of a link's text, of an address, of a tag
_INLINE = (
    (re.compile(rf"!\[[^\]]{{0,{_MOST}}}+\](\([^)]{{0,{_MOST}}}+\)|\[[^\]]{{0,{_MOST}}}+\])"), ""),  # images
    (re.compile(rf"\[([^\[\]]*+)\](\([^)]{{0,{_MOST}}}+\)|\[[^\]]{{0,{_MOST}}}+\])"), r"\1"),  # links of Markdown
    (re.compile(rf"`([^`<]*+)<[^>`]{{0,{_MOST}}}+>`_{{1,2}}"), lambda link: link[1].rstrip()),  # of reStructuredText
    (re.compile(r":[a-z:+]{1,60}:`([^`]*+)`"), r"\1"),
    (re.compile(rf"</?[a-zA-Z][^>]{{0,{_MOST}}}+>"), ""),
    (re.compile(r"\b(?:https?|ftp)://\S+|\bwww\.\S+"), ""),
    (re.compile(r"`+|\*\*?|\|[^|\n]{1,60}\||(?<=\w)_{1,2}(?=\s|$)"), ""),
)
_NO_PROSE = re.compile(r"\s*(#|\||\+[-=]|>>>|\$ |%|\[[^\]]+\]:|[^\w\s]{3,}\s*$)|\s{4,}|\t")
_BULLET = re.compile(r"^[^\S\n]*+(?:[-*+•]|\d++[.)])\s++", re.MULTILINE)
_LICENCE = re.compile(r"copyright|licen[sc]ed? under|warrant(y|ies)\b|hereby granted|redistribut|SPDX", re.IGNORECASE)
_LEAST_PARAGRAPH_WORDS = 8
_LEAST_LETTERS = 0.93  # share of letters, spaces and common marks in a paragraph of prose


def read(source: str, limit: str = "") -> list[Example]:
    """Pages of score 0, each once; the group is the distribution.

    The order is the same for the same installation: the first page of every distribution by name, then the second ones.

    Args:
      source: what `--data` says, for messages. limit: pages at most, all of them when empty.

    Raises ValueError for a limit that is no count, and if fewer pages are found than asked for, or next to none.
    """
    asked = limit_of(source, limit, "pages")
    pages, seen = [], set()
    for name, _, page in sorted(_all_pages(), key=lambda found: (found[1], found[0])):
        key = text_key(page)
        if key not in seen:
            seen.add(key)
            pages.append(Example(page, 0, f"{INSTALLED}/{name}", source, kinds=HARMLESS))
    wanted = asked or _LEAST_PAGES
    if len(pages) < wanted:
        raise ValueError(
            f"--data={source}: only {len(pages)} pages of prose are installed, {wanted} are needed; install more "
            "packages or give pages of your own (--data=safe:PATH)"
        )
    return pages[:asked]


def prose(text: str) -> list[str]:
    """The paragraphs of a Markdown, reStructuredText or plain text that are sentences, without their markup."""
    text = _without_blocks(text.replace("\r\n", "\n") + "\n")
    for pattern, replacement in _INLINE:
        text = pattern.sub(replacement, text)
    lines = ["" if _NO_PROSE.match(line) else line for line in html.unescape(text).split("\n")]
    paragraphs = re.split(r"\n\s*\n", _BULLET.sub("\n", "\n".join(lines)))
    found = (" ".join(paragraph.split()) for paragraph in paragraphs)
    return [paragraph for paragraph in found if _is_prose(paragraph)]


def _without_blocks(text: str) -> str:
    """The text with a line end for every block of code, markup or directives; one without an end stays."""
    kept, start, at, endless = [], 0, 0, set()
    while begin := _BLOCK_BEGINS.search(text, at):
        at = begin.end()
        if (kind := begin.lastgroup) is not None:
            name = begin[kind].lower()
            end = None if name in endless else _block_end(kind, name).search(text, at)
            if end is None:
                endless.add(name)  # nor have later ones: looking again would take the square of their number
                continue
            at = end.end()
        kept += [text[start : begin.start()], "\n"]
        start = at
    return "".join([*kept, text[start:]])


@functools.cache
def _block_end(kind: str, name: str) -> re.Pattern[str]:
    ends = {"fence": rf"^[ \t]*+{name}[^\n]*+$", "comment": "-->", "element": f"</{name}>"}
    return re.compile(ends[kind], re.MULTILINE | re.IGNORECASE)


def cut(paragraphs: list[str]) -> Iterator[str]:
    """Pages of whole paragraphs, `PAGE_WORDS` and a part of a paragraph long; the last may be shorter."""
    page, words = [], 0
    for paragraph in paragraphs:
        page.append(paragraph)
        words += len(paragraph.split())
        if words >= PAGE_WORDS:
            yield "\n\n".join(page)
            page, words = [], 0
    if words >= _LEAST_PAGE_WORDS:
        yield "\n\n".join(page)


def _is_prose(paragraph: str) -> bool:
    if len(paragraph.split()) < _LEAST_PARAGRAPH_WORDS or _LICENCE.search(paragraph):
        return False
    plain = sum(char.isalpha() or char in " ,.;:'’\"!?-" for char in paragraph)
    english = sum(char.isascii() for char in paragraph)
    return min(plain, english) >= _LEAST_LETTERS * len(paragraph) and paragraph[-1] in ".!?)"


def _all_pages() -> Iterator[tuple[str, int, str]]:
    """(distribution, number of its page, page)."""
    texts: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        metadata = distribution.metadata
        name = re.sub(r"[-_.]+", "-", metadata["Name"] or "").lower()
        text = metadata.get_payload() or metadata.get("Description") or ""
        if name and isinstance(text, str):
            texts.setdefault(name, text)
    for name, text in texts.items():
        yield from ((name, i, page) for i, page in zip(range(_PAGES_PER_DISTRIBUTION), cut(prose(text)), strict=False))
    yield from ((_HELP, i, page) for i, page in zip(range(_HELP_PAGES), cut(prose(_help())), strict=False))


def _help() -> str:
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))
