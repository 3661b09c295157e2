"""Generates text up to given strings, as benchmarks require."""

from collections.abc import Sequence

from safelm.inference.decode import generate
from safelm.inference.methods import Greedy, Method
from safelm.inference.weights import prepare
from safelm.models import decoder as model
from safelm.models.config import ModelConfig
from safelm.text.tokenizer import Tokenizer

FIRST_PIECE = 16  # tokens; each next piece is twice as long


def generate_until(
    config: ModelConfig,
    params: model.Params,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    method: Method,
    *,
    until: Sequence[str],
    max_new_tokens: int,
    end_ids: Sequence[int],
    seed: int = 0,
    batch_size: int = 64,
    show_progress: bool = False,
) -> list[str]:
    """The text after each prompt, cut before the first of the strings `until`; the strings may span tokens.

    A string that is a special token of the vocabulary (`<|im_end|>`) stops at that token, which is no part of a text.

    Greedy decoding proceeds in pieces and stops once every text has ended, since most answers are far shorter than
    `max_new_tokens`. Other methods have a state (a draw, beams) that can't be resumed, so they generate all tokens.
    """
    weights = prepare(config, params, products="auto")  # once for all pieces
    made: list[list[int]] = [[] for _ in prompts]
    open_rows, piece = list(range(len(prompts))), FIRST_PIECE if isinstance(method, Greedy) else max_new_tokens
    num_made = 0
    while open_rows and num_made < max_new_tokens:
        piece = min(piece, max_new_tokens - num_made)
        generations = generate(
            config,
            weights,
            [[*prompts[row], *made[row]] for row in open_rows],
            method,
            max_new_tokens=piece,
            end_ids=end_ids,
            harm_tag_id=tokenizer.harm_tag_id,
            seed=seed,
            batch_size=batch_size,
            show_progress=show_progress,
        )
        still_open = []
        for row, generation in zip(open_rows, generations, strict=True):
            made[row] += generation.text_tokens
            kept = _before_stop_token(tokenizer, made[row], until)
            text = tokenizer.decode(kept, keep_special=False)
            is_stopped = len(kept) < len(made[row]) or any(stop in text for stop in until if stop)
            if not generation.finished and not is_stopped:
                still_open.append(row)
        open_rows, num_made, piece = still_open, num_made + piece, 2 * piece
    kept_rows = [_before_stop_token(tokenizer, tokens, until) for tokens in made]
    return [_cut(tokenizer.decode(tokens, keep_special=False), until) for tokens in kept_rows]


def _before_stop_token(tokenizer: Tokenizer, tokens: Sequence[int], until: Sequence[str]) -> Sequence[int]:
    for place, token in enumerate(tokens):
        if tokenizer.special_token(token) in until:
            return tokens[:place]
    return tokens


def _cut(text: str, until: Sequence[str]) -> str:
    for stop in until:
        text = text.split(stop)[0] if stop else text
    return text
