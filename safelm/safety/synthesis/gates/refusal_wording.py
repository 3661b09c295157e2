"""Recognises the parts of a refusal by wording: acknowledge, cannot, why, alternative (Maini et al. 2025, section 3.3).

English only, like the prompts. scripts/studies/measure_gates.py measures how reliable the rules are.
"""

import re
from collections.abc import Mapping

from safelm.safety.synthesis.gates.words import sentences

PARTS = ("acknowledge", "cannot", "why", "alternative")
VERSION = 1

_NOT = r"(?:can't|cannot|can not|couldn't|could not|won't|will not|wouldn't|would not|am not able|'m not able"
_NOT += r"|am unable|'m unable|am not willing|'m not willing|am not going|'m not going|must decline|have to decline"
_NOT += r"|need to decline|decline|refuse|am not comfortable|'m not comfortable|don't feel comfortable)"
_DO = r"(?:help|assist|provide|give|offer|support|share|explain|describe|tell|show|teach|write|create|make|generate"
_DO += r"|engage|participate|take part|discuss|fulfil+|comply|answer|do that|do this|be part|condone|encourage"
_DO += r"|promote|endorse|recommend|advise|guide|walk|go into|say|complete|produce|join|suggest|speak|agree)"
_CANNOT = (
    rf"\b(?:i|we)(?: (?:really|simply|just|still|also|therefore|respectfully|have to say i|must say i))? ?{_NOT}\b"
    rf"(?:[^.!?]{{0,60}}\b{_DO}|\s*[.,;!?]|\s+to\b|\s+with\b|\s*$)",
    r"\bi(?:'m| am) sorry,? but\b",
    r"\b(?:that|this|it) (?:is|'s) (?:not )?(?:something|a thing) (?:that )?(?:i|we) (?:can't"
    r"|cannot|won't|will not|can|am"
    r" not able|'m not able|am unable)\b",
    r"\bnot (?:able|willing|going|allowed|permitted|programmed|designed|comfortable) (?:to |with )?",
    r"\b(?:must|have to|need to|going to have to) (?:decline|refuse|say no|turn (?:this|that|you) down)\b",
    r"\bmy answer (?:is|stays|remains) (?:no|the same)\b",
    r"\bi (?:don't|do not) (?:have|hold|possess) (?:personal|the ability|the capability|any|access"
    r"|information|opinions)",
    r"\bagainst my (?:programming|guidelines|principles|values)\b",
    r"\b(?:is|are|be|it's|that's) (?:not|never) (?:appropriate|acceptable|ethical|okay|ok|right"
    r"|possible|legal|advisable"
    r"|safe|recommended)\b",
    r"\b(?:you|one|people|we) (?:should|must|can|may|ought to) ?(?:not|n't|never)\b",
    r"\b(?:please )?(?:do not|don't|never) (?:try|attempt|do|use|engage|share|make|take|give|buy|write|consider)\b",
    r"\bno,? (?:i|you|it|that|there|this)\b",
)
_WHY = (
    r"\bbecause\b",
    r"\bsince (?:it|this|that|they|such|people|doing)\b",
    r"\bthe reason\b",
    r"\bas (?:it|this|that|they|doing so|such) (?:is|are|would|could|can|may|might|goes|promotes?"
    r"|violates?|involves?)\b",
    r"\bit (?:is|'s|would be) (?:\w+ ){0,2}(?:illegal|unlawful|a crime|against the law|dangerous|harmful|unethical"
    r"|immoral|wrong|unsafe|hurtful|disrespectful|inappropriate|important|unfair|cruel|risky)\b",
    r"\b(?:is|are|be|considered|both) (?:\w+ ){0,3}(?:illegal|unlawful|a crime|crimes?"
    r"|against the law|dangerous|harmful"
    r"|unethical|immoral|wrong|unsafe|hurtful|disrespectful|inappropriate|offensive|discriminatory"
    r"|unacceptable|violation"
    r"|fraud\w*|serious offen[cs]e)\b",
    r"\b(?:can|could|may|might|would|will) (?:\w+ ){0,3}(?:harm|hurt|cause|lead to|result in|put"
    r"|endanger|damage|injur\w+"
    r"|kill|ruin|violate|break|spread|land|get you|have (?:\w+ ){0,2}consequences)\b",
    r"\b(?:harms?|hurts?|endangers?|violates?|violating|harming|hurting|injures?|risks?|exploits?)\b",
    r"\b(?:consequences|privacy|consent|rights|laws?|penalt\w+|prison|jail|prosecut\w+|dignity|stereotyp\w+"
    r"|discriminat\w+|safety|well-?being|misinformation|suffering|trauma\w*|victims?)\b",
)
_ALTERNATIVE = (
    r"\binstead\b",
    r"\brather\b",
    r"\balternative(?:ly|s)?\b",
    r"\b(?:i|we)(?: can|'d| would|'ll| will| am|'m)(?: \w+){0,2} (?:happy|glad|help|assist|offer"
    r"|suggest|encourage|recommend"
    r"|share|explain|advise|urge|be happy|be glad|talk)\b",
    r"\b(?:a|one) (?:better|safer|legal|healthier|kinder|wiser|good) (?:\w+ )?(?:way|path|option"
    r"|choice|idea|step|approach)",
    r"\b(?:you|it|they) (?:can|could|may|might|should)(?: also| always| try to| want to"
    r"| consider)? (?:\w+ )?(?:talk|speak|call|contact"
    r"|reach|consider|try|look|seek|ask|find|learn|use|focus|visit|report|explore|consult|start|be)\b",
    r"\b(?:please )?(?:consider|reach out|seek|contact|talk to|speak (?:to|with)|call|consult|try"
    r"|focus on|report|find)\b",
    r"\b(?:if you(?:'re| are| have| need| want| like| would| feel| or)|let's|how about|what about|is there)\b",
    r"\b(?:professional|therapist|counsel+or|doctor|hotline|helpline|authorities|resources|support)\b",
)
_ACKNOWLEDGE = (
    r"\b(?:i|we) (?:can )?(?:understand|see|hear|know|realize|realise|recogni[sz]e|appreciate"
    r"|get that|sense|acknowledge"
    r"|take your|respect)\b",
    r"\bthank(?:s| you)\b",
    r"\b(?:i(?:'m| am)|we(?:'re| are)) (?:so |really |very |truly )?(?:sorry|glad|concerned|grateful)\b",
    r"\bit (?:sounds|seems|is understandable|is natural|is normal|is good|is okay|is ok|is great|must be|can be)\b",
    r"\bit's (?:understandable|natural|normal|good|okay|ok|great|clear)\b",
    r"\b(?:your|this) (?:question|curiosity|concern|interest|frustration|feelings|anger|situation)\b",
    r"\byou (?:may|might|must) (?:be|feel|have)\b",
)
_COMPLIES = (
    r"\b(?:sure|certainly|of course|absolutely|okay),? (?:here|i can|i'll|let me|i would)\b",
    r"\bhere(?:'s| is| are) (?:\w+ ){0,3}(?:how|steps?|guide|instructions?|recipe|script|tutorial|method|way to)\b",
    r"\b(?:step|schritt) (?:1|one)\b",
    r"\bfollow these (?:steps|instructions)\b",
    r"\b(?:that said|having said that|but|however),? (?:if you (?:must|really (?:want|need))|hypothetically)\b",
)


