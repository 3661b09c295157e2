"""The types of what training passes around; leaves are arrays, or their shapes where a program is only planned."""

import jax
import numpy as np
from jaxtyping import Array, Float, PyTree, Shaped

from safelm.data.batch import Batch
from safelm.models.decoder import Params

__all__ = ["Batch", "Gradients", "OptState", "Params", "Scalar", "Shardings"]

Leaf = Array | np.ndarray | jax.ShapeDtypeStruct
Gradients = PyTree[Float[Leaf, "..."]]  # one for each parameter
OptState = PyTree[Shaped[Leaf, "..."]]  # an optimizer's, of optax
Shardings = PyTree[jax.sharding.NamedSharding | jax.sharding.PartitionSpec]
Scalar = Float[Array | np.ndarray | np.generic, ""]
