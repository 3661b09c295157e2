"""The one type of a batch, from the loader to the training step and its loss."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float32, Int32, Num

from safelm.data.channels import LOSS_WEIGHT, Channel

Numbers = np.ndarray | jax.Array | jax.ShapeDtypeStruct  # of the loader, on devices, or planned


class Batch(NamedTuple):
    """Rows of a batch: B rows, T positions. `safelm.data.rows` says how they are cut from documents.

    Attributes:
      inputs_BT: the token before each target; before a document's first the id with which the model's texts begin.
      targets_BT: the tokens to predict; 0 where loss weight and unlikelihood are 0, and at padding.
      positions_BT: of each input in its piece of a document.
      segment_ids_BT: number of the piece within the row, from 1; 0 is padding.
      loss_weight_BT: how much each target counts in the loss; 0 at padding.
      source_ids_B: number of the source that each row is from.
      channels: the stores' other channels by name: the number of each target, or of its document; 0 at padding.
    """

    inputs_BT: Int32[Numbers, "B T"]
    targets_BT: Int32[Numbers, "B T"]
    positions_BT: Int32[Numbers, "B T"]
    segment_ids_BT: Int32[Numbers, "B T"]
    loss_weight_BT: Float32[Numbers, "B T"]
    source_ids_B: Int32[Numbers, " B"]
    channels: Mapping[str, Num[Numbers, "B T"]]


def abstract_batch(
    batch_size: int, seq_len: int, channels: Sequence[Channel] = (), *, sharding: jax.sharding.Sharding | None = None
) -> Batch:
    """The shapes, dtypes and shardings of a batch from stores with these channels."""
    dtypes = {channel.name: channel.batch_dtype for channel in (LOSS_WEIGHT, *channels)}
    numbers = {
        name: jax.ShapeDtypeStruct((batch_size, seq_len), dtype, sharding=sharding) for name, dtype in dtypes.items()
    }
    loss_weight_BT = numbers.pop(LOSS_WEIGHT.name)
    ids_BT = jax.ShapeDtypeStruct((batch_size, seq_len), np.int32, sharding=sharding)
    ids_B = jax.ShapeDtypeStruct((batch_size,), np.int32, sharding=sharding)
    return Batch(ids_BT, ids_BT, ids_BT, ids_BT, loss_weight_BT, ids_B, numbers)
