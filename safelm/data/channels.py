"""Named channels of a token store: numbers beside its tokens, one for every token or one for every document.

A channel is declared once, as a `Channel`, and given to `ShardWriter`. Every shard keeps the declaration, and packing,
loader and batch take it from there. In a batch a number stands where its token is the target, a document's number at
each of its tokens; padding is 0.

A shard keeps a channel in the smallest of these forms, by how many different values it has there:

    1 value          no file: the value is in the shard's record and in the manifest
    2 values         uint8, eight numbers a byte, the first in the lowest bit: a number's place in `values`
    up to 256        uint8: a number's place in `values`
    more             the numbers in the channel's dtype
"""

import dataclasses
import functools
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int, Num, Shaped

from safelm.data import arrays

Number = float | int

DTYPES = ("float32", "int8", "uint8", "int16", "uint16", "int32")  # what a batch's float32 and int32 hold exactly
_RESERVED = ("tokens", "bounds", "sums", "shard", "manifest", "settings")
_MAX_CODED = 256
_COMPARED = 4
_REWRITTEN_AT_ONCE = 1 << 20  # numbers; a multiple of 8


@runtime_checkable
class Sliced(Protocol):
    """A file of numbers that gives parts of itself."""

    def __getitem__(self, wanted: slice) -> Num[np.ndarray, " n"]: ...


class BadNumberError(ValueError):
    """A channel has a number that its declaration doesn't allow."""


@dataclasses.dataclass(frozen=True)
class Channel:
    """The declaration of a channel.

    Attributes:
      name: a lower-case identifier, also the first part of its files' names.
      dtype: one of `DTYPES`.
      per: whether every token or every document has a number.
      default: of a document written without the channel, and of a store that lacks it.
      minimum: the smallest number allowed; None: any finite one.
    """

    name: str
    dtype: str
    per: Literal["token", "document"]
    default: Number
    minimum: Number | None = None

    def __post_init__(self):
        if not self.name.isidentifier() or self.name != self.name.lower() or self.name in _RESERVED:
            raise ValueError(f"channel name {self.name!r}: must be a lower-case identifier, not of {_RESERVED}")
        if self.dtype not in DTYPES or self.per not in ("token", "document"):
            raise ValueError(
                f"channel {self.name}: dtype {self.dtype!r} per {self.per!r}: must be one of {', '.join(DTYPES)} per "
                "token or document"
            )
        if self.name == "loss_weight" and self.dtype != "float32":
            raise ValueError(f"channel loss_weight: dtype {self.dtype!r}: must be float32")
        self.parse([self.default])

    @property
    def batch_dtype(self) -> np.dtype:
        """Its dtype in a batch: float32 or int32."""
        return np.dtype(np.float32 if self.dtype == "float32" else np.int32)

    def parse(self, numbers: Sequence[Number] | Shaped[np.ndarray, "..."]) -> Num[np.ndarray, " n"]:
        """The numbers in the channel's dtype; BadNumberError names the first that is not allowed and its place."""
        given = np.asarray(numbers)
        if given.ndim != 1 or given.dtype.kind not in "biuf":
            raise BadNumberError(f"{self.name} must be numbers, got shape {given.shape} of {given.dtype}")
        with np.errstate(invalid="ignore", over="ignore"):
            parsed = given.astype(self.dtype)
            allowed = np.isfinite(parsed) if self.dtype == "float32" else parsed == given
            if self.minimum is not None:
                allowed &= parsed >= self.minimum
        if not allowed.all():
            at = int(np.argmin(allowed))
            least = "" if self.minimum is None else f" of at least {self.minimum:g}"
            kind = "finite number" if self.dtype == "float32" else self.dtype
            raise BadNumberError(f"{self.name}[{at}] is {given[at]}, must be a {kind}{least}")
        return parsed


