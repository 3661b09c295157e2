"""Reads a GGUF file's fields and tensors, checking every length against the file's size first.

The package `gguf` trusts what a file claims. Here a length past the end of the file, or an array of 10^18 elements, is
refused before any memory is allocated for it.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np

MAGIC = b"GGUF"
_MOST_ELEMENTS = 8_000_000  # of all arrays of fields together: a vocabulary of a million has three
_LARGEST_SIZE = 2**31 - 1
_READ_ERRORS = (ValueError, IndexError, KeyError, TypeError, OverflowError, RecursionError, AttributeError)


class GGUFFile:
    """An open file.

    Attributes:
      path: named in errors.
      tensors: the tensors by their names in the file.
    """

    def __init__(self, path: str | Path):
        """Opens a file. Raises ValueError if it is cut short or contradicts itself."""
        self.path = str(path)
        try:
            reader = _BoundedReader(self.path)
        except _READ_ERRORS as error:
            raise ValueError(f"{self.path}: not a readable GGUF file ({error})") from error
        self._fields = reader.fields
        self.tensors: dict[str, Any] = {tensor.name: tensor for tensor in reader.tensors}
        claimed = sum(int(tensor.n_bytes) for tensor in reader.tensors)
        if claimed > len(reader.data):
            raise ValueError(f"{self.path}: its tensors claim {claimed} bytes, the file has {len(reader.data)}")

    def has(self, key: str) -> bool:
        """Whether the file has a field."""
        return key in self._fields

    def keys(self) -> list[str]:
        """The names of all fields, in the file's order."""
        return list(self._fields)

    def value(self, key: str) -> Any:
        """A field's value: a number, bool, string or list of them. Raises ValueError if it is missing or unreadable."""
        if key not in self._fields:
            raise ValueError(f"{self.path}: field {key} is missing")
        try:
            return self._fields[key].contents()
        except _READ_ERRORS as error:
            raise ValueError(f"{self.path}: field {key} can't be read ({error})") from error

    def integer(self, key: str, default: int | None = None, *, least: int = 1, most: int = _LARGEST_SIZE) -> int:
        """An integer field from `least` to `most`, or `default` if it is missing.

        Raises ValueError for another value.
        """
        if default is not None and not self.has(key):
            return default
        value = self.value(key)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise ValueError(f"{self.path}: {key} = {_shown(value)}: want an integer from {least} to {most}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number above 0, or `default` if the field is missing. Raises ValueError for another value."""
        if default is not None and not self.has(key):
            return default
        value = self.value(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ValueError(f"{self.path}: {key} = {_shown(value)}: want a finite number above 0")
        return float(value)

    def string(self, key: str) -> str:
        """A string field. Raises ValueError if it is missing or of another type."""
        value = self.value(key)
        if not isinstance(value, str):
            raise ValueError(f"{self.path}: {key} = {_shown(value)}: want a string")
        return value

    def array(self, key: str, kind: type) -> list[Any]:
        """An array of strings or integers. Raises ValueError if it is missing or holds another type."""
        value = self.value(key)
        if not isinstance(value, list) or any(type(each) is not kind for each in value):
            raise ValueError(f"{self.path}: {key}: want an array of {'strings' if kind is str else 'integers'}")
        return value

    def scalars(self) -> dict[str, Any]:
        """All fields that aren't arrays."""
        return {key: self.value(key) for key, field in self._fields.items() if field.types[:1] != [_ARRAY]}


_ARRAY = gguf.GGUFValueType.ARRAY


class _BoundedReader(gguf.GGUFReader):
    """A `GGUFReader` that refuses lengths past the file's end and arrays larger than any model's fields."""

    def __init__(self, path: str):
        self._elements = 0
        super().__init__(path)

    def _get(self, offset: Any, dtype: Any, count: Any = 1, override_order: Any = None) -> Any:
        offset, count = int(offset), int(count)
        if not 0 <= offset <= offset + count * np.dtype(dtype).itemsize <= len(self.data):
            raise ValueError(f"{count} values at byte {offset} go past the end of its {len(self.data)} bytes")
        return super()._get(offset, dtype, count, override_order)

    def _get_field_parts(self, orig_offs: int, raw_type: Any) -> Any:
        if raw_type == _ARRAY:
            self._elements += int(self._get(orig_offs + 4, np.uint64)[0])
            if self._elements > _MOST_ELEMENTS:
                raise ValueError(f"its arrays claim more than {_MOST_ELEMENTS} elements")
        return super()._get_field_parts(orig_offs, raw_type)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def dequantized(file: GGUFFile, name: str) -> Any:
    """A tensor in float32. Raises ValueError for an unknown quantisation type."""
    tensor = file.tensors[name]
    try:
        return gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
    except (NotImplementedError, ValueError, TypeError) as error:
        raise ValueError(f"{file.path}: tensor {name} can't be read as {tensor.tensor_type.name} ({error})") from error


def shape_of(file: GGUFFile, name: str) -> Sequence[int]:
    """A tensor's shape in numpy's order of axes."""
    return tuple(int(size) for size in reversed(file.tensors[name].shape.tolist()))
