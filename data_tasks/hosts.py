"""The host of a page, from its URL or from a column of bare hosts."""

import re
import urllib.parse

_BARE = re.compile(
    r"(?:[^\W_](?:[\w-]*[^\W_])?\.)+(?:xn--[a-z0-9-]+|[^\W\d_]{2,})(?=\.?(?::\d+)?(?:[/?#]|$))", re.IGNORECASE
)
# What files' names end in and hosts' never: no top-level domain. And of those that are countries' too: where names of
# two parts are mostly files'.
_FILES = frozenset(
    "asp aspx bmp csv css doc docx exe gif gz htm html jpeg jpg js json jsonl jsp pdf php png ppt pptx rtf svg "
    "tar tex tsv txt webp xhtml xls xlsx xml yaml yml".split()
)
_FILES_OF_TWO_PARTS = frozenset(("md", "py"))


def host(url: str) -> str:
    """The host in lower case without a dot at its end, "" where none is named.

    Without a scheme, as in `en.example.org/page`, a host has a dot and ends in letters, so that neither a word nor a
    name such as `CC-MAIN-2020-05` or `v1.2` is one; nor is that of a file such as `index.html`. Other words with a dot
    between them, such as `Mr.Smith`, are taken for hosts: which last parts there are changes every year.
    """
    url = url.strip()
    try:
        named = urllib.parse.urlsplit(url).hostname
    except ValueError:
        return ""
    if named:
        return named.rstrip(".")
    bare = _BARE.match(url)
    if not bare or _is_file(bare[0].lower(), is_whole=bare.end() == len(url)):
        return ""
    return bare[0].lower()


def _is_file(name: str, is_whole: bool) -> bool:
    """Whether a name with dots is a file's; `is_whole`: nothing stands behind it."""
    stem, _, suffix = name.rpartition(".")
    return suffix in _FILES or (suffix in _FILES_OF_TWO_PARTS and is_whole and "." not in stem)
