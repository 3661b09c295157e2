"""Batches for one host through Grain, read ahead in threads or worker processes; the only state is the step."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import grain
import numpy as np
from absl import flags

from safelm.data.assembly import Assembly
from safelm.data.batch import Batch
from safelm.data.batches import Batches
from safelm.data.channels import Channel
from safelm.data.packing import make_rows
from safelm.data.schedule import MixtureSchedule
from safelm.data.store import TokenStore


@dataclasses.dataclass(frozen=True)
class _HostSteps:
    """Random access for Grain: element i is this host's share of the batch of step `first_step + i`."""

    batches: Batches
    seed: int
    first_step: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.batches.schedule.total_steps - self.first_step

    def __getitem__(self, index: int) -> Batch:
        return self.batches.batch(self.seed, self.first_step + int(index), self.start, self.stop)


class Loader:
    """Iterator over this host's rows of every step until the schedule's last; its whole state is the next step.

    Threads and worker processes only read ahead: content and order are those of `batches`. Worker processes are
    spawned, so a script that uses them needs the usual `if __name__ == "__main__"`.
    """

    def __init__(
        self,
        batches: Batches,
        *,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
        start_step: int = 0,
        num_workers: int = 0,
        num_threads: int = 2,
    ):
        """ValueError when the batch does not divide by `process_count` or `start_step` is outside the schedule."""
        self.batches, self._seed = batches, seed
        self._start, self._stop = host_rows(batches.schedule.batch_size, process_index, process_count)
        if num_workers < 0 or num_threads < 1:
            raise ValueError(f"num_workers must be >= 0 and num_threads >= 1, got {num_workers} and {num_threads}")
        self._num_workers, self._num_threads = num_workers, num_threads
        self._iterator: Iterator[Batch] | None = None
        self.set_state(start_step)

    @property
    def sources(self) -> tuple[str, ...]:
        """Source names by the index in `source_ids_B`."""
        return self.batches.sources

    def set_state(self, step: int) -> None:
        """Goes to a step, forwards or back."""
        if not 0 <= step <= self.batches.schedule.total_steps:
            raise ValueError(f"step {step} is outside the schedule's 0..{self.batches.schedule.total_steps}")
        self.close()
        self._step = int(step)

    def tokens_given(self) -> dict[str, int]:
        """Tokens of the budget each source has had before the next batch."""
        return self.batches.schedule.tokens_given(self._step)

    def close(self) -> None:
        """Stops reading ahead; the next batch starts it again."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Batch:
        if self._step >= self.batches.schedule.total_steps:
            raise StopIteration
        if self._iterator is None:
            self._iterator = self._open()
        batch = next(self._iterator)
        self._step += 1
        return batch

    def _open(self) -> Iterator[Batch]:
        self.batches.schedule.cumulative(self._step)  # counted once here, not in every thread and worker
        steps = _HostSteps(self.batches, self._seed, self._step, self._start, self._stop)
        options = grain.ReadOptions(num_threads=self._num_threads, prefetch_buffer_size=2 * self._num_threads)
        dataset = grain.MapDataset.source(steps).to_iter_dataset(options)
        if self._num_workers:
            if not flags.FLAGS.is_parsed():  # Grain reads its flags when it starts workers
                flags.FLAGS.mark_as_parsed()
            dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=self._num_workers))
        return iter(dataset)


def make_loader(
    stores: Mapping[str, TokenStore],
    schedule: MixtureSchedule,
    *,
    seed: int,
    batch_size: int,
    seq_len: int,
    process_index: int = 0,
    process_count: int = 1,
    packing: str = "concat",
    start_step: int = 0,
    num_workers: int = 0,
    channels: Sequence[Channel] = (),
    begin_id: int | None = None,
) -> Loader:
    """This host's batches from `start_step` on, of batch_size / process_count rows.

    `batch_size` (rows) and `seq_len` (tokens) are the global batch's and must be the schedule's; `channels` and
    `begin_id` as in `Batches`.
    """
    if (batch_size, seq_len) != (schedule.batch_size, schedule.seq_len):
        raise ValueError(
            f"batch_size={batch_size}, seq_len={seq_len} are not the schedule's "
            f"batch_size={schedule.batch_size}, seq_len={schedule.seq_len}"
        )
    return Loader(
        Batches(stores, schedule, packing=packing, channels=channels, begin_id=begin_id),
        seed=seed,
        process_index=process_index,
        process_count=process_count,
        start_step=start_step,
        num_workers=num_workers,
    )


def eval_batches(
    store: TokenStore,
    *,
    batch_size: int,
    seq_len: int,
    max_batches: int | None = None,
    packing: str = "concat",
    process_index: int = 0,
    process_count: int = 1,
    channels: Sequence[Channel] = (),
    begin_id: int | None = None,
) -> Iterator[Batch]:
    """This host's share of one pass over a store, every document once, the same each time; as `make_loader`'s batches.

    The last batch is filled up with padding rows. With fewer batches than the pass needs (`max_batches`), the rows
    are taken at even distances over the whole store.
    """
    start, stop = host_rows(batch_size, process_index, process_count)
    plan = make_rows(store, seq_len, packing)
    num_batches = -(-plan.num_rows // batch_size)
    if max_batches is not None:
        if max_batches < 1:
            raise ValueError(f"max_batches must be at least 1, got {max_batches}")
        num_batches = min(num_batches, max_batches)
    num_rows = min(plan.num_rows, num_batches * batch_size)
    rows = np.arange(num_rows) * plan.num_rows // num_rows
    shares = [rows[at : at + batch_size][start:stop] for at in range(0, num_rows, batch_size)]
    assembly = Assembly([plan], channels, begin_id)
    return (assembly.batch(np.zeros(len(share), np.int32), share, stop - start) for share in shares)


def host_rows(batch_size: int, process_index: int, process_count: int) -> tuple[int, int]:
    """The host's rows [start, stop) of the global batch; ValueError when it does not divide."""
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index must be in 0..{process_count - 1}, got {process_index}")
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(f"batch_size {batch_size} does not divide by process_count {process_count}")
    share = batch_size // process_count
    return process_index * share, (process_index + 1) * share
