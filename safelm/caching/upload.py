"""Makes a token store here and keeps it in a bucket (`safelm.cache_tasks --output=gs://...`).

Shards are written to a local folder, `$SAFELM_CACHE/staging/<hash of the output>`, and uploaded one by one: the arrays,
then the shard's JSON; the manifest comes last. Uploaded files are removed here, so the disk holds only unfinished
shards. The bucket's content decides what is left to do, so a stopped run continues on any machine. A lease keeps a
second machine out (`safelm.io.lease`), taken where there is something to write: a whole store is checked without. A
shard is a function of its input file and the settings, whoever writes it.
"""

import os
from collections.abc import Mapping

from safelm.data.shard import ShardInfo, shard_file
from safelm.data.store import MANIFEST_NAME
from safelm.io import remote

SETTINGS_NAME = "settings.json"


class NotHeldError(Exception):
    """Something is to be written in the bucket, without the folder's lease."""


class Bucket:
    """A store's folder in a bucket (`url`) and the local folder that its files come from (`directory`)."""

    def __init__(self, url: str, directory: str, *, is_held: bool = True):
        """Downloads settings, manifest and shard records of an earlier run. Raises OSError naming the URL.

        `is_held`: whether this process holds the folder's lease; without it what writes raises NotHeldError.
        """
        self.url, self.directory, self.is_held = url, directory, is_held
        sizes = remote.list_sizes(url)
        if sizes is None:
            raise PermissionError(f"{url}: listing is refused, and without it finished shards can't be found")
        self.sizes: Mapping[str, int] = sizes
        self._pull([name for name in sizes if name.endswith(".json")])

    def _pull(self, names: list[str]) -> None:
        os.makedirs(self.directory, exist_ok=True)
        manifest = os.path.join(self.directory, MANIFEST_NAME)
        if os.path.exists(manifest):
            os.remove(manifest)  # of a store that may be gone from the bucket
        wanted = [(f"{self.url}/{name}", 0, self.sizes[name]) for name in names]
        for name, data in zip(names, remote.read_ranges(wanted) if wanted else [], strict=True):
            with open(os.path.join(self.directory, name), "wb") as file:
                file.write(data)

    def holds(self, info: ShardInfo, num_shards: int) -> bool:
        """Whether the bucket has the shard that this record describes."""
        arrays, marker = _shard_files(info, num_shards)
        return marker in self.sizes and all(self.sizes.get(name) == size for name, size in arrays.items())

    def push_shard(self, info: ShardInfo, num_shards: int) -> None:
        """Uploads a shard unless the bucket has it, its record last, and removes the local arrays."""
        arrays, marker = _shard_files(info, num_shards)
        if not self.holds(info, num_shards):
            for name in (*arrays, marker):
                self.push(name)
        for name in arrays:
            path = os.path.join(self.directory, name)
            if os.path.exists(path):
                os.remove(path)

    def check_held(self) -> None:
        """Raises NotHeldError where nothing may be written."""
        if not self.is_held:
            raise NotHeldError(self.url)

    def push(self, name: str) -> None:
        """Uploads one file of the local folder."""
        self.check_held()
        path = os.path.join(self.directory, name)
        remote.upload(path, f"{self.url}/{name}")
        self.sizes = {**self.sizes, name: os.path.getsize(path)}

    def drop(self, name: str) -> None:
        """Removes a file from the bucket."""
        if name in self.sizes:
            self.check_held()
            remote.remove(f"{self.url}/{name}")
            self.sizes = {other: size for other, size in self.sizes.items() if other != name}


def push_new_shard(url: str, directory: str, info: ShardInfo, num_shards: int) -> None:
    """Uploads a new shard, its record last, and removes the local arrays; for workers without a `Bucket`."""
    arrays, marker = _shard_files(info, num_shards)
    for name in (*arrays, marker):
        remote.upload(os.path.join(directory, name), f"{url}/{name}")
    for name in arrays:
        os.remove(os.path.join(directory, name))


def _shard_files(info: ShardInfo, num_shards: int) -> tuple[dict[str, int], str]:
    """Name and size of a shard's arrays, and its record's name."""
    arrays = {shard_file(kind, info.index, num_shards): file.bytes for kind, file in info.files.items()}
    return arrays, shard_file("shard", info.index, num_shards)


def push_folder(folder: str, url: str) -> None:
    """Uploads every file below a local folder, if the folder exists."""
    for parent, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(parent, name)
            remote.upload(path, f"{url}/{os.path.relpath(path, folder)}")
