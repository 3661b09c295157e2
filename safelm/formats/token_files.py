"""Sequences of token ids in other programs' files, read a block at a time; what their readers share."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Integer, Shaped

BLOCK_TOKENS = 1 << 22  # of a block that is in memory, if no single sequence is longer
_SEQUENCES_AT_ONCE = 1 << 16


@dataclasses.dataclass(frozen=True)
class Block:
    """Neighbouring sequences of a file.

    Attributes:
      lengths_n: tokens of each sequence.
      tokens: all of them end to end.
      columns: further columns by name, with a number for every token or for every sequence.
    """

    lengths_n: Integer[np.ndarray, " n"]
    tokens: Integer[np.ndarray, " tokens"]
    columns: Mapping[str, Shaped[np.ndarray, " _"]] = dataclasses.field(default_factory=dict)


@runtime_checkable
class TokenFile(Protocol):
    """A file of sequences.

    Attributes:
      path: for messages.
      num_sequences: in the file.
    """

    path: str
    num_sequences: int

    def parts(self, max_tokens: int) -> Sequence[tuple[int, int]]:
        """Ranges, in the file's own units, that hold about so many tokens each; at least one."""

    def blocks(self, part: tuple[int, int]) -> Iterator[Block]:
        """The sequences of such a range in order."""


class FlatFile:
    """A file that holds nothing but tokens, with the lengths of its sequences known from another one."""

    def __init__(
        self,
        path: str,
        tokens: Integer[np.ndarray, " tokens"],
        num_sequences: int,
        lengths: Callable[[int, int], Integer[np.ndarray, " n"]],
    ):
        """`lengths(start, stop)`: of some sequences; all of them together are the file's tokens."""
        self.path, self.num_sequences = path, num_sequences
        self._tokens, self._lengths = tokens, lengths
        self._tokens_before_blocks = [0]  # of every _SEQUENCES_AT_ONCE sequences, as far as they were asked for

    def parts(self, max_tokens: int) -> list[tuple[int, int]]:
        """Ranges of sequences."""
        cuts, taken = [0], 0  # taken: tokens since the last cut
        for start in range(0, self.num_sequences, _SEQUENCES_AT_ONCE):
            ends = taken + np.cumsum(self._range(start, self.num_sequences))
            while (cut := int(ends.searchsorted(max_tokens, "right"))) < len(ends):
                cut += start + cut == cuts[-1]  # a single sequence that is longer
                if cut == len(ends):
                    break
                cuts.append(start + cut)
                ends -= ends[cut - 1] if cut else taken
            taken = int(ends[-1])
        return list(zip(cuts, [*cuts[1:], self.num_sequences], strict=True))

    def blocks(self, part: tuple[int, int]) -> Iterator[Block]:
        """The sequences of a range; the tokens are views of the file."""
        at = self._tokens_before(part[0])
        for start in range(*part, _SEQUENCES_AT_ONCE):
            ends = np.cumsum(lengths := self._range(start, part[1]))
            first = 0
            while first < len(ends):
                before = int(ends[first - 1]) if first else 0
                last = max(first + 1, int(ends.searchsorted(before + BLOCK_TOKENS, "right")))
                stop = int(ends[last - 1])
                yield Block(lengths[first:last], self._tokens[at + before : at + stop])
                first = last
            at += int(ends[-1])

    def _range(self, start: int, stop: int) -> np.ndarray:
        return self._lengths(start, min(start + _SEQUENCES_AT_ONCE, stop)).astype(np.int64)

    def _tokens_before(self, sequence: int) -> int:
        """Tokens before a sequence. Sums are kept, so that the parts of a file together read its lengths once."""
        block, known = sequence // _SEQUENCES_AT_ONCE, self._tokens_before_blocks
        while len(known) <= block:
            start = (len(known) - 1) * _SEQUENCES_AT_ONCE
            known.append(known[-1] + self._count(start, start + _SEQUENCES_AT_ONCE))
        return known[block] + self._count(block * _SEQUENCES_AT_ONCE, sequence)

    def _count(self, start: int, stop: int) -> int:
        return int(self._lengths(start, stop).sum(dtype=np.int64))
