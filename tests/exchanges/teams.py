"""Teams of one test each, what their clients see of an answer, and what the books say of them."""

from __future__ import annotations

import json
import socket
import struct
from dataclasses import dataclass
from itertools import count
from typing import Any

import httpx2

from proxy.ledger import reports
from proxy.prices import shipped_card
from tests.live import ORDER, LiveGateway, now, wait_for

PRICES = shipped_card().models["gpt-image-2"].micro_usd
HIGH = PRICES["1024x1024", "high"]
LOW = PRICES["1024x1024", "low"]
LARGE = PRICES["3840x2160", "high"]
DEAREST = max(PRICES.values())

# No case comes near it.
BUDGET_MICRO_USD = 100_000_000
_numbers = count(1)


@dataclass(frozen=True)
class Team:
    """A team of one test's own, with room in its budget for everything."""

    gateway: LiveGateway
    name: str
    key: str

    def budget(self) -> tuple[int, int]:
        """What is (settled, held) against it."""
        self.gateway.settle()
        with self.gateway.database.reading() as connection:
            (status,) = reports.list_budgets(connection, now(), team=self.name)
        return status.settled_micro_usd, status.held_micro_usd

    def charges(self) -> list[dict[str, Any]]:
        self.gateway.settle()
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
        self.gateway.settle()
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


def asked(**fields: Any) -> dict[str, Any]:
    return ORDER | fields


def streamed(**fields: Any) -> dict[str, Any]:
    return ORDER | {"stream": True} | fields


def request_bytes(team: Team, order: dict[str, Any]) -> bytes:
    body = json.dumps(order).encode()
    head = (
        "POST /v1/images/generations HTTP/1.1\r\nHost: gateway\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer {team.key}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def leave(client: socket.socket, manner: str) -> None:
    if manner == "reset":
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


def booked(charge: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(charge[name] for name in ("state", "settled_micro_usd", "reserved_micro_usd", "images_delivered", "basis"))


def assert_that_it_counts(team: Team, charge: dict[str, Any]) -> None:
    """One charge is the team's whole account: in its budget and in its spend."""
    amounts = charge["settled_micro_usd"], charge["reserved_micro_usd"]
    assert team.budget() == amounts
    assert team.spend() == {
        "team": team.name,
        "requests": 1,
        "images": charge["images_delivered"],
        "settled_micro_usd": amounts[0],
        "reserved_micro_usd": amounts[1],
    }


def settled(images: int, micro_usd: int | None = None, basis: str = "requested") -> tuple[str, int, int, int, str]:
    return "settled", images * HIGH if micro_usd is None else micro_usd, 0, images, basis


def review(held_micro_usd: int, images: int = 0, known_micro_usd: int = 0) -> tuple[str, int, int, int, str | None]:
    return "review", known_micro_usd, held_micro_usd, images, "requested" if images else None


RELEASED = ("released", 0, 0, 0, None)
