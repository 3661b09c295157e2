"""The types of arrays and of trees of them in signatures, beside those of jaxtyping."""

from typing import Any

import numpy as np
from jaxtyping import Array

ArrayLike = Array | np.ndarray
Params = dict[str, Any]  # a model's parameters: nested by module, arrays at the leaves
# A field of a dataclass that is a tree: an array with the axes in the field's name. Not `Array`, since JAX builds the
# same trees from shapes, shardings and placeholders.
Leaf = Any
