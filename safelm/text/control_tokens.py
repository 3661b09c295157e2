"""Control tokens of a user's own: special tokens that tasks put into documents and that text can't spell."""

from collections.abc import Sequence

import tokenizers

from safelm.text.tokenizer import Tokenizer


def control_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of a control token. Raises ValueError where the vocabulary has none of that name."""
    found = tokenizer.conventions.control_tokens.get(token)
    if found is None:
        raise ValueError(
            f"{tokenizer.origin}: the vocabulary has no control token {token!r}: "
            f"safelm.train_tokenizer --control_tokens={token} adds it"
        )
    return found


def with_control_tokens(tokenizer: Tokenizer, tokens: Sequence[str]) -> Tokenizer:
    """The same vocabulary with more control tokens, at new ids behind the others; `save` keeps them.

    Raises ValueError for an empty one and for one that is an ordinary token.
    """
    backend = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    for token in tokens:
        is_ordinary = backend.token_to_id(token) is not None and token not in tokenizer.conventions.control_tokens
        if not token.strip() or is_ordinary:
            raise ValueError(f"{tokenizer.origin}: {token!r} can't be a control token: it is empty or a token of text")
    added = [tokenizers.AddedToken(token, normalized=False, special=True) for token in dict.fromkeys(tokens)]
    backend.add_special_tokens(added)
    return tokenizer.with_backend(backend)
