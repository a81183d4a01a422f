"""Every way in which an exchange can end, through a live gateway: what is booked, what counts, what the client sees."""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

import httpx2
import pytest
from live import (
    JSON,
    ORDER,
    PATIENCE_SECONDS,
    SSE,
    UPSTREAM_KEY,
    Conversation,
    LiveGateway,
    Script,
    ScriptedUpstream,
    chunked,
    completed,
    event,
    json_answer,
    live_gateway,
    now,
    replay,
    until_closed,
    wait_for,
    whole,
)

from proxy.app import running
from proxy.ledger import reports
from proxy.prices import shipped_card
from proxy.settings import load

PRICES = shipped_card().models["gpt-image-2"].micro_usd
HIGH = PRICES["1024x1024", "high"]
LOW = PRICES["1024x1024", "low"]
LARGE = PRICES["3840x2160", "high"]
DEAREST = max(PRICES.values())

AUTO = {"size": "auto", "quality": "auto"}

# No case comes near it.
BUDGET_MICRO_USD = 100_000_000

_numbers = count(1)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LiveGateway, ScriptedUpstream]]:
    """One gateway for the whole table: each row has a team of its own."""
    directory = tmp_path_factory.mktemp("stage")
    with live_gateway(f"sqlite:///{directory / 'beanmeter.db'}", directory) as parts:
        yield parts


@dataclass(frozen=True)
class Team:
    """A team of one test's own, with room in its budget for everything."""

    gateway: LiveGateway
    name: str
    key: str

    def budget(self) -> tuple[int, int]:
        """What is (settled, held) against it."""
        with self.gateway.database.reading() as connection:
            (status,) = reports.list_budgets(connection, now(), team=self.name)
        return status.settled_micro_usd, status.held_micro_usd

    def charges(self) -> list[dict[str, Any]]:
        with self.gateway.database.reading() as connection:
            return list(reports.list_charges(connection, team=self.name))

    def charge(self) -> dict[str, Any]:
        """The team's one charge, once it has ended."""

        def ended() -> dict[str, Any] | None:
            found = self.charges()
            assert len(found) <= 1, found
            return found[0] if found and found[0]["state"] != "forwarded" else None

        return wait_for(ended)

    def spend(self) -> dict[str, Any]:
        with self.gateway.database.reading() as connection:
            rows = reports.spend(connection, ["team"])
        return next(row for row in rows if row["team"] == self.name)


def new_team(gateway: LiveGateway) -> Team:
    name = f"team-{next(_numbers)}"
    _, key = gateway.add_team(name)
    gateway.set_budget(BUDGET_MICRO_USD, team=name)
    return Team(gateway, name, key)


@dataclass(frozen=True)
class View:
    """What the client had of an answer: all of it, or what came before the transfer broke."""

    status: int
    headers: httpx2.Headers
    body: bytes
    broken: bool

    @property
    def code(self) -> Any:
        return json.loads(self.body)["error"]["code"]


def ask(team: Team, order: dict[str, Any], path: str = "/images/generations") -> View:
    headers = {"authorization": f"Bearer {team.key}"}
    with team.gateway.client.stream("POST", path, json=order, headers=headers) as response:
        body, broken = b"", False
        try:
            for piece in response.iter_raw():
                body += piece
        except httpx2.TransportError:
            broken = True
        return View(response.status_code, response.headers, body, broken)


# How an answer is framed, and how its connection ends


@dataclass(frozen=True)
class Play:
    """Bytes on the wire, and what becomes of the connection after them: ``keep``, ``close`` or ``reset``."""

    wire: bytes
    end: str = "keep"

    async def __call__(self, conversation: Conversation) -> None:
        await conversation.write(self.wire)
        if self.end == "close":
            await conversation.close()
        elif self.end == "reset":
            # A reset overtakes what the other side has not read yet, so it has to have it first.
            await _taken(conversation)
            await conversation.reset()


async def _taken(conversation: Conversation) -> None:
    import fcntl
    import termios

    sock = conversation._writer.get_extra_info("socket")
    while struct.unpack("i", fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4)))[0]:
        await asyncio.sleep(0.001)
