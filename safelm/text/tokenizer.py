"""Encodes text as token ids and decodes them: a thin wrapper over Hugging Face `tokenizers` that knows the harm tag.

Guarantees for every BPE vocabulary it accepts, byte-level or with byte fallback (`safelm.text.spelling`):

- The harm tag (Maini et al. 2025, section 4) is exactly one id, added as a special token where it is missing.
- Encoding is *literal*: a special token's string inside text (`<|endoftext|>`, the tag's own string) is ordinary
  characters, so text from the web can't forge one. Only `encode_tagged` turns the tag's string into its id.
- `decode(encode(text)) == text`, except for bytes that the vocabulary has no token for. Those vanish, and
  `count_lost_bytes` says how many. A trained vocabulary loses none. SmolLM2's lacks 21 byte values, 8 of which occur in
  UTF-8 text: the control characters 04 06 13 14 16 1d, and f1 f2, the first bytes of the unassigned planes 4 to 11. (A
  vocabulary from a Hugging Face folder may bring a normalizer, such as NFC: then the normalized text comes back.)
- Nothing is added around text: no BOS, no EOS, no padding, no truncation.

A vocabulary has `vocab_size` real ids; the model pads its embedding to a multiple of 128.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Int32

from safelm.io.collector import imports_left_alone
from safelm.tags import HARM_TAG
from safelm.text import chat_template, named_templates, spelling, tokenizer_backend, tokenizer_sources
from safelm.text import conventions as text_conventions
from safelm.text.chat_template import CHAT_END, CHAT_START
from safelm.text.conventions import Declared, TextConventions


class Tokenizer:
    """A BPE vocabulary with the harm tag in it. Picklable, safe to share between threads.

    Attributes:
        origin: where the vocabulary comes from, named in errors.
        vocab_size: number of real ids, the tag included (the largest id plus one).
        conventions: how the model's texts begin and end, and its chat template (see `safelm.text.prompting`).
        eos_id: the end of a document, `<|endoftext|>` where the vocabulary has it (SmolLM2: 0).
        harm_tag_id: the one id of the harm tag (SmolLM2: 49152).
        chat_start_id, chat_end_id: ChatML's `<|im_start|>` and `<|im_end|>`, or None.
        hash: SHA-256 (hex) of everything that decides a text's ids, unchanged by saving and loading; stored in
          manifests and checkpoints.
    """

    def __init__(self, backend: tokenizers.Tokenizer, *, declared: Declared | None = None, origin: str = "tokenizer"):
        """Takes ownership of `backend` and adds the harm tag if it is missing.

        Args:
            declared: how texts begin and end, as the vocabulary's source says.
            origin: names the source in errors.

        Raises:
            ValueError: the vocabulary isn't lossless BPE, has no end of a document, or can't keep special tokens
                apart from text.
        """
        self._declared, self.origin = declared or Declared(), origin
        with tokenizer_backend.as_value_errors(origin), imports_left_alone():
            self._set_up(backend)

    def _set_up(self, backend: tokenizers.Tokenizer) -> None:
        eos_token = tokenizer_backend.document_end(backend, self._declared, self.origin)
        self._backend = tokenizer_backend.prepared(backend, eos_token, self._declared, self.origin)
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        self.eos_id = vocabulary[eos_token]
        self.harm_tag_id = vocabulary[HARM_TAG]
        self.chat_start_id = vocabulary.get(CHAT_START)
        self.chat_end_id = vocabulary.get(CHAT_END)
        spec = json.loads(self._backend.to_str())
        self._spelling = spelling.found(spec)
        self._lost_bytes = self._spelling.bytes_without_token(vocabulary)
        added = self._backend.get_added_tokens_decoder()
        self._specials = {i: t.content for i, t in added.items() if t.special}
        controls = tokenizer_backend.control_tokens(self._backend, self._declared.chat_template)
        self._encoder = tokenizer_backend.literal(self._backend, spec, controls)
        self.conventions = self._find_conventions(vocabulary, controls)
        canonical = json.dumps(tokenizer_backend.spec_of_texts(spec), sort_keys=True, separators=(",", ":"))
        self.hash = hashlib.sha256(canonical.encode()).hexdigest()
        self._check_literal()

    @property
    def has_chatml(self) -> bool:
        """Whether the vocabulary has the tokens of ChatML."""
        return self.chat_start_id is not None and self.chat_end_id is not None

    @property
    def chat_template_hash(self) -> str:
        """Hash (hex) of the template that conversations are put in, for manifests and protocols; "" where none is."""
        template = self.conventions.chat_template or (chat_template.CHATML if self.has_chatml else "")
        return hashlib.sha256(template.encode()).hexdigest()[:16] if template else ""

    def beginning_with(self, ids: Sequence[int], *, begins_chats: bool = True) -> "Tokenizer":
        """A copy for a model whose training puts `ids` before every text and, with `begins_chats`, conversation.

        Without `begins_chats` the chat template writes what conversations begin with. `save` keeps the ids; the hash
        does not change.
        """
        return self._declaring(begin_ids=tuple(ids), begins_chats=begins_chats)

    def with_chat_template(self, template: str) -> "Tokenizer":
        """The same vocabulary with a chat template by name or file (`safelm.text.named_templates`), which `save` keeps.

        "" leaves it as it is. ValueError or OSError for a template that isn't there or can't be used.
        """
        if not template:
            return self
        vocabulary, specials = self._backend.get_vocab(with_added_tokens=True), self.conventions.special_tokens
        source = named_templates.usable(template, vocabulary, specials, where=self.origin)
        return self._declaring(chat_template=source)

    def with_document_end(self, token: str) -> "Tokenizer":
        """The same vocabulary with another token behind every document, which `save` keeps; "" leaves it as it is.

        ValueError for one that isn't special.
        """
        if token and token not in self._specials.values():
            known = ", ".join(sorted(self._specials.values())[:8])
            raise ValueError(f"{self.origin}: end of document {token!r} is no special token; there are {known}")
        return self._declaring(document_end=token) if token else self

    def _declaring(self, **changes: Any) -> "Tokenizer":
        """The same vocabulary with other conventions, beginning as this one does."""
        own = self.conventions
        kept = {
            "chat_template": own.chat_template,
            "begin_ids": own.begin_ids,
            "begins_chats": bool(own.chat_begin_ids),
        }
        declared = dataclasses.replace(self._declared, **(kept | changes))
        return Tokenizer(self._backend, declared=declared, origin=self.origin)

    def with_backend(self, backend: tokenizers.Tokenizer) -> "Tokenizer":
        """Another vocabulary of the same conventions (see `safelm.text.control_tokens`)."""
        return Tokenizer(backend, declared=self._declared, origin=self.origin)

    def with_template_kwargs(self, values: Mapping[str, Any]) -> "Tokenizer":
        """The same vocabulary, its chat template given further variables, such as `enable_thinking=False`.

        They are whoever's who asks: `save` doesn't keep them, the hash is the same. Raises ValueError for a name that
        the template is given anyway, and where the model has no template of its own.
        """
        values = chat_template.check_kwargs(dict(values), "chat_template_kwargs")
        if not values:
            return self
        if self.conventions.chat_template is None:
            raise ValueError(f"{self.origin}: has no chat template that chat_template_kwargs={values} could go to")
        return Tokenizer(
            self._backend, declared=dataclasses.replace(self._declared, template_kwargs=values), origin=self.origin
        )

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, every special token's string in it taken literally."""
        text = _utf8(text)
        with tokenizer_backend.as_value_errors(self.origin, tokenizer_backend.UNCUT):
            return self._encoder.encode(text, add_special_tokens=False).ids

    def normalized(self, text: str) -> str:
        """The text after the vocabulary's own normalizer, if it has one, and before it is split into tokens."""
        normalizer = self._backend.normalizer if isinstance(self._spelling, spelling.ByteLevel) else None
        return text if normalizer is None else normalizer.normalize_str(text)

    def encode_batch(self, texts: Sequence[str]) -> list[Int32[np.ndarray, " tokens"]]:
        """`encode` of each text, on all cores (`TOKENIZERS_PARALLELISM=false` keeps it to one)."""
        texts = [_utf8(text) for text in texts]
        with tokenizer_backend.as_value_errors(self.origin, tokenizer_backend.UNCUT):
            encodings = self._encoder.encode_batch_fast(texts, add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=np.int32) for encoding in encodings]

    def encode_tagged(self, text: str) -> list[int]:
        """Each occurrence of the tag's string becomes `harm_tag_id`; what stands between is encoded literally.

        A tag right behind a word, before the whitespace (`"w1<potentially_unsafe_content> w2"`), changes no other id:
        without the tags the ids are those of the text without them. That holds for trained vocabularies and SmolLM2's,
        where no token reaches from a word into the whitespace behind it (Llama 3's pattern joins ".\n"). Elsewhere a
        tag can cut a token in two. Give it only text whose tags the pipeline put there itself.
        """
        first, *others = [self.encode(piece) for piece in text.split(HARM_TAG)]
        for piece in others:
            first.append(self.harm_tag_id)
            first.extend(piece)
        return first

    def encode_tagged_batch(self, texts: Sequence[str]) -> list[Int32[np.ndarray, " tokens"]]:
        """`encode_tagged` of each text, on all cores."""
        split_texts = [text.split(HARM_TAG) for text in texts]
        encoded = iter(self.encode_batch([piece for pieces in split_texts for piece in pieces]))
        tag = np.asarray([self.harm_tag_id], dtype=np.int32)
        joined = []
        for pieces in split_texts:
            parts = [next(encoded)]
            for _ in pieces[1:]:
                parts += [tag, next(encoded)]
            joined.append(np.concatenate(parts) if len(parts) > 1 else parts[0])
        return joined

    def decode(self, ids: Iterable[int], *, keep_special: bool = True) -> str:
        """The text of `ids`; bytes that don't form UTF-8 become U+FFFD. `keep_special=False` leaves special tokens out.

        Raises:
            ValueError: an id outside [0, vocab_size), such as a padded one.
        """
        ids = [int(i) for i in ids]
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            raise ValueError(f"token ids must lie in [0, {self.vocab_size}), got {min(ids)} to {max(ids)}")
        return self._backend.decode(ids, skip_special_tokens=not keep_special)

    def token_bytes(self, token: int) -> bytes:
        """The bytes that one id adds to `decode`'s: at times part of a character, none for an id without a token."""
        content = self._backend.id_to_token(token) or ""
        return content.encode() if token in self._specials else self._spelling.bytes_of(content)

    @property
    def special_ids(self) -> tuple[int, ...]:
        """The ids of all special tokens."""
        return tuple(self._specials)

    def special_token(self, token: int) -> str | None:
        """The string of a special token (end of text, ChatML's, the harm tag, ..); None for a token of text."""
        return self._specials.get(token)

    def count_lost_bytes(self, text: str) -> int:
        """How many UTF-8 bytes of `text` have no token in this vocabulary and are dropped by `encode`."""
        if not self._lost_bytes:
            return 0
        data = _utf8(text).encode()
        return len(data) - len(data.translate(None, self._lost_bytes))

    def to_json(self) -> str:
        """The vocabulary as the text of a `tokenizer.json`."""
        return self._backend.to_str()

    def save(self, path: str) -> None:
        """Writes a folder in the Hugging Face layout, local or at an fsspec URL; every file appears whole."""
        conventions = self.conventions
        template = conventions.chat_template or (chat_template.CHATML if self.has_chatml else None)
        if template is not None:
            template = chat_template.begun(template, self._strings(conventions.chat_begin_ids))
        files = text_conventions.as_files(conventions, chat_template=template)
        config = files[text_conventions.TOKENIZER_CONFIG]
        config["additional_special_tokens"] = [HARM_TAG]
        if self._declared.document_end:
            config[text_conventions.DOCUMENT_END] = self._declared.document_end
        for name, values in files.items():
            text_conventions.write_file(path, name, json.dumps(values, indent=2, ensure_ascii=False) + "\n")
        text_conventions.write_file(path, tokenizer_sources.TOKENIZER_FILE, self._backend.to_str(pretty=True))

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str]) -> "Tokenizer":
        """Reads a Hugging Face folder or `tokenizer.json` (local or at an fsspec URL), or a local GGUF file.

        `hf:ORG/NAME[@REVISION]` is a folder too (`safelm.io.hub`).

        The end-of-document token is the source's `document_end` (`with_document_end`), otherwise `<|endoftext|>` or
        `<|end_of_text|>` if the vocabulary has one, otherwise the source's `eos_token`. Chat template, special tokens
        and end ids are read too (`conventions`).

        Raises:
            FileNotFoundError: nothing at `path`, or a folder without a `tokenizer.json`.
            ValueError: a file that is none of the three, or a vocabulary that can't be used (see `__init__`).
        """
        path = os.fspath(path)
        backend, declared = tokenizer_sources.read(path)
        return cls(backend, declared=declared, origin=path)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Trains byte-level BPE on `texts` with SmolLM2's pre-tokenizer and all 256 bytes, so no text loses bytes.

        Ids: `<|endoftext|>` 0, `<|im_start|>` 1, `<|im_end|>` 2, the harm tag 3, the bytes, then merges. The same texts
        give the same vocabulary. A corpus with too few repeated words ends in fewer than `vocab_size` ids.

        Raises:
            ValueError: `vocab_size` below the 260 ids that always exist.
        """
        return cls(tokenizer_backend.trained(map(_utf8, texts), vocab_size))

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickle, (self._backend.to_str(), self._declared, self.origin)

    def _find_conventions(self, vocabulary: Mapping[str, int], controls: Mapping[str, int]) -> TextConventions:
        declared = self._declared
        begin_ids = tokenizer_backend.begin_ids(self._backend)
        if foreign := [i for i in begin_ids if i >= self.vocab_size]:
            raise ValueError(
                f"{self.origin}: texts begin with the id {foreign[0]}, the vocabulary has {self.vocab_size}"
            )
        template, begins_chats = declared.chat_template, declared.begins_chats
        if template is not None and begin_ids:
            plain = template.removeprefix(chat_template.begun("", self._strings(begin_ids)))
            template, begins_chats = plain, begins_chats or plain != template
        template = None if template == chat_template.CHATML else template
        specials = dict(declared.special_tokens)
        specials.setdefault("eos_token", self._backend.id_to_token(self.eos_id))
        if template is not None:
            turn_end = chat_template.end_of_turn(template, specials, list(controls))
        else:
            turn_end = CHAT_END if self.has_chatml else None
        named = [vocabulary.get(token) for token in (specials["eos_token"], turn_end)]
        listed = [end for end in declared.end_ids if end < self.vocab_size]
        ends = dict.fromkeys([self.eos_id, *(end for end in named if end is not None), *listed])
        return TextConventions(
            document_end_id=self.eos_id,
            begin_ids=begin_ids,
            chat_begin_ids=begin_ids if begins_chats else (),
            end_ids=tuple(ends),
            chat_template=template,
            special_tokens=specials,
            control_tokens=controls,
            template_kwargs=declared.template_kwargs,
        )

    def _strings(self, ids: Sequence[int]) -> str:
        return "".join(self._backend.id_to_token(i) for i in ids)

    def _check_literal(self) -> None:
        strings = list(self._specials.values())
        for token, ids in zip(strings, self.encode_batch(strings), strict=True):
            if not self._specials.keys().isdisjoint(ids.tolist()):
                raise ValueError(f"{self.origin}: text that spells {token!r} would turn into a special token")


def _utf8(text: str) -> str:
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"text has a lone surrogate at character {error.start}: it isn't Unicode text") from error
    return text


def _unpickle(tokenizer_json: str, declared: Declared, origin: str) -> Tokenizer:
    return Tokenizer(tokenizers.Tokenizer.from_str(tokenizer_json), declared=declared, origin=origin)
