"""Plain readers and writers of Megatron's and datatrove's token files, from their published layouts."""

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

MEGATRON_DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}


def write_megatron(
    prefix: Path, sequences: Sequence[np.ndarray], *, code: int = 8, documents: Sequence[int] | None = None
) -> None:
    """`documents`: numbers of the first sequences of documents, and the number of sequences."""
    places = range(len(sequences) + 1) if documents is None else documents
    data = [np.asarray(sequence, MEGATRON_DTYPES[code]).tobytes() for sequence in sequences]
    prefix.with_suffix(".bin").write_bytes(b"".join(data))
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(sequences), len(places))
    index += b"".join(struct.pack("<i", len(sequence)) for sequence in sequences)
    at = 0
    for each in data:
        index += struct.pack("<q", at)
        at += len(each)
    prefix.with_suffix(".idx").write_bytes(index + b"".join(struct.pack("<q", place) for place in places))


def read_megatron(prefix: Path) -> tuple[list[np.ndarray], list[int]]:
    """Sequences and document places."""
    index, data = prefix.with_suffix(".idx").read_bytes(), prefix.with_suffix(".bin").read_bytes()
    assert index[:9] == b"MMIDIDX\x00\x00"
    version, code, count, num_places = struct.unpack_from("<QBQQ", index, 9)
    assert version == 1
    dtype = np.dtype(MEGATRON_DTYPES[code])
    lengths = struct.unpack_from(f"<{count}i", index, 34)
    pointers = struct.unpack_from(f"<{count}q", index, 34 + 4 * count)
    places = struct.unpack_from(f"<{num_places}q", index, 34 + 12 * count)
    assert len(index) == 34 + 12 * count + 8 * num_places
    found = [np.frombuffer(data, dtype, length, at) for length, at in zip(lengths, pointers, strict=True)]
    return found, list(places)


def write_datatrove(path: Path, documents: Sequence[np.ndarray], *, token_bytes: int = 2) -> None:
    tokens = np.concatenate(documents).astype({2: "<u2", 4: "<u4"}[token_bytes])
    path.write_bytes(tokens.tobytes())
    ends = np.cumsum([len(document) for document in documents]).tolist()
    Path(f"{path}.index").write_bytes(struct.pack(f"<{len(ends)}Q", *ends))
    Path(f"{path}.metadata").write_text(f"a tokenizer|{token_bytes}\n{len(tokens)}\nfew")


def read_datatrove(path: Path) -> list[np.ndarray]:
    """Documents."""
    first, second = Path(f"{path}.metadata").read_text().split("\n")[:2]
    dtype = {"2": "<u2", "4": "<u4"}[first.split("|")[-1]]
    tokens = np.frombuffer(path.read_bytes(), dtype)
    assert len(tokens) == int(second)
    index = Path(f"{path}.index").read_bytes()
    ends = struct.unpack(f"<{len(index) // 8}Q", index)
    return [tokens[start:stop] for start, stop in zip((0, *ends[:-1]), ends, strict=True)]
