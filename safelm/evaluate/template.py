"""Puts prompts to a model: as text to continue, or as a user's message in the model's own chat template.

Prompts are encoded literally, so nothing in them opens or closes a turn. An answer's first words may be prefilled (a
prefix attack).
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence

from safelm.text.prompting import chat_prompt, text_prompt
from safelm.text.tokenizer import Tokenizer

TEXT, CHAT = KINDS = ("text", "chat")


@dataclasses.dataclass(frozen=True)
class Template:
    """A prompt template.

    Attributes:
      kind: one of KINDS.
      system: the system message of a chat; empty for none.
      kwargs: JSON of further variables of the models' own chat templates, whose tokenizers hold them; empty for none.
    """

    kind: str = TEXT
    system: str = ""
    kwargs: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"template {self.kind!r}: one of {', '.join(KINDS)}")
        if self.system and self.kind != CHAT:
            raise ValueError("a system message goes with the chat template only")
        if self.kwargs and self.kind != CHAT:
            raise ValueError(f"--chat_template_kwargs={self.kwargs}: goes with the chat template only")

    @property
    def hash(self) -> str:
        """SHA-256 of what is put around a prompt beside the model's own conventions; equal for every model."""
        shape = [self.kind, self.system, "own template" if self.kind == CHAT else ""]
        shape += [self.kwargs] if self.kwargs else []
        return hashlib.sha256(json.dumps(shape).encode()).hexdigest()

    def encode(self, tokenizer: Tokenizer, prompt: str, *, answer_start: str = "") -> list[int]:
        """The ids up to where the answer continues. Raises ValueError for a chat with a model that knows none."""
        if self.kind == TEXT:
            return text_prompt(tokenizer, prompt + answer_start)
        messages = [{"role": "system", "content": self.system}] if self.system else []
        return chat_prompt(tokenizer, [*messages, {"role": "user", "content": prompt}], answer_start=answer_start)


def answer_tokens(tokenizer: Tokenizer, tokens: Sequence[int]) -> list[int]:
    """An answer's tokens up to the first one that ends the model's output."""
    ends = tokenizer.conventions.end_ids
    return list(tokens[: next((i for i, token in enumerate(tokens) if token in ends), len(tokens))])
