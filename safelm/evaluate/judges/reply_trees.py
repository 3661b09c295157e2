"""How probable each of some replies is, where a reply may take several tokens: numbers that are cut into digits."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

Context = tuple[int, ...]  # the tokens of a reply so far


@dataclasses.dataclass(frozen=True)
class ReplyTree:
    """Replies as sequences of tokens; one may be the beginning of another, as 5 is of 57.

    Attributes:
      sequences: the tokens of each reply, all different.
    """

    sequences: tuple[tuple[int, ...], ...]

    @property
    def contexts(self) -> list[Context]:
        """Where a next token has to be known: behind every beginning of a reply that another token follows."""
        return sorted({sequence[:end] for sequence in self.sequences for end in range(len(sequence))})

    def children(self, context: Context) -> tuple[int, ...]:
        """The tokens by which some reply goes on behind a context."""
        size = len(context)
        return tuple(sorted({each[size] for each in self.sequences if len(each) > size and each[:size] == context}))

    def probabilities(self, found: Mapping[Context, Sequence[float]]) -> Float[np.ndarray, " replies"]:
        """P(reply), over everything that a model could say.

        Args:
          found: at each of `contexts`, the probabilities of its `children`, in their order.

        A reply that others begin with ends where none of their next tokens follows.
        """
        of_child = {
            (*context, child): probability
            for context, probabilities in found.items()
            for child, probability in zip(self.children(context), probabilities, strict=True)
        }
        whole = []
        for sequence in self.sequences:
            value = float(np.prod([of_child[sequence[: end + 1]] for end in range(len(sequence))]))
            whole.append(value * max(0.0, 1.0 - sum(found[sequence])) if sequence in found else value)
        return np.array(whole)
