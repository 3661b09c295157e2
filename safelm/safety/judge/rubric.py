"""The judge's question: the rubric of Maini et al. 2025 (section 3.1, appendix B) around one document.

Whatever a document says, it stays inside its delimiters: it is escaped (`safelm.safety.escaping`), so it can neither
close `<document>` nor spell a chat template's token (`<|im_end|>`, `</s>`), not even for a server that would read one
in a message. Our own engine encodes the document literally on top of that.
"""

import dataclasses
import functools
import hashlib
import importlib.resources
import re

from safelm.safety.escaping import escape

VERSION = 1
SLOT = "{document}"

_SECTION = re.compile(r"^@(\w+)\n", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Rubric:
    """What the judge is told.

    Attributes:
      system: who it is and what the levels are.
      before, after: the user's message, in front of the document and behind it.
      hash: sha256 (hex) over all of the text.
    """

    system: str
    before: str
    after: str
    hash: str

    def user(self, document: str) -> str:
        """The user's message about a document: escaped, between its delimiters."""
        return self.before + escape(document) + self.after


@functools.cache
def load_rubric(version: int = VERSION) -> Rubric:
    """The rubric of a version; ValueError if there is none."""
    file = importlib.resources.files(__package__) / f"rubric_v{version}.txt"
    if not file.is_file():
        raise ValueError(f"rubric={version}: there is no such version, the newest is {VERSION}")
    text = file.read_text(encoding="utf-8")
    _, *parts = _SECTION.split(text)
    sections = dict(zip(parts[::2], parts[1::2], strict=True))
    before, after = sections["user"].strip().split(SLOT)
    return Rubric(sections["system"].strip(), before, after, hashlib.sha256(text.encode()).hexdigest())
