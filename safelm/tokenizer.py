"""Text to token ids and back: a thin wrapper over Hugging Face `tokenizers` that knows the harm tag.

What it promises, for every byte-level BPE vocabulary it accepts:

- The harm tag (Maini et al. 2025, section 4) is exactly one id, added as a special token where it is missing.
- Encoding is *literal*: a special token's string inside text (`<|endoftext|>`, the tag's own string) is ordinary
  characters, so text from the web can't forge one. Only `encode_tagged` turns the tag's string into its id.
- `decode(encode(text)) == text`, except for bytes that the vocabulary has no token for. Those vanish, and
  `count_lost_bytes` says how many. A trained vocabulary loses none. SmolLM2's lacks 21 byte values, 8 of which occur in
  UTF-8 text: the control characters 04 06 13 14 16 1d, and f1 f2, the first bytes of the unassigned planes 4 to 11.
  (A vocabulary from a Hugging Face folder may bring a normalizer, such as NFC: then the normalized text comes back.)
- Nothing is added around text: no BOS, no EOS, no padding, no truncation.

A vocabulary has `vocab_size` real ids; padding the embedding to a multiple of 128 is the model's business.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import fsspec
import numpy as np
import tokenizers
from jaxtyping import Int32
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from safelm import gguf_tokenizer
from safelm.tags import HARM_TAG

END_OF_TEXT = "<|endoftext|>"
CHAT_START = "<|im_start|>"
CHAT_END = "<|im_end|>"
ASSISTANT = "assistant"
_TRAINED_SPECIALS = (END_OF_TEXT, CHAT_START, CHAT_END, HARM_TAG)  # ids 0 to 3 of a trained vocabulary
_TOKENIZER_FILE = "tokenizer.json"
_CONFIG_FILES = ("tokenizer_config.json", "special_tokens_map.json")
_GGUF_MAGIC = b"GGUF"


class Tokenizer:
    """A byte-level BPE vocabulary with the harm tag in it. Picklable, safe to share between threads.

    Attributes:
        vocab_size: number of real ids, the tag included (the largest id plus one).
        eos_id: the end of a document, `<|endoftext|>` where the vocabulary has it (SmolLM2: 0).
        harm_tag_id: the one id of the harm tag (SmolLM2: 49152).
        chat_start_id, chat_end_id: ChatML's `<|im_start|>` and `<|im_end|>`, or None.
        hash: sha256 (hex) over the whole tokenizer, unchanged by saving and loading; for manifests and checkpoints.
    """

    def __init__(self, backend: tokenizers.Tokenizer, *, eos_token: str = END_OF_TEXT, origin: str = "tokenizer"):
        """Takes `backend` over, adding the harm tag where it is missing. `origin` names the source in errors.

        Raises:
            ValueError: the vocabulary isn't byte-level BPE, has no `eos_token`, or can't keep special tokens apart from
                text.
        """
        self._backend = _prepared(backend, eos_token, origin)
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        self.eos_id = vocabulary[eos_token]
        self.harm_tag_id = vocabulary[HARM_TAG]
        self.chat_start_id = vocabulary.get(CHAT_START)
        self.chat_end_id = vocabulary.get(CHAT_END)
        self._eos_token = eos_token
        self._lost_bytes = _bytes_without_token(vocabulary)
        self._byte_of = {character: byte for byte, character in enumerate(_byte_characters())}
        self._specials = {i: t.content for i, t in self._backend.get_added_tokens_decoder().items() if t.special}
        self._newline = self.encode("\n")
        canonical = json.dumps(json.loads(self._backend.to_str()), sort_keys=True, separators=(",", ":"))
        self.hash = hashlib.sha256(canonical.encode()).hexdigest()
        self._check_literal(origin)

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, every special token's string in it taken literally."""
        return self._backend.encode(_utf8(text), add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[Int32[np.ndarray, " tokens"]]:
        """`encode` of each text, on all cores (`TOKENIZERS_PARALLELISM=false` keeps it to one)."""
        encodings = self._backend.encode_batch_fast([_utf8(text) for text in texts], add_special_tokens=False)
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
        """The bytes that one id adds to `decode`'s: part of a character at times, nothing for an id without a token."""
        content = self._backend.id_to_token(token) or ""
        if token not in self._specials and all(character in self._byte_of for character in content):
            return bytes(self._byte_of[character] for character in content)
        return content.encode()

    def special_token(self, token: int) -> str | None:
        """The string of a special token (end of text, ChatML's, the harm tag, ..); None for a token of text."""
        return self._specials.get(token)

    def count_lost_bytes(self, text: str) -> int:
        """How many bytes of `text` in UTF-8 have no token in this vocabulary and so vanish when it is encoded."""
        if not self._lost_bytes:
            return 0
        data = _utf8(text).encode()
        return len(data) - len(data.translate(None, self._lost_bytes))

    def render_chat(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = False) -> list[int]:
        """The ids of a conversation in ChatML: `<|im_start|>role\\ncontent<|im_end|>\\n` for each message.

        Role and content are encoded literally and apart: text can't open or close a turn, and an answer has the ids
        that it has behind a generation prompt. No system message is put in.

        Args:
            messages: each with the keys "role" and "content".
            add_generation_prompt: open the assistant's turn at the end.

        Raises:
            ValueError: the vocabulary has no ChatML tokens, or a message lacks a key or has a line break in its role.
        """
        ids, _ = self.render_chat_spans(messages)
        return [*ids, self.chat_start_id, *self.encode(f"{ASSISTANT}\n")] if add_generation_prompt else ids

    def render_chat_spans(
        self, messages: Sequence[Mapping[str, str]], *, is_tagged: bool = False
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """`render_chat`, and where in it the assistant writes: ranges [start, stop) of its words and `<|im_end|>`.

        With `is_tagged` the tag's string in what the assistant says becomes the tag's id (see `encode_tagged`).
        """
        if self.chat_start_id is None or self.chat_end_id is None:
            raise ValueError(f"this vocabulary has no {CHAT_START} and {CHAT_END}: it can't render a chat")
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        for index, message in enumerate(messages):
            role, content = message.get("role"), message.get("content")
            if not isinstance(role, str) or not isinstance(content, str) or not role or "\n" in role:
                raise ValueError(f"message {index}: needs a one-line role and a content string, got {dict(message)!r}")
            ids += [self.chat_start_id, *self.encode(f"{role}\n")]
            start = len(ids)
            is_assistant = role == ASSISTANT
            ids += self.encode_tagged(content) if is_tagged and is_assistant else self.encode(content)
            ids.append(self.chat_end_id)
            spans += [(start, len(ids))] if is_assistant else []
            ids += self._newline
        return ids, spans

    def to_json(self) -> str:
        """The vocabulary as the text of a `tokenizer.json`."""
        return self._backend.to_str()

    def save(self, path: str) -> None:
        """Writes the folder `path` (local or an fsspec URL) in the Hugging Face layout; no file is ever half there."""
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": self._eos_token}
        config |= {"additional_special_tokens": [HARM_TAG], "clean_up_tokenization_spaces": False}
        _write_text(path, _CONFIG_FILES[0], json.dumps(config, indent=2) + "\n")
        _write_text(path, _TOKENIZER_FILE, self._backend.to_str(pretty=True))

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str]) -> "Tokenizer":
        """Reads a Hugging Face folder, a `tokenizer.json` (both local or an fsspec URL) or a local GGUF file.

        The end of a document is `<|endoftext|>` where the vocabulary has it, else the `eos_token` of
        `tokenizer_config.json` or `special_tokens_map.json` beside it.

        Raises:
            FileNotFoundError: nothing at `path`, or a folder without a `tokenizer.json`.
            ValueError: a file that is none of the three, or a vocabulary that can't be used (see `__init__`).
        """
        path = os.fspath(path)
        filesystem, inner = fsspec.core.url_to_fs(path)
        if not filesystem.exists(inner):
            raise FileNotFoundError(f"{path}: no such tokenizer file or folder")
        folder, file = inner.rsplit("/", 1)[0], inner
        if filesystem.isdir(inner):
            folder, file = inner, f"{inner.rstrip('/')}/{_TOKENIZER_FILE}"
            if not filesystem.exists(file):
                raise FileNotFoundError(f"{path}: the folder has no {_TOKENIZER_FILE}")
        if filesystem.cat_file(file, 0, len(_GGUF_MAGIC)) == _GGUF_MAGIC or file.endswith(".gguf"):
            if not isinstance(filesystem, fsspec.get_filesystem_class("file")):
                raise ValueError(f"{path}: a GGUF file must be local; copy it to this machine first")
            return cls(gguf_tokenizer.read_gguf_tokenizer(file), origin=path)
        backend = _from_json(filesystem.cat_file(file), path)
        return cls(backend, eos_token=_eos_token(backend, filesystem, folder, path), origin=path)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Trains byte-level BPE on `texts`: SmolLM2's pre-tokenizer, all 256 bytes, so nothing is ever lost.

        Ids: `<|endoftext|>` 0, `<|im_start|>` 1, `<|im_end|>` 2, the harm tag 3, the bytes, then merges. The same texts
        give the same vocabulary. A corpus with too few repeated words ends in fewer than `vocab_size` ids.

        Raises:
            ValueError: `vocab_size` below the 260 ids that always exist.
        """
        smallest = len(_TRAINED_SPECIALS) + 256
        if vocab_size < smallest:
            raise ValueError(f"vocab_size must be at least {smallest} (special tokens and 256 bytes), got {vocab_size}")
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = gguf_tokenizer.smollm_pre_tokenizer()
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[AddedToken(token, normalized=False, special=True) for token in _TRAINED_SPECIALS],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        backend.train_from_iterator((_utf8(text) for text in texts), trainer)
        return cls(backend)

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickle, (self._backend.to_str(), self._eos_token)

    def _check_literal(self, origin: str) -> None:
        strings = [*self._specials.values()]
        for token, ids in zip(strings, self.encode_batch(strings), strict=True):
            if not self._specials.keys().isdisjoint(ids.tolist()):
                raise ValueError(f"{origin}: text that spells {token!r} would turn into a special token")


def _prepared(backend: tokenizers.Tokenizer, eos_token: str, origin: str) -> tokenizers.Tokenizer:
    """A copy of `backend` that is byte-level, deterministic and literal, with the harm tag in its vocabulary."""
    spec = json.loads(backend.to_str())
    if spec["model"].get("type") != "BPE" or not _is_byte_level(spec["pre_tokenizer"]):
        raise ValueError(f"{origin}: not byte-level BPE without a prefix space (as of SmolLM2, Llama 3, GPT-2)")
    spec |= {"truncation": None, "padding": None}
    spec["model"] |= {"dropout": None, "unk_token": None}  # a byte without a token is dropped and counted, not special
    for token in spec["added_tokens"]:
        token["special"] |= token["content"] in (eos_token, *_TRAINED_SPECIALS)
    prepared = tokenizers.Tokenizer.from_str(json.dumps(spec))
    if prepared.decoder is None:
        prepared.decoder = decoders.ByteLevel()

    vocabulary = prepared.get_vocab(with_added_tokens=True)
    if eos_token not in vocabulary:
        raise ValueError(f"{origin}: the vocabulary has no end-of-document token {eos_token!r}")
    known = [token for token in (eos_token, CHAT_START, CHAT_END) if token in vocabulary]
    prepared.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in [*known, HARM_TAG]])
    ids = prepared.get_vocab(with_added_tokens=True)
    if len(set(ids.values())) != len(ids):
        raise ValueError(f"{origin}: two tokens share an id ({len(ids)} tokens, {len(set(ids.values()))} ids)")
    prepared.encode_special_tokens = True  # in `tokenizers`, this name means: encode their strings as plain text
    return prepared


def _is_byte_level(pre_tokenizer: dict[str, Any] | None) -> bool:
    parts = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer])
    return any(part and part["type"] == "ByteLevel" and not part["add_prefix_space"] for part in parts)


def _bytes_without_token(vocabulary: Mapping[str, int]) -> bytes:
    return bytes(byte for byte, character in enumerate(_byte_characters()) if character not in vocabulary)


def _byte_characters() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary (GPT-2's table)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _from_json(data: bytes, path: str) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_buffer(data)
    except Exception as error:  # `tokenizers` raises bare Exception
        raise ValueError(f"{path}: not a tokenizer.json that `tokenizers` can read ({error})") from error


def _eos_token(backend: tokenizers.Tokenizer, filesystem: fsspec.AbstractFileSystem, folder: str, path: str) -> str:
    if backend.token_to_id(END_OF_TEXT) is not None:
        return END_OF_TEXT
    for name in _CONFIG_FILES:
        file = f"{folder.rstrip('/')}/{name}"
        if not filesystem.exists(file):
            continue
        try:
            token = json.loads(filesystem.cat_file(file)).get("eos_token")
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{file}: not a JSON object ({error})") from error
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            return token
    raise ValueError(f"{path}: no {END_OF_TEXT} in the vocabulary and no eos_token in {' or '.join(_CONFIG_FILES)}")


def _utf8(text: str) -> str:
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"text has a lone surrogate at character {error.start}: it isn't Unicode text") from error
    return text


def _unpickle(tokenizer_json: str, eos_token: str) -> Tokenizer:
    return Tokenizer(tokenizers.Tokenizer.from_str(tokenizer_json), eos_token=eos_token)


def _write_text(folder: str, name: str, text: str) -> None:
    filesystem, inner = fsspec.core.url_to_fs(folder)
    target = f"{inner.rstrip('/')}/{name}"
    filesystem.makedirs(inner, exist_ok=True)
    if not isinstance(filesystem, fsspec.get_filesystem_class("file")):
        filesystem.pipe_file(target, text.encode())  # an object store shows an object only when it is whole
        return
    handle, temporary = tempfile.mkstemp(prefix=f".{name}.", dir=inner)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise
