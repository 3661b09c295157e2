"""Tokens that a model is never to write: control tokens that tuning added and that leak into answers, say."""

from safelm.text.tokenizer import Tokenizer

SPECIAL = "special"
HELP = (
    "special tokens that answers never have, by any method: TOKEN,TOKEN,.. or `special` for all but those that end an "
    "answer and the harm tag, which --tag_candidate treats (default: none)"
)


def banned_ids(tokenizer: Tokenizer, asked: str, *, flag: str = "--banned_tokens") -> tuple[int, ...]:
    """The ids of `asked`: special tokens' strings separated by commas, or SPECIAL; sorted.

    Raises ValueError naming the flag for a string that is no special token, or one that ends an answer.
    """
    known = {tokenizer.special_token(token): token for token in tokenizer.special_ids}
    ends = tokenizer.conventions.end_ids
    if asked == SPECIAL:
        return tuple(sorted(set(known.values()) - {*ends, tokenizer.harm_tag_id}))
    names = [name.strip() for name in asked.split(",") if name.strip()]
    if unknown := [name for name in names if name not in known]:
        shown = ", ".join(sorted(map(str, known))[:12])
        raise ValueError(f"{flag}: {unknown[0]!r} is no special token of {tokenizer.origin}; there are {shown}")
    if ending := [name for name in names if known[name] in ends]:
        raise ValueError(f"{flag}: {ending[0]!r} ends an answer, which would never end then")
    return tuple(sorted({known[name] for name in names}))
