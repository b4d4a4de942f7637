"""The engines that are open. They are closed before the process ends, because their threads would run into its end."""

import atexit
import weakref
from typing import Any

engines: "weakref.WeakSet[Any]" = weakref.WeakSet()


@atexit.register
def close() -> None:
    """Close all engines."""
    for engine in list(engines):
        engine.close()
