"""What tensorstore says after a failure that is no news."""

import functools
import sys
from typing import Any


@functools.cache  # once
def hush_what_is_under_way() -> None:
    """Silences tensorstore's other reads or writes after a failure, which report to an event loop that is gone."""
    show = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            show(unraisable)

    sys.unraisablehook = hook
