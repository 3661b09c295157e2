"""How a model's texts begin and end: read from its source, stored beside its vocabulary, exported again.

A Hugging Face folder says it in `tokenizer_config.json`, `special_tokens_map.json`, `chat_template.jinja`,
`generation_config.json` and `config.json`; a GGUF file in its fields; our checkpoints in a folder `tokenizer` with the
files of a Hugging Face folder. `safelm.text.prompting` uses it to turn prompts into ids.
"""

import dataclasses
import json
import logging
import os
from collections.abc import Mapping
from typing import Any

from safelm.io import remote
from safelm.io.files import write_whole

log = logging.getLogger(__name__)

TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
GENERATION_CONFIG = "generation_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
DOCUMENT_END = "document_end"  # in `tokenizer_config.json`: ours alone
_MODEL_CONFIG = "config.json"
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


@dataclasses.dataclass(frozen=True)
class Declared:
    """What a model's source says about how its texts begin and end.

    Attributes:
      chat_template: Jinja source; None where there is none.
      special_tokens: pairs of a name ("bos_token", "eos_token", ..) and its string.
      end_ids: ids of which any ends the model's output.
      begin_ids: ids before every text; None leaves it to the tokenizer's post-processor.
      begins_chats: whether `begin_ids` also precede conversations, outside their template.
      template_kwargs: further variables of the chat template; no source has them, whoever asks the model does.
      document_end: the token after every document of pretraining; None chooses as `Tokenizer.from_pretrained` says.
    """

    chat_template: str | None = None
    special_tokens: tuple[tuple[str, str], ...] = ()
    end_ids: tuple[int, ...] = ()
    begin_ids: tuple[int, ...] | None = None
    begins_chats: bool = False
    template_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    document_end: str | None = None

    def token(self, name: str) -> str | None:
        """The string of a named special token."""
        return dict(self.special_tokens).get(name)


@dataclasses.dataclass(frozen=True)
class TextConventions:
    """How a model's texts begin and end, in ids of its vocabulary.

    Attributes:
      document_end_id: the id that follows every document in pretraining.
      begin_ids: ids put before a plain text, as the tokenizer's own post-processor does.
      chat_begin_ids: ids put before a conversation rendered by `chat_template`.
      end_ids: ids of which any ends the model's output, in a chat or not; `document_end_id` comes first.
      chat_template: Jinja source; None for ChatML, if the vocabulary has its tokens.
      template_kwargs: further variables of the chat template, such as `enable_thinking`.
      special_tokens: strings by the names that templates know them by ("bos_token", "eos_token", ..).
      control_tokens: ids of all strings that a text must not turn into by spelling them: special tokens, and added ones
        that look like markup or that the chat template writes.
    """

    document_end_id: int
    begin_ids: tuple[int, ...]
    chat_begin_ids: tuple[int, ...]
    end_ids: tuple[int, ...]
    chat_template: str | None
    special_tokens: Mapping[str, str]
    control_tokens: Mapping[str, int]
    template_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def declared_in_folder(folder: str) -> Declared:
    """Reads the declarations of a local or remote folder. Raises ValueError naming the file and field that is wrong."""
    files = _Folder(folder)
    config = files.json(SPECIAL_TOKENS_MAP) | files.json(TOKENIZER_CONFIG)
    where = f"{folder}/{TOKENIZER_CONFIG}"
    tokens = [(name, _token_string(config.get(name), f"{where}: {name}")) for name in _NAMED_TOKENS]
    template = files.text(CHAT_TEMPLATE)
    if template is None:
        template = _template_string(config.get("chat_template"), f"{where}: chat_template")
    name = GENERATION_CONFIG if files.has(GENERATION_CONFIG) else _MODEL_CONFIG
    ends = _end_ids(files.json(name).get("eos_token_id"), f"{folder}/{name}: eos_token_id")
    strings = tuple((name, token) for name, token in tokens if token is not None)
    document_end = _token_string(config.get(DOCUMENT_END), f"{where}: {DOCUMENT_END}")
    return Declared(template, strings, ends, document_end=document_end)


