"""Ports for programs that can't be told to take any free one."""

from __future__ import annotations

import random
import socket

# Below the ports that Linux and macOS give to those who name none. The suite's other processes open connections all the
# time, and between a look and the program's start one of these would be given a port from there.
_FIRST, _LAST = 12_000, 30_000

_random = random.SystemRandom()


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on. Nothing holds it: whoever asks starts its program at once."""
    while True:
        port = _random.randint(_FIRST, _LAST)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
