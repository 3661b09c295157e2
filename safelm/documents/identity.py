"""A row's id: its own or, if it has none, a hash of its text.

A content hash does not depend on place: a document has the same id in any file, part or format, before and after
`safelm.score` (which writes the id into the row), and copies of a text never end up on both sides of a split. So rows
without an id that have the same text count as one document.
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

    Raises MalformedError for an id that is neither a string nor an integer, or that UTF-8 can't encode.
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
    """The id column that a file must have: the one named by the user; the default one may be missing."""
    return {} if column == ID_COLUMN else {column: [column]}


def is_content_id(identity: str) -> bool:
    """Whether an id is a content hash; rows with the same one are copies of one document."""
    return _CONTENT_ID.fullmatch(identity) is not None


def content_id(text: str) -> str:
    """The id of a text without one: "text-" and 24 hexadecimal digits of its BLAKE2b hash."""
    return "text-" + hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=12).hexdigest()