def declared_in_gguf(fields: Mapping[str, Any], tokens: list[str], *, begins: bool, path: str) -> Declared:
    """Reads the declarations in a GGUF file's fields (Python values by key).

    Args:
      begins: whether texts begin with the beginning token if no field says so.
      path: the file, named in errors.

    Raises ValueError naming the field that is wrong.
    """

    def token_id(name: str) -> int | None:
        key = f"tokenizer.ggml.{name}_token_id"
        value = fields.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise ValueError(f"{path}: {key} = {value!r}: not a token id")
        if value is not None and not 0 <= value < len(tokens):
            raise ValueError(f"{path}: {key} = {value} is not in the vocabulary of {len(tokens)}")
        return value

    template = _template_string(fields.get("tokenizer.chat_template"), f"{path}: tokenizer.chat_template")
    adds_bos = fields.get("tokenizer.ggml.add_bos_token", begins)
    if not isinstance(adds_bos, bool):
        raise ValueError(f"{path}: tokenizer.ggml.add_bos_token = {adds_bos!r}: neither true nor false")
    named = {
        "bos_token": token_id("bos"),
        "eos_token": token_id("eos"),
        "unk_token": token_id("unknown"),
        "pad_token": token_id("padding"),
    }
    ends = [end for name in ("eos", "eot", "eom") if (end := token_id(name)) is not None]
    strings = tuple((name, tokens[i]) for name, i in named.items() if i is not None)
    begins = (named["bos_token"],) if adds_bos and named["bos_token"] is not None else ()
    return Declared(template, strings, tuple(dict.fromkeys(ends)), begins)


def as_files(conventions: TextConventions, *, chat_template: str | None) -> dict[str, dict[str, Any]]:
    """The JSON files that `declared_in_folder` reads back, with the chat template as other software expects it."""
    specials = dict(conventions.special_tokens)
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **specials}
    config["clean_up_tokenization_spaces"] = False
    config |= {} if chat_template is None else {"chat_template": chat_template}
    begin = conventions.begin_ids[0] if conventions.begin_ids else conventions.document_end_id
    generation = {"bos_token_id": begin, "eos_token_id": list(conventions.end_ids)}
    return {
        TOKENIZER_CONFIG: config,
        GENERATION_CONFIG: generation | {"pad_token_id": conventions.document_end_id},
    }


def write_file(folder: str, name: str, text: str) -> None:
    """Writes a file of a folder, local or an fsspec URL, that is never seen half-written."""
    target = f"{folder.rstrip('/')}/{name}"
    if remote.is_remote(folder):
        remote.write_text(target, text)  # an object store shows an object only when it is whole
    else:
        write_whole(os.path.expanduser(target), text)


@dataclasses.dataclass(frozen=True)
class _Folder:
    folder: str

    def has(self, name: str) -> bool:
        return remote.kind(f"{self.folder}/{name}") == "file"

    def text(self, name: str) -> str | None:
        if not self.has(name):
            return None
        try:
            return remote.read_bytes(f"{self.folder}/{name}").decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.folder}/{name}: not UTF-8 ({error})") from error

    def json(self, name: str) -> dict[str, Any]:
        text = self.text(name)
        try:
            values = {} if text is None else json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.folder}/{name}: not JSON ({error})") from error
        if not isinstance(values, dict):
            raise ValueError(f"{self.folder}/{name}: not a JSON object")
        return values


def _token_string(value: Any, where: str) -> str | None:
    value = value.get("content") if isinstance(value, dict) else value
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{where} = {value!r}: not a token's string")
    return value


def _template_string(value: Any, where: str) -> str | None:
    if isinstance(value, list):  # several, by name
        named = {each.get("name"): each.get("template") for each in value if isinstance(each, dict)}
        value = named.get("default")
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{where}: not a template's text but {type(value).__name__}")
    return value


def _end_ids(value: Any, where: str) -> tuple[int, ...]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for each in ids:
        if isinstance(each, bool) or not isinstance(each, int) or each < 0:
            raise ValueError(f"{where} = {value!r}: not a token id or a list of them")
    return tuple(ids)
