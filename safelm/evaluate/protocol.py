"""The protocol of a measurement: everything that decides its numbers, frozen and stored beside them."""

import dataclasses
import hashlib
from collections.abc import Collection, Mapping
from typing import Any

import jax
import numpy as np

from safelm.io import records
from safelm.models.arrays import Params


class ProtocolError(ValueError):
    """Two results that can't be compared; the message names the field and both values."""


@dataclasses.dataclass(frozen=True)
class Protocol:
    """The prompts, the model and its template, the decoding settings and the judges.

    Two results can be compared if all fields are equal except those that identify the measured model, `SUBJECT`.
    """

    suite: str
    prompts_sha256: str
    num_prompts: int
    judge_version: str  # name and fingerprint of every judge, in their order
    checkpoint_sha256: str
    vocab_hash: str
    validation: str  # which token store perplexity is taken on ("" = none) and its checksum
    method: str  # "" for what needs no decoding
    method_settings: dict[str, Any]
    max_new_tokens: int
    seed: int
    template: str = "text"  # how a prompt is put: kind and, of a chat, hash of what stands around it
    answer_start: str = ""  # which first words of the answer were given
    judge_calibration: str = ""  # hash of the judges' measured errors, which corrected rates rest on
    coherence: str = ""  # by what an answer counts as coherent
    chat_template: str = ""  # of a chat: hash of the model's template, its own or the one that was given

    @property
    def hash(self) -> str:
        """SHA-256 of all fields; a stored result is reused only if it is equal."""
        return records.fingerprint(dataclasses.asdict(self))

    @property
    def decoding_hash(self) -> str:
        """SHA-256 of the fields that decide the answers, which any judge may label later."""
        return records.fingerprint(
            {name: value for name, value in dataclasses.asdict(self).items() if name not in _NOT_DECODING}
        )


# What differs when models and ways of decoding are compared.
SUBJECT = ("checkpoint_sha256", "vocab_hash", "chat_template", "method", "method_settings")


_NOT_DECODING = (
    "suite",
    "prompts_sha256",
    "num_prompts",
    "judge_version",
    "judge_calibration",
    "coherence",
    "validation",
)


def check_comparable(
    first: Mapping[str, Any] | Protocol,
    second: Mapping[str, Any] | Protocol,
    *,
    names: tuple[str, str] = ("the first", "the second"),
    may_differ: Collection[str] = (),
) -> None:
    """Raises ProtocolError if two protocols differ in fields outside `SUBJECT` and `may_differ`.

    Raises ValueError if `may_differ` names a field that doesn't exist.
    """
    known = [field.name for field in dataclasses.fields(Protocol)]
    unknown = next((name for name in may_differ if name not in known), None)
    if unknown is not None:
        raise ValueError(f"may differ: {unknown!r} is no field of a protocol; there are {', '.join(known)}")
    values = [dataclasses.asdict(each) if isinstance(each, Protocol) else dict(each) for each in (first, second)]
    for name in known:
        a, b = (each.get(name) for each in values)
        if a != b and name not in (*SUBJECT, *may_differ):
            raise ProtocolError(
                f"{names[0]} and {names[1]} were measured under different protocols: {name} is {_short(a)} there and "
                f"{_short(b)} here"
            )


def hash_params(params: Params) -> str:
    """SHA-256 over the names, shapes, types and bytes of all parameters."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.shape} {array.dtype}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _short(value: Any) -> str:
    text = "missing" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
