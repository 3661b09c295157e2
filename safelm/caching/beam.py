"""Makes the shards of a token cache on Apache Beam.

The shards have the same bytes. With an output on gs:// the worker uploads its shard. With a local output all workers
must see that folder under the same path; on flink and spark this takes a shared file system.
"""

import dataclasses
import os
import secrets
from collections.abc import Sequence

from safelm.caching.plan import StorePlan
from safelm.caching.shards import CacheJob, TaskModule, write_shard
from safelm.caching.upload import Bucket, push_folder, push_new_shard
from safelm.data.shard import read_shard_info
from safelm.io import remote
from safelm.io.cache import staging_folder
from safelm.io.progress import Bar
from safelm.jobs import beam_runner
from safelm.jobs.output import OutputFolder

_loaded: set[str] = set()


@dataclasses.dataclass(frozen=True)
class CacheWork:
    """The work of making shards (`safelm.jobs.beam_jobs.Work`); `token` identifies the process that planned it."""

    module: TaskModule
    output: str
    token: str

    def load(self) -> None:
        """Registers the tasks in this process."""
        if self.token not in _loaded:
            _loaded.add(self.token)
            self.module.load()

    def run(self, job: CacheJob, loaded: None) -> None:
        """Makes one shard and, for an output on gs://, uploads it."""
        folder = f"{job.source_name}/{job.split}"
        staging = staging_folder(self.output)
        job = dataclasses.replace(job, directory=os.path.join(staging, folder))
        info = write_shard(job)
        if remote.is_remote(self.output):
            push_new_shard(f"{self.output}/{folder}", job.directory, info, job.num_shards)
            push_folder(os.path.join(staging, "quarantine", folder), f"{self.output}/quarantine/{folder}")

    def failed(self, job: CacheJob, message: str) -> None:
        """Stores the message where the calling process finds it."""
        name = f"{job.source_name}-{job.split}-{job.index:05d}"
        OutputFolder(self.output).record_failure(name, message)


def write_on_beam(plans: Sequence[StorePlan], module: TaskModule, output: str, runner: beam_runner.Runner) -> None:
    """Makes all missing shards and adds them to the plans. Raises ValueError or OSError with one clear line."""
    work, out = CacheWork(module, output, secrets.token_hex()), OutputFolder(output)
    _loaded.add(work.token)  # this process has planned with them
    out.clear_failures()
    jobs = [job for plan in plans for job in plan.jobs]
    with Bar(total=len(jobs), unit="shard", desc="caching", disable=None) as bar:
        beam_runner.run_jobs(jobs, work, runner, lambda: None if bar.disable else bar.update(_done(jobs) - bar.n))
    out.raise_failures()
    for plan in plans:
        if plan.bucket:
            plan.bucket = Bucket(plan.bucket.url, plan.directory)
        for job in plan.jobs:
            arguments = (plan.directory, job.index, job.num_shards)
            info = read_shard_info(*arguments, fingerprint=job.fingerprint, elsewhere=plan.elsewhere)
            if info is None:
                raise OSError(f"{job.directory}: shard {job.index} is missing although its job ended: run again")
            plan.done[job.index] = info


def _done(jobs: Sequence[CacheJob]) -> int:
    names = {directory: set(os.listdir(directory)) for directory in {job.directory for job in jobs}}
    return sum(f"shard-{job.index:05d}-of-{job.num_shards:05d}.json" in names[job.directory] for job in jobs)
