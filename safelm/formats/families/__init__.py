"""The families of decoders in the Hugging Face layout, one module each, whose `FAMILY` describes its particulars.

New arithmetic of a family is an option of `ModelConfig` in `safelm.models.block`.
"""

import importlib
import pkgutil

from safelm.formats.family import PLAIN, Family
from safelm.models.config import ModelConfig

_MODULES = [importlib.import_module(f"{__name__}.{each.name}") for each in pkgutil.iter_modules(__path__)]
FAMILIES: dict[str, Family] = {module.FAMILY.model_type: module.FAMILY for module in _MODULES}


def family_named(model_type: object, *, where: str) -> Family:
    """The family of a config's `model_type`. Raises ValueError naming `where` it stands and the known families."""
    if model_type is None:
        raise ValueError(f"{where}: model_type is missing: not the config of a model")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        known = " or ".join(map(repr, FAMILIES))
        raise ValueError(f"{where}: model_type = {model_type!r} is not supported; it must be {known}")
    return FAMILIES[model_type]


def family_of(config: ModelConfig) -> Family:
    """The family whose folders can hold this model; ValueError for options that none has together."""
    held = [family for family in FAMILIES.values() if family.holds(config)]
    if not held:
        options = {name: getattr(config, name) for name, plain in PLAIN.items() if getattr(config, name) != plain}
        raise ValueError(f"no family of {', '.join(FAMILIES)} has the model's options together: {options}")
    return held[0]
