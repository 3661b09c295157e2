"""What a family of decoders is."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from safelm.formats.json_fields import JsonFields
from safelm.models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Family:
    """What tells a family's Hugging Face folders from another's.

    Attributes:
      model_type: that of config.json.
      architecture: the class of `transformers` that reads an export.
      layer_tensors: the name of every tensor inside a layer -> its part and name in `ModelConfig.block_shapes`.
      defaults: what absent keys of config.json stand for, where that is not so in all families.
      expected: values of config.json that our decoder can represent, by key; an absent key is fine.
      read: config.json -> fields of `ModelConfig` beyond those that all families share; ValueError names the key.
      write: the same back, as keys of config.json.
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