LOSS_WEIGHT = Channel("loss_weight", "float32", "token", 1.0, minimum=0.0)  # of a token as a target; 0: not learned
# Of a store of windows (`safelm.data.windows`), where they are padded: tokens before the padding; 0: all of them.
REAL_TOKENS = Channel("real_tokens", "int32", "document", 0, minimum=0)
# Of a token as a target: the weight of -log(1 - p), beside its loss weight, which is 0 for a token to be unlearned.
UNLIKELIHOOD = Channel("unlikelihood", "float32", "token", 0.0, minimum=0.0)
# Of a token as a target: its place in `safelm.data.token_kinds.KINDS`; 0: text, or what target and weight say.
KIND = Channel("kind", "uint8", "token", 0, minimum=0)
CHANNELS = (LOSS_WEIGHT,)  # of every store
# What `safelm.cache_tasks` keeps of a SeqIO task's examples by the features' names, where they have them.
TASK_CHANNELS = (*CHANNELS, UNLIKELIHOOD, KIND)


@dataclasses.dataclass(frozen=True)
class StoredChannel(Channel):
    """A channel as a shard keeps it: `values` has what its codes stand for, None where the numbers themselves are."""

    values: tuple[Number, ...] | None = None

    @property
    def declaration(self) -> Channel:
        """Without what belongs to the shard."""
        return Channel(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Channel)})

    @property
    def constant(self) -> Number | None:
        """The value of every number, or None where they differ."""
        return self.values[0] if self.values and len(self.values) == 1 else None

    def file_shape(self, count: int) -> tuple[np.dtype, int]:
        """Dtype and length of the file that holds this many numbers; no length where there is no file."""
        if self.values is None:
            return np.dtype(self.dtype), count
        return np.dtype(np.uint8), {1: 0, 2: -(-count // 8)}.get(len(self.values), count)

    def read(self, file: Sliced | None, start: int, stop: int) -> Num[np.ndarray, " n"]:
        """Numbers [start, stop) from a shard's file, or anything that is sliced like it."""
        if self.values is None:
            return file[start:stop]
        if len(self.values) == 1:
            return np.full(stop - start, self.values[0], self.dtype)
        if len(self.values) > 2:
            return self._decode(file[start:stop])
        first = start // 8
        codes = np.unpackbits(file[first : -(-stop // 8)], bitorder="little")
        return self._table[codes[start - 8 * first : stop - 8 * first]]

    def take(self, file: np.ndarray | None, index_n: Int[np.ndarray, " n"]) -> Num[np.ndarray, " n"]:
        """Single numbers from a shard's file."""
        if self.values is None:
            return file[index_n]
        if len(self.values) == 1:
            return np.full(len(index_n), self.values[0], self.dtype)
        if len(self.values) > 2:
            return self._decode(file[index_n])
        return self._table[file[index_n // 8] >> (index_n % 8).astype(np.uint8) & 1]

    def _decode(self, codes: np.ndarray) -> np.ndarray:
        if len(codes) and (highest := int(codes.max())) >= len(self.values):
            raise BadNumberError(f"{self.name} has code {highest} and {len(self.values)} values")
        return self._table[codes]

    @functools.cached_property
    def _table(self) -> np.ndarray:
        return np.asarray(self.values, self.dtype)


def merge(declared: Iterable[tuple[str, Sequence[Channel]]]) -> tuple[Channel, ...]:
    """The channels of several stores together, the loss weight first; ValueError names two that disagree."""
    found: dict[str, tuple[str, Channel]] = {}
    for where, channels in declared:
        for channel in channels:
            first, other = found.setdefault(channel.name, (where, channel))
            if other != channel:
                raise ValueError(f"channel {channel.name}: {first} has {other}, {where} has {channel}")
    others = [channel for _, (_, channel) in sorted(found.items()) if channel.name != LOSS_WEIGHT.name]
    return (found.get(LOSS_WEIGHT.name, ("", LOSS_WEIGHT))[1], *others)


class ChannelWriter:
    """Streams a channel's numbers into the smallest form that holds them; a form too small is written anew."""

    def __init__(self, channel: Channel, path: str):
        """`path` is that of the file to be; everything has a temporary name until the caller renames it."""
        self._channel, self._path = channel, path
        self._places: dict[Number, int] | None = {}  # of the values so far; None: too many
        self._count, self._file, self._header_bytes = 0, None, 0
        self._last_bits = np.empty(0, np.uint8)  # what doesn't fill a byte yet

    @property
    def temporary_path(self) -> str:
        """The file's name until the shard is whole."""
        return f"{self._path}.tmp"

    def add(self, numbers: Num[np.ndarray, " n"], stops: Int[np.ndarray, " documents"] | None = None) -> None:
        """Appends numbers that `Channel.parse` has passed.

        `stops`: where documents end that are added together, which gives the same bytes as one by one.
        """
        if self._places is not None:
            unknown = numbers
            for value in [*self._places][:_COMPARED]:  # faster than sorting
                unknown = unknown[unknown != value]
            new = [value for value in np.unique(unknown).tolist() if value not in self._places]
            if new and stops is not None and len(new) <= _MAX_CODED:
                new.sort(key=lambda value: (np.searchsorted(stops, np.argmax(numbers == value), side="right"), value))
            if new:
                self._extend(new)
        self._write(numbers)
        self._count += len(numbers)

    def close(self) -> StoredChannel:
        """Completes the temporary file, if there is one."""
        stored = self._stored()
        if self._file is not None:
            self._write_last_bits()
            dtype, length = stored.file_shape(self._count)
            arrays.finish(self._file, dtype, length)
        return stored

    def abort(self) -> None:
        """Closes and removes the temporary files; safe to call twice."""
        if self._file is not None:
            self._file.close()
        for path in (self.temporary_path, self._former_path):
            if os.path.exists(path):
                os.remove(path)

    @property
    def _former_path(self) -> str:
        return f"{self._path}.former.tmp"

    def _stored(self) -> StoredChannel:
        values = None if self._places is None else tuple(self._places) or (self._channel.default,)
        return StoredChannel(**dataclasses.asdict(self._channel), values=values)

    def _extend(self, new: Sequence[Number]) -> None:
        """Takes up new values, and goes over to a larger form where they need one."""
        former = self._stored()
        places = dict(self._places)
        for value in new:
            places[value] = len(places)
        self._places = places if len(places) <= _MAX_CODED else None
        now = self._stored()
        if now.file_shape(8) != former.file_shape(8):
            self._rewrite(former, now)

    def _rewrite(self, former: StoredChannel, now: StoredChannel) -> None:
        former_file = self._file
        if former_file is not None:
            self._write_last_bits()
            former_file.flush()
            os.rename(self.temporary_path, self._former_path)
        former_header, self._file = self._header_bytes, open(self.temporary_path, "wb")
        arrays.write_header(self._file, now.file_shape(0)[0], 0)
        self._header_bytes = self._file.tell()
        for numbers in _numbers(former, self._former_path, former_header, self._count):
            self._write(numbers)
        if former_file is not None:
            former_file.close()
            os.remove(self._former_path)

    def _write(self, numbers: np.ndarray) -> None:
        if self._file is None:
            return
        if self._places is None:
            self._file.write(numbers.tobytes())
            return
        codes = self._codes(numbers)
        if len(self._places) > 2:
            self._file.write(codes.tobytes())
            return
        bits = np.concatenate([self._last_bits, codes])
        whole = len(bits) // 8 * 8
        self._file.write(np.packbits(bits[:whole], bitorder="little").tobytes())
        self._last_bits = bits[whole:]

    def _codes(self, numbers: np.ndarray) -> np.ndarray:
        values = np.asarray(list(self._places), self._channel.dtype)
        order = np.argsort(values)
        return order[np.searchsorted(values, numbers, sorter=order)].astype(np.uint8)

    def _write_last_bits(self) -> None:
        self._file.write(np.packbits(self._last_bits, bitorder="little").tobytes())
        self._last_bits = np.empty(0, np.uint8)


def _numbers(stored: StoredChannel, path: str, header_bytes: int, count: int) -> Iterator[np.ndarray]:
    """The numbers of a shard's file that is still being written, a part at a time."""
    dtype, length = stored.file_shape(count)
    file = np.memmap(path, dtype, "r", header_bytes, (length,)) if length else None
    for start in range(0, count, _REWRITTEN_AT_ONCE):
        yield stored.read(file, start, min(start + _REWRITTEN_AT_ONCE, count))
