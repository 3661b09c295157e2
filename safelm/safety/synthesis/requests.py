"""Turns a scored document into requests to a writer, and the replies into a draft.

The document is passed as data: it is escaped (`safelm.safety.escaping`), so that it can't close its frame, spell a
token of the chat template or hide a message, and its frame has a mark that the document doesn't contain.
"""

import hashlib
import re
from collections.abc import Sequence

from safelm.safety import escaping
from safelm.safety.judge.answer import unfenced
from safelm.safety.reasoning import without_reasoning
from safelm.safety.synthesis import parts
from safelm.safety.synthesis.kinds import NOTE_KINDS, Draft, Kind, Source
from safelm.safety.synthesis.notes.reply import read_note
from safelm.safety.synthesis.prompt_files import DOCUMENT_SLOT, Prompts, derived_seed
from safelm.safety.synthesis.writer import Reply, Request

MAX_NEW_TOKENS = 1024
CATEGORIES = (
    "harassment or discrimination",
    "malware or hacking",
    "physical harm",
    "economic harm",
    "fraud or deception",
    "disinformation",
    "sexual or adult content",
    "privacy",
)
_PREFACE = re.compile(
    r"\A(?:sure|certainly|of course|okay|here(?:'s| is| are))\b[^\n]{0,160}:[ \t]*\n\s*", re.IGNORECASE
)
_MARK = re.compile(r"\b[0-9a-f]{16}\b", re.IGNORECASE)
_SPEAKER = re.compile(r"^[ \t*_#>]*+(User|Assistant)(?:[*_]++:|:[*_]*+)[ \t]*+", re.MULTILINE | re.IGNORECASE)
_CATEGORY = re.compile(r"^[ \t]*+[*_]*+Category[*_]*+:([^\n]*+)\n?", re.MULTILINE | re.IGNORECASE)
_DECLINED = re.compile(
    r"(?:i'?m sorry|i am sorry|sorry|i apologi[sz]e|unfortunately|as an ai\b[^.!?]*)?[,.!]?\s*(?:but\s+)?"
    r"i\s*(?:can'?t|cannot|can not|won'?t|will not|am unable to|'m unable to|am not able to|'m not able to)\s+"
    r"(?:help|assist|fulfil|fulfill|comply|continue|create|write|provide|generate|rewrite|engage|do)\b",
    re.IGNORECASE,
)


