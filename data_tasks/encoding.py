"""Documents to tokens, a batch at a time, by pure functions without TensorFlow: pages, conversations, interventions.

The steps of `data_tasks.pipeline` are made of these.
"""

from collections.abc import Callable, Sequence

import numpy as np

from data_tasks.chats import Openings, encode_chat, map_content
from data_tasks.intervention_settings import InterventionSettings
from data_tasks.interventions import Intervention, mark_documents
from data_tasks.preprocessors import append_end_of_document
from data_tasks.readers import Document
from safelm.caching.batches import EncodedBatch
from safelm.data.token_kinds import CONTROL, MASKED, TEXT
from safelm.text.chat_template import ASSISTANT
from safelm.text.harm_tags import remove_harm_tags
from safelm.text.tokenizer import Tokenizer

PrepareText = Callable[[str, str, int], str]  # (id, text without literal tags, harm score) -> text to tokenize


def encode_documents(
    documents: Sequence[Document], *, tokenizer: Tokenizer, prepare: PrepareText, is_tagged: bool
) -> EncodedBatch:
    """Tokenizes documents: removes literal tags, applies `prepare`, encodes, and appends the end of document.

    Only with `is_tagged` does the tag's string in a prepared text become the tag's id.
    """
    cleaned = [remove_harm_tags(each.text) for each in documents]
    prepared = [prepare(each.id, text, each.harm_score) for each, (text, _) in zip(documents, cleaned, strict=True)]
    encoded = (tokenizer.encode_tagged_batch if is_tagged else tokenizer.encode_batch)(prepared)
    tokens, lengths = append_end_of_document(encoded, tokenizer.eos_id)
    return EncodedBatch(
        ids=[each.id for each in documents],
        tokens=tokens,
        lengths=lengths,
        channels={},
        lost_bytes=_counts([tokenizer.count_lost_bytes(text) for text in prepared]),
        removed_tags=_counts([count for _, count in cleaned]),
        cut_tokens=np.zeros(len(documents), np.int32),
        unmarked=np.zeros(len(documents), np.int32),
    )


def encode_chats(
    documents: Sequence[Document],
    *,
    tokenizer: Tokenizer,
    prepare: PrepareText,
    is_tagged: bool,
    openings: Openings | None = None,
) -> EncodedBatch:
    """Like `encode_documents` for conversations (`data_tasks.chats`); `prepare` is applied to the assistant's words.

    The channel `loss_weight` is 0 for what the assistant doesn't say.

    Args:
      openings: the control tokens before answers; with them there is a channel `kind`.
    """
    encoded, lost_bytes, removed = [], [], []
    for document in documents:
        counts = {"removed": 0, "lost": 0}

        def change(role, content, document=document, counts=counts):
            content, found = remove_harm_tags(content)
            content = prepare(document.id, content, document.harm_score) if role == ASSISTANT else content
            counts["removed"] += found
            counts["lost"] += tokenizer.count_lost_bytes(content)
            return content

        changed = map_content(document.text, change)
        encoded.append(encode_chat(changed, tokenizer, is_tagged=is_tagged, openings=openings))
        removed.append(counts["removed"])
        lost_bytes.append(counts["lost"])
    tokens, loss_weight = (np.concatenate([arrays[i] for arrays in encoded]) for i in (0, 1))
    channels = {"loss_weight": loss_weight}
    if openings:
        is_opening = np.isin(tokens, list(openings.ids(tokenizer)))
        channels["kind"] = np.where(is_opening, CONTROL, np.where(loss_weight > 0, TEXT, MASKED)).astype(np.int32)
    return EncodedBatch(
        ids=[each.id for each in documents],
        tokens=tokens,
        lengths=_counts([len(array) for array, _ in encoded]),
        channels=channels,
        lost_bytes=_counts(lost_bytes),
        removed_tags=_counts(removed),
        cut_tokens=np.zeros(len(documents), np.int32),
        unmarked=np.zeros(len(documents), np.int32),
    )


def intervention_channels(intervention: Intervention) -> tuple[str, ...]:
    """The channels of what `encode_marked` makes: `kind`, `loss_weight` and, where it makes some, `unlikelihood`."""
    return ("kind", "loss_weight", *(("unlikelihood",) if intervention.has_unlikelihood else ()))


def encode_marked(
    documents: Sequence[Document],
    *,
    tokenizer: Tokenizer,
    intervention: Intervention,
    settings: InterventionSettings,
) -> EncodedBatch:
    """Documents as an intervention makes them (`data_tasks.interventions`)."""
    made = mark_documents(intervention, settings, tokenizer, documents)
    return EncodedBatch(
        ids=[each.id for each in documents],
        tokens=np.concatenate([each.tokens for each in made]),
        lengths=_counts([len(each.tokens) for each in made]),
        channels={
            name: np.concatenate([getattr(each, name) for each in made]) for name in intervention_channels(intervention)
        },
        lost_bytes=_counts([tokenizer.count_lost_bytes(each.text) for each in documents]),
        removed_tags=_counts([each.removed_tags for each in made]),
        cut_tokens=_counts([each.cut_tokens for each in made]),
        unmarked=_counts([intervention.sought is not None and not each.is_marked for each in made]),
    )


def _counts(values: Sequence[int]) -> np.ndarray:
    return np.array(values, np.int32)
