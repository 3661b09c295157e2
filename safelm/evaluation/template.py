"""How a prompt is put to a model: as text to continue, or as a user's message in ChatML (safelm.tokenizer).

The prompt is encoded literally: nothing in it opens or closes a turn. An answer's first words may be given (a prefix
attack): they stand where the answer begins.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence

from safelm.tokenizer import Tokenizer

TEXT, CHAT = KINDS = ("text", "chat")


@dataclasses.dataclass(frozen=True)
class Template:
    """A template; `system` is the system message of a chat, none when empty."""

    kind: str = TEXT
    system: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"template {self.kind!r}: one of {', '.join(KINDS)}")
        if self.system and self.kind != CHAT:
            raise ValueError("a system message goes with the chat template only")

    @property
    def hash(self) -> str:
        """SHA-256 over what the template puts around a prompt; the same for every vocabulary."""
        shape = [self.kind, self.system, "chatml-1" if self.kind == CHAT else ""]
        return hashlib.sha256(json.dumps(shape).encode()).hexdigest()

    def encode(self, tokenizer: Tokenizer, prompt: str, *, answer_start: str = "") -> list[int]:
        """Ids up to where the answer goes on. Raises ValueError for a chat with a vocabulary that has no ChatML."""
        if self.kind == TEXT:
            return tokenizer.encode(prompt + answer_start)
        messages = [{"role": "system", "content": self.system}] if self.system else []
        messages.append({"role": "user", "content": prompt})
        ids = tokenizer.render_chat(messages, add_generation_prompt=True)
        return ids + tokenizer.encode(answer_start) if answer_start else ids

    def end_id(self, tokenizer: Tokenizer) -> int:
        """What ends an answer."""
        if self.kind == TEXT or tokenizer.chat_end_id is None:
            return tokenizer.eos_id
        return tokenizer.chat_end_id

    def answer_tokens(self, tokenizer: Tokenizer, tokens: Sequence[int]) -> list[int]:
        """An answer's tokens up to the first that ends a turn or a document, whichever the model used."""
        ends = {tokenizer.eos_id, self.end_id(tokenizer)}
        return list(tokens[: next((i for i, token in enumerate(tokens) if token in ends), len(tokens))])
