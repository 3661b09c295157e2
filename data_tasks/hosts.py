"""The host of a page, from its URL or from a column of bare hosts."""

import re
import urllib.parse

_BARE = re.compile(
    r"(?:[^\W_](?:[\w-]*[^\W_])?\.)+(?:xn--[a-z0-9-]+|[^\W\d_]{2,})(?=\.?(?::\d+)?(?:[/?#]|$))", re.IGNORECASE
)


def host(url: str) -> str:
    """The host in lower case, "" where none is named.

    Without a scheme, as in `en.example.org/page`, a host has a dot and ends in letters, so that neither a word nor a
    name such as `CC-MAIN-2020-05` or `v1.2` is one.
    """
    url = url.strip()
    try:
        named = urllib.parse.urlsplit(url).hostname
    except ValueError:
        return ""
    bare = None if named else _BARE.match(url)
    return named or (bare[0].lower() if bare else "")
