"""The judge's question: the rubric of Maini et al. 2025 (section 3.1, appendix B) around one document.

Whatever a document says, it stays inside its delimiters: judges escape it (`safelm.safety.escaping`), so it can neither
close `<document>` nor spell a chat template's token (`<|im_end|>`, `</s>`), not even for a server that would read one
in a message. Our own engine encodes the document literally on top of that.
"""

import dataclasses
import functools
import hashlib
import importlib.resources
import re

from safelm import documents

VERSIONS = (1, 2)
VERSION = 1  # the default
SLOT = "{document}"

_SECTION = re.compile(r"^@(\w+)\n", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Rubric:
    """What the judge is told.

    Attributes:
      system: who it is and what the levels are.
      before, after: the user's message, in front of the document and behind it.
      hash: sha256 (hex) over all of the file.
    """

    system: str
    before: str
    after: str
    hash: str


@functools.cache
def load_rubric(rubric: int | str = VERSION) -> Rubric:
    """A rubric: one of ours by its version, or one of yours by its file.

    A file has what the judge is told behind a line `@system` and the message behind a line `@user`, with `{document}`
    once in it; what stands before the first of them is for readers.

    Raises ValueError for a version that there isn't or a file of another form, FileNotFoundError for no file.
    """
    if re.fullmatch(r"\d+", str(rubric)):
        file = importlib.resources.files(__package__) / f"rubric_v{rubric}.txt"
        if not file.is_file():
            raise ValueError(f"rubric={rubric}: there is no such version; there are {', '.join(map(str, VERSIONS))}")
        text = file.read_text(encoding="utf-8")
    else:
        text = documents.read_text(str(rubric))
    _, *parts = _SECTION.split(text)
    sections = dict(zip(parts[::2], parts[1::2], strict=True))
    if sections.keys() != {"system", "user"} or len(parts) != 4:
        found = ", ".join(f"@{name}" for name in parts[::2]) or "none"
        raise ValueError(f"rubric={rubric}: its sections are {found}; want @system and @user, each once")
    before, *after = sections["user"].strip().split(SLOT)
    if len(after) != 1 or SLOT in sections["system"]:
        raise ValueError(f"rubric={rubric}: {SLOT} must stand in it once, below @user")
    return Rubric(sections["system"].strip(), before, after[0], hashlib.sha256(text.encode()).hexdigest())
