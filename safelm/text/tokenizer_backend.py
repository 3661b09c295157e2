"""Adapts a `tokenizers` vocabulary for `safelm.text.tokenizer`: byte-level, literal, with the harm tag."""

import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from safelm.tags import HARM_TAG
from safelm.text import gguf_tokenizer, patterns, spelling
from safelm.text.chat_template import CHAT_END, CHAT_START
from safelm.text.conventions import Declared

UNCUT = "its patterns can't cut a text"
END_OF_TEXT = "<|endoftext|>"
TRAINED_SPECIALS = (END_OF_TEXT, CHAT_START, CHAT_END, HARM_TAG)  # ids 0 to 3 of a trained vocabulary
_DOCUMENT_ENDS = (END_OF_TEXT, "<|end_of_text|>")
_MARKUP = re.compile(r"<.+>|\[.+\]", re.DOTALL)
_SPARE_IDS = 4096  # beyond the number of tokens, for ids that a vocabulary leaves out


def from_json(data: bytes, origin: str) -> tokenizers.Tokenizer:
    """Reads a `tokenizer.json` written by others; its patterns are tried before they are used.

    Raises ValueError naming `origin`.
    """
    patterns.check(data, origin)
    with as_value_errors(origin, "not a tokenizer.json that `tokenizers` can use"):
        return tokenizers.Tokenizer.from_buffer(data)


@contextlib.contextmanager
def as_value_errors(origin: str, fault: str = "not a vocabulary that `tokenizers` can use") -> Iterator[None]:
    """Turns errors and panics of `tokenizers` over a broken vocabulary into a ValueError naming `origin`."""
    try:
        yield
    except BaseException as error:  # `tokenizers` raises bare Exception; a panic of its Rust code isn't even one
        is_panic = type(error).__name__ == "PanicException"
        if str(error).startswith(origin) or not (is_panic or isinstance(error, Exception)):
            raise
        raise ValueError(f"{origin}: {fault} ({error})") from error


def trained(texts: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    """A byte-level BPE vocabulary of texts; ValueError below the ids that always exist."""
    smallest = len(TRAINED_SPECIALS) + 256
    if vocab_size < smallest:
        raise ValueError(f"vocab_size must be at least {smallest} (special tokens and 256 bytes), got {vocab_size}")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = gguf_tokenizer.smollm_pre_tokenizer()
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, normalized=False, special=True) for token in TRAINED_SPECIALS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return backend


def prepared(backend: tokenizers.Tokenizer, eos_token: str, declared: Declared, origin: str) -> tokenizers.Tokenizer:
    """A copy of `backend` that is lossless, deterministic and literal, with the harm tag in its vocabulary."""
    ids = backend.get_vocab(with_added_tokens=True)
    if ids and max(ids.values()) >= 2 * len(ids) + _SPARE_IDS:  # before `to_str`, which counts through all of them
        token = max(ids, key=ids.__getitem__)
        raise ValueError(f"{origin}: token {token[:40]!r} has the id {ids[token]}, the vocabulary {len(ids)} tokens")
    spec = json.loads(backend.to_str())
    if spelling.found(spec) is None:
        known = "byte-level BPE (as of SmolLM2, Llama 3, GPT-2) or BPE with byte fallback (as of Gemma)"
        raise ValueError(f"{origin}: neither {known}, without a prefix space")
    _check_post_processor(spec["post_processor"], origin)
    spec |= {"truncation": None, "padding": None}
    if declared.begin_ids is not None:
        spec["post_processor"] = _begin_processor(backend, declared.begin_ids)
    spec["model"] |= {"dropout": None, "unk_token": None}  # a byte without a token is dropped and counted, not special
    named = [declared.token("bos_token"), declared.token("eos_token")]
    for token in spec["added_tokens"]:
        token["special"] |= token["content"] in (eos_token, *named, *TRAINED_SPECIALS)
    prepared = tokenizers.Tokenizer.from_str(json.dumps(spec))
    if prepared.decoder is None:
        prepared.decoder = decoders.ByteLevel()

    known = [token for token in (eos_token, CHAT_START, CHAT_END) if token in ids]
    prepared.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in [*known, HARM_TAG]])
    ids = prepared.get_vocab(with_added_tokens=True)
    if len(set(ids.values())) != len(ids):
        raise ValueError(f"{origin}: two tokens share an id ({len(ids)} tokens, {len(set(ids.values()))} ids)")
    prepared.encode_special_tokens = True  # in `tokenizers`, this name means: encode their strings as plain text
    return prepared


