"""The description of a family of decoders."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from safelm.formats.json_fields import JsonFields
from safelm.models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Family:
    """How a family's Hugging Face folders differ from those of others.

    Attributes:
      model_type: the value in config.json.
      architecture: the class of `transformers` that reads an export.
      layer_tensors: the name of every tensor inside a layer -> its part and name in `ModelConfig.block_shapes`.
      defaults: values of keys absent from config.json, where families differ.
      expected: values of config.json that our decoder supports, by key; the key may be absent.
      read: maps config.json to the fields of `ModelConfig` that families don't share; ValueError names the key.
      write: maps those fields back to keys of config.json.
    """

    model_type: str
    architecture: str
    layer_tensors: Mapping[str, tuple[str, str]]
    defaults: Mapping[str, Any]
    expected: Mapping[str, tuple[Any, ...]]
    read: Callable[[JsonFields], dict[str, Any]]
    write: Callable[[ModelConfig], dict[str, Any]]

    def holds(self, config: ModelConfig) -> bool:
        """Whether the family's layers have exactly the parameters of our blocks."""
        ours = {(part, name) for part, names in config.block_shapes.items() for name in names}
        return set(self.layer_tensors.values()) == ours
