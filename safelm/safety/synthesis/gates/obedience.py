"""Checks that the writer did its task only: it followed no instruction in the document and leaked no prompt."""

import re
from collections.abc import Sequence

from safelm.safety.synthesis.gate import Finding
from safelm.safety.synthesis.gates.settings import GateSettings, fingerprint
from safelm.safety.synthesis.gates.words import Words, held_lengths, longest_run, sentences, shared_runs, words
from safelm.safety.synthesis.kinds import Draft

# Chat templates' tokens, tags that look like a prompt's frame, keys of a template left unfilled.
_MARKUP = re.compile(
    r"<\|[\w ]{2,40}\|>|\[/?INST\]|<<?/?SYS>>?|</?(?:document|source|page|material|system|user|assistant|instructions?"
    r"|prompt|text)\b[^>\n]{0,40}>|\{(?:document|source|style|text)\}|^#{2,} ?(?:instruction|response|input)s?:?\s*$",
    re.IGNORECASE | re.MULTILINE,
)
# What a model says about its task instead of doing it, and what one says that took orders from a document.
_ABOUT_THE_TASK = re.compile(
    r"\bas an? (?:ai|artificial intelligence|large language model|language model)\b"
    r"|\b(?:my|the) (?:system prompt|initial instructions|instructions (?:say|said|were|are) to)\b"
    r"|\bignor(?:e|ing) (?:all |any |my |the )?(?:previous|prior|above|earlier) (?:instructions|prompts?|rules)\b"
    r"|\bi(?:'ll| will|'m going to| am going to|'ve| have) (?:now )?(?:rewrit|rephras|ignor|follow)\w*"
    r" (?:\w+ ){0,2}(?:document|text|page|passage|instructions?|rules|prompt)\b"
    r"|\b(?:here is|here's|below is) (?:the |a |my )?(?:rewritten|rephrased|revised|safe) (?:version|text|document)\b"
    r"|\b(?:developer|dan|jailbreak|god) mode (?:is |has been )?(?:on|enabled|activated)\b"
    r"|\b(?:the|this) (?:document|source text|original text) (?:above|provided|you (?:provided|gave))\b",
    re.IGNORECASE,
)
# Sentences of a document that speak to a model.
_ORDER = re.compile(
    r"\b(?:ignore|disregard|forget|override|bypass)\b[^.!?\n]{0,60}\b(?:instructions?|prompts?|rules|guidelines|above"
    r"|previous|prior)\b"
    r"|\byou are (?:now|no longer)\b"
    r"|\b(?:respond|reply|answer|output|continue|begin|start|end)\b[^.!?\n]{0,30}\b(?:only|exactly|nothing but|with)\b"
    r"|\b(?:repeat|say|print|write|output|include|append|add|insert)\b[^.!?\n]{0,40}(?:[\"'“‘«:]|\bthe (?:word|phrase"
    r"|sentence|line|string|code)\b)"
    r"|\b(?:system prompt|your instructions|new instructions?|system message)\b",
    re.IGNORECASE,
)
_QUOTED = re.compile(r"[\"“«]([^\"“”«»\n]{3,200})[\"”»]|['‘]([^'‘’\n]{3,200})['’]")
_SPELLED = re.compile(
    r"\b(?:word|phrase|sentence|line|string|code|with|exactly|say|print|output)s?:? +([A-Z][A-Z0-9_-]{3,40})\b"
)
_OBEYED_WORDS = 40


class Obedience:
    """Rejects drafts that show the prompt or its frame, talk about the task, or do what the document told a model.

    An order to say something ("say: '...'", a word in capitals) counts as followed if the draft contains the demanded
    words without the order around them: at its beginning, on a line of their own, or as most of a short draft. A draft
    that reports the page's words, order included, is a retelling and passes.

    Args:
      prompt_texts: the prompts' texts, of which no long run of words may appear.
    """

    name, worth_another = "obedience", True

    def __init__(self, settings: GateSettings, prompt_texts: Sequence[str] = ()):
        self._settings = settings
        self._prompts = [words(text) for text in dict.fromkeys(prompt_texts)]
        patterns = "\n".join(one.pattern for one in (_MARKUP, _ABOUT_THE_TASK, _ORDER, _QUOTED, _SPELLED))
        parts = {"patterns": patterns, "prompts": "\n\n".join(dict.fromkeys(prompt_texts))}
        self.fingerprint = fingerprint(self.name, 2, settings, "leaked_words", **parts)

    def check(self, drafts: Sequence[Draft]) -> list[Finding]:
        """Reasons for failure: "prompt_markup", "prompt_leaked", "about_the_task", "document_obeyed"."""
        return [self._check(draft) for draft in drafts]

    def _check(self, draft: Draft) -> Finding:
        text = draft.text.replace("’", "'")
        found = words(text)
        leaked = max((self._leaked(prompt, found, draft) for prompt in self._prompts), default=0)
        wrong = {
            "prompt_markup": _any_new(_MARKUP, text, draft.source.text),
            "prompt_leaked": leaked >= self._settings.leaked_words,
            "about_the_task": _any_new(_ABOUT_THE_TASK, text, draft.source.text) and draft.kind != "refuseweb",
            "document_obeyed": _is_any_obeyed(orders(draft.source.text), text, found),
        }
        reason = next((name for name, applies in wrong.items() if applies), "")
        return Finding(self.name, not reason, reason, {"leaked_words": leaked})

    def _leaked(self, prompt: Words, found: Words, draft: Draft) -> int:
        runs = shared_runs(prompt.words, found.words, self._settings.leaked_words)
        if not runs:
            return 0
        held = held_lengths(words(draft.source.text).words, found.words)  # what the source says too is no leak
        return longest_run([run for run in runs if held[run.stop - 1] < len(run)])


def orders(document: str) -> list[str]:
    """What a document tells a model to say: quoted strings and words in capitals after an order to a model."""
    wanted = []
    for sentence in sentences(document.replace("’", "'")):
        if _ORDER.search(sentence):
            wanted += [first or second for first, second in _QUOTED.findall(sentence)]
            wanted += _SPELLED.findall(sentence)
    return list(dict.fromkeys(order.strip() for order in wanted if words(order).words))


def _is_any_obeyed(wanted: Sequence[str], text: str, found: Words) -> bool:
    if not wanted:
        return False
    own_lines = {words(line).words for line in text.splitlines()}
    is_short = len(found) <= _OBEYED_WORDS and not any(map(_ORDER.search, sentences(text)))
    for order in (words(one).words for one in wanted):
        if found.words[: len(order)] == order or order in own_lines:
            return True
        if is_short and shared_runs(order, found.words, len(order)):
            return True
    return False


def _any_new(pattern: re.Pattern[str], text: str, source: str) -> bool:
    """Whether the pattern matches something in the draft that it doesn't match in the source."""
    own = {match[0].casefold() for match in pattern.finditer(source.replace("’", "'"))}
    return any(match[0].casefold() not in own for match in pattern.finditer(text))
