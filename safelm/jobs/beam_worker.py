"""A worker process of the local Beam runner, started by `safelm.jobs.beam_runner` and never by hand.

It is Beam's own worker without the log lines about itself, and it ends with the process that started it.
"""

import logging
import signal

from safelm.jobs.beam_runner import import_beam
from safelm.jobs.parent import end_with_lock_holder


def main() -> None:
    """Serves the runner until there is no more work."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches this process too; the one that wants its work ends it
    end_with_lock_holder()
    import_beam()
    from apache_beam.runners.worker import sdk_worker_main

    logging.basicConfig(level=logging.WARNING, format="%(levelname).1s %(name)s: %(message)s")
    sdk_worker_main.main([])


if __name__ == "__main__":
    main()
