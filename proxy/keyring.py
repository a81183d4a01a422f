"""Who is calling: a team key is checked here, before a byte of the body is read.

What the ledger says of a key is remembered for as long as a revocation may go unnoticed; the hold asks the ledger again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from datetime import datetime

from sqlalchemy.exc import SQLAlchemyError

from proxy import headers, tokens
from proxy.errors import InvalidApiKey, LedgerUnavailable
from proxy.ledger.accounts import KeyHolder, holder_of
from proxy.ledger.engine import Database

# More keys than an organisation has; a flood of made-up ones is refused by their checksum before it gets here.
REMEMBERED_MAX = 10_000


class Keyring:
    """The keys that were seen lately, and the ledger behind them."""

    def __init__(self, database: Database, clock: Callable[[], datetime], remember_seconds: float) -> None:
        self._database = database
        self._clock = clock
        self._remember_seconds = remember_seconds
        self._known: dict[bytes, tuple[float, KeyHolder]] = {}
        self._asking: dict[bytes, asyncio.Task[KeyHolder | None]] = {}

    async def holder(self, request_headers: headers.Headers) -> KeyHolder:
        """The holder of the request's key. Raises :class:`InvalidApiKey`, or :class:`LedgerUnavailable` where the ledger
        has to be asked and can't be."""
        key = headers.bearer(request_headers)
        if key is None:
            raise InvalidApiKey
        digest = tokens.digest(key)
        known = self._known.get(digest)
        holder: KeyHolder | None
        if known is not None and known[0] > time.monotonic():
            holder = known[1]
        elif tokens.is_well_formed(key):
            holder = await self._ask(digest)
        else:
            raise InvalidApiKey
        if holder is None or not holder.valid(self._clock()):
            raise InvalidApiKey
        return holder

    async def _ask(self, digest: bytes) -> KeyHolder | None:
        # Many requests with one key ask once. The task is shielded: a caller that leaves must not spoil it for the others.
        task = self._asking.get(digest)
        if task is None:
            task = self._asking[digest] = asyncio.create_task(self._look_up(digest))
            task.add_done_callback(lambda done: self._answered(digest, done))
        try:
            return await asyncio.shield(task)
        except (SQLAlchemyError, OSError) as error:
            raise LedgerUnavailable from error

    def _answered(self, digest: bytes, task: asyncio.Task[KeyHolder | None]) -> None:
        self._asking.pop(digest, None)
        if not task.cancelled():
            # Looked at, so that an error is not reported as forgotten where all who waited for it have left.
            task.exception()

    async def _look_up(self, digest: bytes) -> KeyHolder | None:
        asked_at = time.monotonic()
        holder = await self._database.ask(lambda connection: holder_of(connection, digest))
        if holder is not None:
            if len(self._known) >= REMEMBERED_MAX:
                self._known.clear()
            self._known[digest] = (asked_at + self._remember_seconds, holder)
        return holder
