"""The helper of ``test/utils/common.py``."""

import threading
from collections.abc import Callable


def in_thread(target: Callable[..., object], args: tuple[object, ...] = (), daemon: bool = True) -> threading.Thread:
    """Start a thread."""
    thread = threading.Thread(target=target, args=args, daemon=daemon)
    thread.start()
    return thread
