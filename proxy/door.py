"""The operator's door: who may come in with the admin token, and how often somebody may try. Pure; the clock is an argument."""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass

# A person mistypes a token once or twice; a program that guesses needs more tries than this.
FAILURES_MAX = 5
WINDOW_SECONDS = 60.0

# A flood from many addresses must not fill the memory. Beyond this, addresses that failed longest ago are forgotten.
ADDRESSES_MAX = 10_000


class Closed(Exception):
    """There is no admin token, so nobody comes in."""


class Wrong(Exception):
    """No token, or not the one."""


@dataclass(frozen=True, slots=True)
class Throttled(Exception):
    """Too many failures from this address; the token was not even looked at."""

    retry_after_seconds: int


class Door:
    """Opened by ``token``; ``None`` keeps it closed."""

    def __init__(self, token: str | None) -> None:
        self._digest = None if token is None else _digest(token)
        self._seal: bytes | None = None
        # Address -> when it failed lately, in seconds of a monotonic clock; the address that failed last comes last.
        self._failures: dict[str, list[float]] = {}

    @property
    def opens(self) -> bool:
        """Whether anybody can come in at all."""
        return self._digest is not None

    def enter(self, token: str | None, address: str, now: float) -> None:
        """Let somebody in. Raises :class:`Closed`, :class:`Throttled` or :class:`Wrong`."""
        if self._digest is None:
            raise Closed
        failures = [at for at in self._failures.get(address, ()) if at > now - WINDOW_SECONDS]
        if len(failures) >= FAILURES_MAX:
            raise Throttled(max(1, round(failures[0] + WINDOW_SECONDS - now)))
        # Digests of one length, compared in constant time: neither the token's length nor its beginning can be timed.
        if token is not None and hmac.compare_digest(_digest(token), self._digest):
            self._failures.pop(address, None)
            return
        self._failures.pop(address, None)
        self._failures[address] = [*failures, now]
        if len(self._failures) > ADDRESSES_MAX:
            del self._failures[next(iter(self._failures))]
        raise Wrong

    def seal(self, text: str) -> bytes:
        """32 bytes that only a door with the same token makes of ``text``. Raises :class:`Closed`."""
        if self._digest is None:
            raise Closed
        if self._seal is None:
            # What is sealed goes out to people, and tells whoever has it whether a guess of the token is right: guessing has to
            # cost something.
            self._seal = hashlib.scrypt(self._digest, salt=b"beanmeter", n=2**14, r=8, p=1)
        return hmac.digest(self._seal, text.encode("utf-8"), "sha256")


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()
