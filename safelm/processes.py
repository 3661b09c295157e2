"""Several processes of one run: their start, their agreement, their barriers, and how they leave together.

Every process runs the same program on its own devices; what one decides alone (to stop, to fail) would leave the others
waiting in a collective. With one process everything here is free and does nothing.

Leaving at the same step (SIGTERM on one worker of several): make one `AnyProcess` before the loop, call it once a step
with this process's own flag, and save and leave in the step whose call returns True. It does so in all of them.
Install handlers of SIGTERM after the start: `jax.distributed.initialize` installs its own, which a later one replaces.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


class AnyProcess:
    """Tells all processes, at the same call, that at least one of them has raised its flag.

    Call it equally often in every process, always from the thread that runs the steps: each call starts a reduction of
    one number over all devices behind the work already under way, and returns the result of the call before. So it
    waits for nothing the loop has not waited for, and answers one call late (with one process: at once).
    """

    def __init__(self):
        self._alone = jax.process_count() == 1
        self._pending: jax.Array | None = None
        if not self._alone:
            mesh = Mesh(np.array(jax.devices()), ("devices",))
            self._sharding = NamedSharding(mesh, PartitionSpec("devices"))
            self._max = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def __call__(self, flag: bool) -> bool:
        """True if any process passed True to the call before this one; the same answer in every process."""
        if self._alone:
            return bool(flag)
        flags = np.full(jax.local_device_count(), flag, np.int32)
        raised = self._pending is not None and bool(self._pending)
        self._pending = self._max(jax.make_array_from_process_local_data(self._sharding, flags))
        return raised
