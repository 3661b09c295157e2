"""Finds the reasoning in replies of reasoning models by the marks around it, and removes it.

Servers separate it from the answer only if they are started with the model's own reasoning parser. Chat templates often
open the reasoning in the prompt, so a reply may contain only the closing mark.
"""

import re

_NAME = r"(?:\w{1,20}[:_])?(?:think(?:ing)?|thoughts?|reasoning|reflections?|scratch_?pad|analysis|monologue)"
_OPENING = re.compile(
    rf"<{_NAME}(?:\s[^<>]{{0,200}})?>"
    r"|(?-i:\[THINK\])"  # Magistral
    r"|<\|(?:begin_of_thought|START_THINKING|inner_prefix|think|thinking)\|>"  # OpenThinker, Command A, Apertus
    r"|<\|channel\|?>\s{0,4}(?:analysis|commentary|thought)"  # gpt-oss, Gemma
    r"|◁think▷|<unused94>"  # Kimi, MedGemma
    r"|\A\s*Here(?:'s| is) my thought process:"  # Granite
    r"|\A\s*(?-i:analysis(?=[A-Z]))",  # gpt-oss without its special tokens
    re.IGNORECASE,
)
_CLOSING = re.compile(
    rf"</{_NAME}\s{{0,8}}>"
    r"|(?-i:\[/THINK\])"
    r"|<\|(?:end_of_thought|END_THINKING|inner_suffix|/think|/thinking)\|>"
    r"|<\|channel\|>\s{0,4}final(?:\s{0,4}<\|constrain\|>\s{0,4}\w{0,20})?\s{0,4}<\|message\|>"
    r"|<channel\|>"
    r"|◁/think▷|<unused95>"
    r"|assistantfinal",
    re.IGNORECASE,
)
_ANSWER_BEGINS = re.compile(r"\A\s*(?:<(?:answer|response)>|<\|(?:START_RESPONSE|begin_of_solution)\|>)", re.IGNORECASE)
_ANSWER_ENDS = re.compile(
    r"(?:</(?:answer|response)>|<\|(?:END_RESPONSE|end_of_solution|return|end)\|>)\s*\Z", re.IGNORECASE
)


def has_reasoning(reply: str) -> bool:
    """Whether a reply contains a mark of reasoning."""
    return bool(_OPENING.search(reply) or _CLOSING.search(reply))


def without_reasoning(reply: str) -> str | None:
    """The text after the last closing mark, without answer marks around it.

    A reply without marks is returned unchanged.

    Returns None if reasoning begins and doesn't end, since such a reply has no answer.
    """
    *_, end = 0, *(found.end() for found in _CLOSING.finditer(reply))
    if _OPENING.search(reply, end):
        return None
    return _ANSWER_ENDS.sub("", _ANSWER_BEGINS.sub("", reply[end:])) if end else reply
