"""The description of a family of decoders."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from safelm.formats.json_fields import JsonFields
from safelm.models.config import FAMILY_OPTIONS, ModelConfig

# Those fields' values in a plain decoder.
PLAIN = {field.name: field.default for field in dataclasses.fields(ModelConfig) if field.name in FAMILY_OPTIONS}


@dataclasses.dataclass(frozen=True)
class Family:
    """How a family's Hugging Face folders differ from those of others.

    Attributes:
      model_type: the value in config.json.
      architecture: the class of `transformers` that reads an export.
      layer_tensors: the name of every tensor inside a layer -> its part and name in `ModelConfig.block_shapes`.
      defaults: values of keys absent from config.json, where families differ.
      expected: values of config.json that our decoder supports, by key; the key may be absent.
      options: values of `PLAIN`'s fields that all its models share, where they differ from a plain decoder's.
      free: fields of `PLAIN` in which its models differ from each other.
      read: maps config.json to the fields of `ModelConfig` that families don't share; ValueError names the key.
      write: maps those fields back to keys of config.json.
    """

    model_type: str
    architecture: str
    layer_tensors: Mapping[str, tuple[str, str]]
    defaults: Mapping[str, Any]
    expected: Mapping[str, tuple[Any, ...]]
    options: Mapping[str, Any]
    free: Sequence[str]
    read: Callable[[JsonFields], dict[str, Any]]
    write: Callable[[ModelConfig], dict[str, Any]]

    def holds(self, config: ModelConfig) -> bool:
        """Whether a model of ours can be one of the family: all its options are the family's or free."""
        wanted = {name: value for name, value in (PLAIN | dict(self.options)).items() if name not in self.free}
        return all(getattr(config, name) == value for name, value in wanted.items())
