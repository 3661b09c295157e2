"""Log-probs in an endpoint's answer, read from the server's untrusted structure."""

from typing import Any


def first_tokens(choice: Any) -> tuple[tuple[str, float], ...]:
    """The alternatives for a choice's first token with their log-probs (nats); none where the server gives none."""
    content = getattr(getattr(choice, "logprobs", None), "content", None)
    found = getattr(content[0], "top_logprobs", None) if isinstance(content, list) and content else None
    pairs = [(getattr(each, "token", None), getattr(each, "logprob", None)) for each in found or ()]
    return tuple(
        (token, float(value)) for token, value in pairs if isinstance(token, str) and isinstance(value, int | float)
    )
