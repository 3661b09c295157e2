"""Checks the sequences of an import: ids of the vocabulary, and the end-of-document token where it has to be."""

from collections.abc import Mapping

import numpy as np

from safelm.formats.token_files import Block
from safelm.interchange.sources import Source
from safelm.text.tokenizer import Tokenizer


class Checks:
    """Checks ids and ends of sequences, and counts special tokens."""

    def __init__(self, tokenizer: Tokenizer, unit: str):
        self._tokenizer, self._unit = tokenizer, unit
        ids = range(tokenizer.vocab_size)
        self._specials = [i for i in ids if tokenizer.special_token(i) is not None and i != tokenizer.harm_tag_id]
        self.num_ends = 0
        self._seen = dict.fromkeys(self._specials, 0)

    def seen(self) -> dict[str, int]:
        """How often each special token was there so far, by id, those that were."""
        return {str(special): count for special, count in self._seen.items() if count}

    def take(self, seen: Mapping[str, int]) -> None:
        """Counts what a former run checked: a difference of two of its `seen`."""
        for special, count in seen.items():
            self._seen[int(special)] += count
        self.num_ends = self._seen[self._tokenizer.eos_id]

    def check(self, path: str, first: int, block: Block) -> None:
        """`first`: number of the block's first sequence among all files'."""
        vocab_size, ends = self._tokenizer.vocab_size, np.cumsum(block.lengths_n)
        unit, tokens = self._unit, block.tokens
        if len(ends) and (block.lengths_n <= 0).any():
            raise ValueError(f"{path}: {unit} {first + int(np.argmax(block.lengths_n <= 0))} has no tokens")
        if len(tokens) and (int(tokens.max()) >= vocab_size or int(tokens.min()) < 0):
            at = int(np.argmax((tokens >= vocab_size) | (tokens < 0)))
            number = int(ends.searchsorted(at, "right"))
            place = at - (int(ends[number - 1]) if number else 0)
            raise ValueError(
                f"{path}: {unit} {first + number} has token id {int(tokens[at])} at place {place}, the vocabulary has "
                f"{vocab_size} ids: is --tokenizer the one that made it?"
            )
        end = self._tokenizer.eos_id
        counts = np.bincount(tokens, minlength=vocab_size)
        for special in self._specials:
            self._seen[special] += int(counts[special])
        self.num_ends = self._seen[end]
        if unit == "document" and (wrong := tokens[ends - 1] != end).any():
            number = int(np.argmax(wrong))
            last = int(tokens[ends[number] - 1])
            shown = self._tokenizer.special_token(last)
            raise ValueError(
                f"{path}: document {first + number} ends with id {last}{f' {shown!r}' if shown else ''}, not with the "
                f"end of document {self._tokenizer.special_token(end)!r} (id {end}): give --document_end, or "
                "--unit=window if these are windows"
            )

    def check_ends(self, source: Source) -> None:
        """ValueError if windows never have the end-of-document token, but another special one."""
        end = self._tokenizer.eos_id
        often = max(self._seen, key=self._seen.__getitem__)
        if not self.num_ends and self._seen[often]:
            raise ValueError(
                f"{source.folder}: no token is the end of document {self._tokenizer.special_token(end)!r} (id {end}), "
                f"{self._seen[often]} are {self._tokenizer.special_token(often)!r} (id {often}): give --document_end"
            )
