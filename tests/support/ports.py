"""Ports for servers that a test starts a while after it has chosen one."""

import socket
from contextlib import suppress
from random import SystemRandom


def free_port() -> int:
    """A port that is free, and not one of those that the kernel hands out, to jobs of other tests, in the meantime."""
    while True:
        port = SystemRandom().randrange(10_000, 30_000)  # by default, the kernel's begin at 32768
        with suppress(OSError), socket.socket() as probe:
            probe.bind(("", port))
            return port