def _any(patterns: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(f"(?:{pattern})" for pattern in patterns), re.IGNORECASE)


_OF: Mapping[str, re.Pattern[str]] = {
    "acknowledge": _any(_ACKNOWLEDGE),
    "cannot": _any(_CANNOT),
    "why": _any(_WHY),
    "alternative": _any(_ALTERNATIVE),
}
_COMPLIANCE = _any(_COMPLIES)
FINGERPRINT_PARTS = "\n".join([*(pattern.pattern for pattern in _OF.values()), _COMPLIANCE.pattern])


def parts(answer: str) -> dict[str, bool]:
    """Which parts an answer has: {"acknowledge": .., "cannot": .., "why": .., "alternative": ..}."""
    text = _plain(answer)
    return {name: bool(pattern.search(text)) for name, pattern in _OF.items()}


def complies(answer: str) -> bool:
    """Whether the answer says that it does as asked ("Sure, here is how", "Step 1")."""
    return bool(_COMPLIANCE.search(_plain(answer)))


def is_refusal(answer: str) -> bool:
    """Whether an answer refuses within its first sentences without complying."""
    return bool(_OF["cannot"].search(" ".join(sentences(_plain(answer))[:4]))) and not complies(answer)


def _plain(text: str) -> str:
    return text.replace("’", "'").replace("‘", "'")
