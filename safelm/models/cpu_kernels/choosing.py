"""Chooses between XLA's products and the C++ kernels."""

import dataclasses
import functools
import logging

from safelm.models.cpu_kernels import building
from safelm.models.cpu_kernels.products import MOST_INPUTS

log = logging.getLogger(__name__)

PRODUCTS = ("auto", "xla", "native")
_DTYPES = ("float32", "bfloat16", "int8", "int8_weight_only")


@dataclasses.dataclass(frozen=True)
class Choice:
    """What multiplies in decoding, "xla" or "native" (the C++ kernels), and the reason in words."""

    products: str
    reason: str


def choose(asked: str, dtype: str, *, most_inputs: int, has_mesh: bool = False) -> Choice:
    """Settles one of `PRODUCTS` for weights in `dtype`; what "auto" became is logged once.

    Args:
      most_inputs: those of the widest matrix.
      has_mesh: whether weights are split over devices.

    Raises:
      ValueError: `asked` is none of them, or is "native" and that can't run here: it says why.
    """
    if asked not in PRODUCTS:
        raise ValueError(f"products={asked!r}: one of {', '.join(PRODUCTS)}")
    if asked == "xla":
        return Choice("xla", "products is xla")
    found = _refusal(dtype, most_inputs, has_mesh) or building.find()
    if isinstance(found, building.Vectors):
        choice = Choice("native", found.name)
    elif asked == "native":
        raise ValueError(f"products='native' can't run: {found}")
    else:
        choice = Choice("xla", f"not native, {found}")
    _tell(choice)
    return choice


def _refusal(dtype: str, most_inputs: int, has_mesh: bool) -> str | None:
    if has_mesh:
        return "XLA doesn't split them over a mesh"
    if dtype not in _DTYPES:
        return f"they take weights in {', '.join(_DTYPES)}, not {dtype}"
    if most_inputs > MOST_INPUTS:
        return f"the sum of {most_inputs} products of int8 may not fit into int32, that of {MOST_INPUTS} does"
    return None


@functools.cache  # once
def _tell(choice: Choice) -> None:
    log.info("products of decoding: %s (%s)", choice.products, choice.reason)
