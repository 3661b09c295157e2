"""Finds and reads a vocabulary: a Hugging Face folder, a `tokenizer.json`, a model of a hub, or a GGUF file."""

import os

import tokenizers

from safelm.io import gguf_file, hub, remote
from safelm.io.collector import imports_left_alone
from safelm.text import conventions, gguf_tokenizer, tokenizer_backend
from safelm.text.conventions import Declared

TOKENIZER_FILE = "tokenizer.json"


def read(path: str) -> tuple[tokenizers.Tokenizer, Declared]:
    """The vocabulary at `path` and how its texts begin and end, as `Tokenizer.from_pretrained` takes it.

    Raises FileNotFoundError if nothing is there, ValueError for a file of another kind.
    """
    place = hub.folder(path, with_weights=False).removeprefix("file://")
    place = place.rstrip("/") if remote.is_remote(place) else os.path.abspath(os.path.expanduser(place))
    found = remote.kind(place)
    if found is None:
        raise remote.missing(place, f"{path}: no such tokenizer file or folder")
    folder, file = os.path.dirname(place), place
    if found == "directory":
        folder, file = place, f"{place}/{TOKENIZER_FILE}"
        if not remote.exists(file):
            raise FileNotFoundError(f"{path}: the folder has no {TOKENIZER_FILE}")
    if remote.read_bytes(file, len(gguf_file.MAGIC)) == gguf_file.MAGIC or file.endswith(".gguf"):
        if remote.is_remote(file):
            raise ValueError(f"{path}: a GGUF file must be local; copy it to this machine first")
        return gguf_tokenizer.read_gguf_tokenizer(file)
    declared = conventions.declared_in_folder(folder)
    with imports_left_alone():
        return tokenizer_backend.from_json(remote.read_bytes(file), path), declared
