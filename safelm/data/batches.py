"""The contents of a batch, as a pure function of seed, step, row and mixture schedule."""

from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jaxtyping import Int

from safelm.data.assembly import Assembly
from safelm.data.batch import Batch
from safelm.data.channels import Channel
from safelm.data.order import EpochOrders
from safelm.data.packing import make_rows
from safelm.data.schedule import MixtureSchedule
from safelm.data.store import TokenStore


class Batches:
    """The batches of a run, any part of any step at random.

    A source's rows are handed out epoch after epoch, each epoch in its own random order that holds every row once; a
    run may end, and phases may change, within an epoch. The order of one source does not depend on the others.
    """

    def __init__(
        self,
        stores: Mapping[str, TokenStore],
        schedule: MixtureSchedule,
        *,
        packing: str = "concat",
        channels: Sequence[Channel] = (),
        begin_id: int | None = None,
    ):
        """ValueError when a source of the schedule has no store, or stores differ in vocabulary or a channel.

        `channels`: what batches have beside the stores' own; `begin_id` as in `Assembly`.
        """
        if missing := [name for name in schedule.sources if name not in stores]:
            raise ValueError(f"mixture schedule names unknown sources {missing}, there are stores for {sorted(stores)}")
        self.schedule, self.sources = schedule, schedule.sources
        plans = []
        first = stores[self.sources[0]]
        for name in self.sources:
            store = stores[name]
            if store.manifest.vocab_hash != first.manifest.vocab_hash:
                raise ValueError(
                    f"token stores of different vocabularies: {first.directory} has {first.manifest.vocab_hash}, "
                    f"{store.directory} has {store.manifest.vocab_hash}"
                )
            plans.append(make_rows(store, schedule.seq_len, packing))
        self._assembly = Assembly(plans, channels, begin_id)
        self._orders = EpochOrders(self.sources, [plan.num_rows for plan in plans])

    def rows_per_epoch(self) -> dict[str, int]:
        """Rows of `seq_len` in one epoch of each source."""
        return {name: plan.num_rows for name, plan in zip(self.sources, self._assembly.plans, strict=True)}

    def epochs(self, step: int) -> dict[str, float]:
        """How many times each source has been gone through before `step`."""
        given = self.schedule.cumulative(step)
        return {name: given[name] / rows for name, rows in self.rows_per_epoch().items()}

    def locate(
        self, seed: int, step: int, start: int, stop: int
    ) -> tuple[Int[np.ndarray, " b"], Int[np.ndarray, " b"]]:
        """Source (index into `sources`) and row of that source's store for rows [start, stop) of the global batch."""
        if not 0 <= start <= stop <= self.schedule.batch_size:
            raise IndexError(f"rows [{start}, {stop}) of a batch of {self.schedule.batch_size}")
        source_ids_B, stream_B = (values[start:stop] for values in self.schedule.layout(step))
        return source_ids_B, self._orders.rows(seed, source_ids_B, stream_B)

    def batch(self, seed: int, step: int, start: int, stop: int) -> Batch:
        """Rows [start, stop) of the global batch of `step`; `source_ids_B` is the index into `sources`."""
        return self._assembly.batch(*self.locate(seed, step, start, stop), stop - start)

    def sample(self, seed: int, step: int, row: int) -> Batch:
        """One row of the global batch of `step`: as `batch`, without the leading axis."""
        return jax.tree.map(lambda array: array[0], self.batch(seed, step, row, row + 1))