def make_requests(
    prompts: Prompts,
    source: Source,
    style: str,
    *,
    seed: int,
    attempt: int = 0,
    max_document_chars: int,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> list[Request]:
    """One request per part of the document, in order; `join_replies` makes a draft of the replies.

    Args:
      max_document_chars: the writer's limit; longer documents are split (see `parts.split`). Of a text before a note
        the nearest part is given.
      max_new_tokens: the most tokens of one reply.

    Raises ValueError for an unknown style.
    """
    if style not in prompts.styles:
        raise ValueError(f"style {style!r}: {prompts.kind} has {', '.join(prompts.styles)}")
    documents = parts.split(source.text, max_document_chars)
    if prompts.kind in NOTE_KINDS:
        documents = [source.text[-max_document_chars:] if source.pause and source.pause.position else documents[0]]
    return [
        _request(prompts, source, style, document, place, len(documents), seed, attempt, max_new_tokens)
        for place, document in enumerate(documents)
    ]


def user_message(request: Request) -> str:
    """The user's message: the task around the escaped document."""
    return request.before + escaping.escape(request.document) + request.after


def join_replies(
    kind: Kind, source: Source, style: str, replies: Sequence[Reply], attempt: int = 0
) -> tuple[Draft | None, str]:
    """Joins the replies to `make_requests` in order; returns the draft, or None and the reason.

    Reasons: "writer_filtered", "writer_refused" and "writer_error" for replies without text; "writer_empty";
    "writer_reasoning" for reasoning without an answer; "writer_declined" for a text that refuses to be written (in
    RefuseWeb a refusal is the text); "writer_echo" for a reply that repeats the mark of the document's frame. Of a note
    "writer_cut" and "writer_unparseable" for one that lacks a part, at the limit of tokens or not.
    """
    texts, categories, own_marks = [], [], _marks(source.text)
    for reply in replies:
        if reply.text is None:
            return None, f"writer_{reply.stopped_by if reply.stopped_by in ('filtered', 'refused') else 'error'}"
        answer = without_reasoning(reply.text)
        if answer is None:
            return None, "writer_reasoning"
        text = _tidy(kind, answer)
        if not text:
            return None, "writer_empty"
        if _marks(text) - own_marks:
            return None, "writer_echo"
        if kind == "refuseweb":
            text, category = _without_category(text)
            categories.append(category)
        elif len(text) < 600 and _DECLINED.match(text.replace("’", "'")):
            return None, "writer_declined"
        if kind in NOTE_KINDS:
            return _note(kind, source, style, text, reply.stopped_by == "length", attempt)
        texts.append(text)
    is_cut = any(reply.stopped_by == "length" for reply in replies)
    category = next((each for each in categories if each), "")
    return Draft(kind, source, style, "\n\n".join(texts), attempt, is_cut, category), ""


def _note(kind: Kind, source: Source, style: str, text: str, is_cut: bool, attempt: int) -> tuple[Draft | None, str]:
    found = read_note(text)
    if found is None:
        return None, "writer_cut" if is_cut else "writer_unparseable"
    voices, category = found
    both = f"{voices.first_person}\n\n{voices.third_person}"
    return Draft(kind, source, style, both, attempt, is_cut, category, voices), ""


def _request(
    prompts: Prompts,
    source: Source,
    style: str,
    document: str,
    place: int,
    count: int,
    seed: int,
    attempt: int,
    max_new_tokens: int,
) -> Request:
    where = "first" if place == 0 else "last" if place == count - 1 else "middle"
    about = "" if count == 1 else prompts.parts[where] + " "
    about = about.replace("{part_number}", str(place + 1)).replace("{parts}", str(count))
    user = prompts.user.replace("{style}", prompts.styles[style]).replace("{part}", about)
    before, after = user.replace("{mark}", _mark(document)).split(DOCUMENT_SLOT)
    facts: dict[str, str | int] = {
        "kind": prompts.kind,
        "style": style,
        "harm_score": source.harm_score,
        "is_dialogue": int(source.is_dialogue),
        "part": place,
        "parts": count,
        "category": source.named("category"),
    }
    facts |= {"sections": " ".join(prompts.sections)} if prompts.sections else {}
    return Request(
        key=f"{source.id}/{prompts.kind}/{attempt}/{place}",
        system=prompts.system,
        before=before,
        document=document,
        after=after,
        reply_start=prompts.reply_starts[style],
        max_new_tokens=max_new_tokens,
        seed=derived_seed(seed, source.id, prompts.kind, style, attempt, place),
        facts=facts,
    )


def _mark(document: str) -> str:
    """16 hexadecimal digits that the document doesn't contain and can't predict, since they depend on all of it."""
    data, number = document.encode("utf-8", "surrogatepass"), 0
    while (mark := hashlib.sha256(b"mark %d " % number + data).hexdigest()[:16]) in document:
        number += 1
    return mark


def _marks(text: str) -> set[str]:
    return {mark[0].lower() for mark in _MARK.finditer(text)}


def _tidy(kind: Kind, text: str) -> str:
    """A reply's text without the packaging that models add; our entities are characters again, hidden ones are gone."""
    text = escaping.without_surrogates(text).strip()
    text = _PREFACE.sub("", unfenced(text).strip())
    text = escaping.unescape_seen(text)
    if kind == "refuseweb":
        text = _SPEAKER.sub(lambda found: f"{found[1].capitalize()}: ", text)
    return text.strip()


def _without_category(text: str) -> tuple[str, str]:
    """The dialogue without its "Category:" line, and the category if it is one of `CATEGORIES`."""
    named = [found[1].lower().replace("/", " or ") for found in _CATEGORY.finditer(text)]
    known = next((category for category in CATEGORIES if any(category in name for name in named)), "")
    return _CATEGORY.sub("", text).strip(), known
