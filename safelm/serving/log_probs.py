"""Log-probs of a text's tokens in the two forms of OpenAI's API."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from safelm.inference.token_log_probs import TokenLogProbs
from safelm.serving.text_stream import Piece
from safelm.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class ScoredText:
    """Consecutive tokens of a reply and what the model gave each.

    Attributes:
      pieces: the tokens with their shares of the text.
      first: where the first of them stands among the tokens that `scores` were computed from.
      alternatives: how many of the likeliest tokens to show at every place.
      offset: characters of the text before the first of them.
    """

    tokenizer: Tokenizer
    pieces: Sequence[Piece]
    scores: TokenLogProbs
    first: int
    alternatives: int
    offset: int = 0

    def for_completion(self) -> dict[str, list[Any]]:
        """The `logprobs` of a choice of `/v1/completions`.

        A token that nothing stands before has None. `top_logprobs` holds the token of the text besides the likeliest.
        """
        offsets, place = [], self.offset
        for piece in self.pieces:
            offsets.append(place)
            place += len(piece.text)
        return {
            "tokens": [self._string(piece.id) for piece in self.pieces],
            "token_logprobs": [self._chosen(index) for index in range(len(self.pieces))],
            "top_logprobs": [self._with_chosen(index) for index in range(len(self.pieces))],
            "text_offset": offsets,
        }

    def for_chat(self) -> dict[str, Any]:
        """The `logprobs` of a choice of `/v1/chat/completions`."""
        content = []
        for index, piece in enumerate(self.pieces):
            likeliest = [self._described(token, log_prob) for token, log_prob in self._likeliest(index)]
            content.append(self._described(piece.id, self._chosen(index)) | {"top_logprobs": likeliest})
        return {"content": content, "refusal": None}

    def _chosen(self, index: int) -> float | None:
        row = self.first + index - 1
        return float(self.scores.chosen_T[row]) if row >= 0 else None

    def _likeliest(self, index: int) -> list[tuple[int, float]]:
        row = self.first + index - 1
        ids_K, log_probs_K = self.scores.ids_TK[row], self.scores.likeliest_TK[row]
        return list(zip(ids_K[: self.alternatives].tolist(), log_probs_K[: self.alternatives].tolist(), strict=True))

    def _with_chosen(self, index: int) -> dict[str, float] | None:
        log_prob = self._chosen(index)
        if log_prob is None:
            return None
        found: dict[str, float] = {}
        for token, each in [*self._likeliest(index), (self.pieces[index].id, log_prob)]:
            found.setdefault(self._string(token), each)  # of two ids with one spelling the likelier
        return found

    def _string(self, token: int) -> str:
        """The token's text; `bytes:` and their escapes where it holds only a part of a character."""
        special = self.tokenizer.special_token(token)
        if special is not None:
            return special
        spelled = self.tokenizer.token_bytes(token)
        try:
            return spelled.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)

    def _described(self, token: int, log_prob: float | None) -> dict[str, Any]:
        special = self.tokenizer.special_token(token)
        spelled = self.tokenizer.token_bytes(token) if special is None else special.encode()
        return {"token": self._string(token), "logprob": log_prob, "bytes": list(spelled)}