def _check_post_processor(processor: dict[str, Any] | None, origin: str) -> None:
    """Raises ValueError for a template that names a token it doesn't define, since encoding with it panics."""
    for each in ((processor or {}), *(processor or {}).get("processors", ())):
        pieces = [*each.get("single", ()), *each.get("pair", ())] if each.get("type") == "TemplateProcessing" else []
        named = {piece["SpecialToken"]["id"] for piece in pieces if "SpecialToken" in piece}
        if missing := sorted(named - each.get("special_tokens", {}).keys()):
            raise ValueError(f"{origin}: its post-processor names {missing[0]!r} without defining it")


def document_end(backend: tokenizers.Tokenizer, declared: Declared, origin: str) -> str:
    """The token that ends a document; ValueError where the vocabulary has none."""
    if (chosen := declared.document_end) is not None:
        if backend.token_to_id(chosen) is None:
            raise ValueError(f"{origin}: the vocabulary has no end-of-document token {chosen!r}")
        return chosen
    eos_token = declared.token("eos_token")
    for token in (*_DOCUMENT_ENDS, eos_token):
        if token is not None and backend.token_to_id(token) is not None:
            return token
    if eos_token is not None:
        raise ValueError(f"{origin}: the vocabulary has no end-of-document token {eos_token!r}")
    raise ValueError(f"{origin}: no {END_OF_TEXT} in the vocabulary and no eos_token beside it")


def control_tokens(backend: tokenizers.Tokenizer, template: str | None) -> dict[str, int]:
    """Ids of the added tokens that structure texts: special tokens, markup, and those written by the chat template.

    Some vocabularies don't mark their role tokens as special.
    """

    def structures(content: str) -> bool:
        return bool(_MARKUP.fullmatch(content)) or (bool(content.strip()) and content in (template or ""))

    added = backend.get_added_tokens_decoder()
    return {t.content: i for i, t in added.items() if t.special or structures(t.content)}


def literal(
    backend: tokenizers.Tokenizer, spec: Mapping[str, Any], controls: Mapping[str, int]
) -> tokenizers.Tokenizer:
    """The vocabulary with all control tokens special, so that encoding a text yields none of them.

    `spec` is its `tokenizer.json`.
    """
    added = [token | {"special": token["special"] or token["content"] in controls} for token in spec["added_tokens"]]
    if added == spec["added_tokens"]:
        return backend
    literal = tokenizers.Tokenizer.from_str(json.dumps({**spec, "added_tokens": added}))
    literal.encode_special_tokens = True
    return literal


def begin_ids(backend: tokenizers.Tokenizer) -> tuple[int, ...]:
    """The ids that the post-processor puts before a text."""
    encoding = backend.encode("a")
    length = next((i for i, is_added in enumerate(encoding.special_tokens_mask) if not is_added), len(encoding.ids))
    return tuple(encoding.ids[:length])


def _begin_processor(backend: tokenizers.Tokenizer, ids: Sequence[int]) -> dict[str, Any] | None:
    """A post-processor in the form of `tokenizer.json` that puts `ids` before a text."""
    if not ids:
        return None
    tokens = {i: backend.id_to_token(i) for i in ids}
    front = [{"SpecialToken": {"id": tokens[i], "type_id": 0}} for i in ids]
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    specials = {token: {"id": token, "ids": [i], "tokens": [token]} for i, token in tokens.items()}
    return {
        "type": "TemplateProcessing",
        "single": [*front, first],
        "pair": [*front, first, second],
        "special_tokens": specials,
    }


def spec_of_texts(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of a `tokenizer.json` that decide a text's ids, without those that only add ids before it."""
    return {**spec, "post_processor": None}
