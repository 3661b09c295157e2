"""The id of a row: its own or, where it has none, a hash of its text.

A content hash needs no place: the same document has the same id in whatever file, part or format it stands, before and
after `safelm.score` (which writes it into the row), and two copies of one text never stand on both sides of a split.
So two rows without an id of their own that hold the same text are one document.
"""

import hashlib
import re
from collections.abc import Mapping
from typing import Any

from safelm.documents.json_lines import check_text, field
from safelm.documents.malformed import MalformedError

ID_COLUMN = "id"
_CONTENT_ID = re.compile("text-[0-9a-f]{24}")


def row_id(row: Mapping[str, Any], text: str, column: str = ID_COLUMN) -> str:
    """The row's id as a string.

    Raises MalformedError for an id that is neither a string nor an integer, or that UTF-8 can't hold.
    """
    value = field(row, column)
    if value is None or (isinstance(value, str) and not value.strip()):
        return content_id(text)
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise MalformedError(f"field {column!r} is not a string or an integer but {type(value).__name__}")
    identity = str(value)
    check_text(identity, column)
    return identity


def required_id(column: str) -> dict[str, list[str]]:
    """What a file must have where the user names the column of ids: only the usual one may be absent."""
    return {} if column == ID_COLUMN else {column: [column]}


def is_content_id(identity: str) -> bool:
    """Whether it is the id of a text that had none: rows with the same one are copies of one document."""
    return _CONTENT_ID.fullmatch(identity) is not None


def content_id(text: str) -> str:
    """The id of a text that has none: 24 hexadecimal digits of its BLAKE2b hash behind "text-"."""
    return "text-" + hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=12).hexdigest()
