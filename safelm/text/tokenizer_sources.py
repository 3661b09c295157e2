"""Finds and reads a vocabulary: a Hugging Face folder, a `tokenizer.json`, a model of a hub, or a GGUF file."""

import fsspec
import tokenizers

from safelm.io import gguf_file, hub
from safelm.io.collector import imports_left_alone
from safelm.text import conventions, gguf_tokenizer, tokenizer_backend
from safelm.text.conventions import Declared

TOKENIZER_FILE = "tokenizer.json"


def read(path: str) -> tuple[tokenizers.Tokenizer, Declared]:
    """The vocabulary at `path` and how its texts begin and end, as `Tokenizer.from_pretrained` takes it.

    Raises FileNotFoundError if nothing is there, ValueError for a file of another kind.
    """
    filesystem, inner = fsspec.core.url_to_fs(hub.folder(path, with_weights=False))
    if not filesystem.exists(inner):
        raise FileNotFoundError(f"{path}: no such tokenizer file or folder")
    folder, file = inner.rsplit("/", 1)[0], inner
    if filesystem.isdir(inner):
        folder, file = inner, f"{inner.rstrip('/')}/{TOKENIZER_FILE}"
        if not filesystem.exists(file):
            raise FileNotFoundError(f"{path}: the folder has no {TOKENIZER_FILE}")
    if filesystem.cat_file(file, 0, len(gguf_file.MAGIC)) == gguf_file.MAGIC or file.endswith(".gguf"):
        if not isinstance(filesystem, fsspec.get_filesystem_class("file")):
            raise ValueError(f"{path}: a GGUF file must be local; copy it to this machine first")
        return gguf_tokenizer.read_gguf_tokenizer(file)
    declared = conventions.declared_in_folder(filesystem, folder.rstrip("/"))
    with imports_left_alone():
        return tokenizer_backend.from_json(filesystem.cat_file(file), path), declared
