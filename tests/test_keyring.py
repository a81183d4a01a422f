"""Who is calling: which keys pass, for how long that is remembered, and how often the ledger is asked."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta

import pytest
from sqlalchemy import event

from proxy.errors import InvalidApiKey, LedgerUnavailable
from proxy.headers import Headers
from proxy.keyring import Keyring
from proxy.ledger import accounts
from proxy.ledger.engine import Database
from proxy.tokens import new_key
from tests.ledger.ledgers import NOON, Account, Ledger
from tests.outage import database_away

LONG = 3_600.0


@dataclass
class Door:
    """A keyring, the time that it goes by, and the look-ups that it has made in the ledger."""

    ledger: Ledger
    remember_seconds: float
    now: datetime = NOON
    looked_up: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.database = Database(self.ledger.url)
        self.keyring = Keyring(self.database, lambda: self.now, self.remember_seconds)
        # The keyring reads and never writes.
        event.listen(self.database._reader, "before_cursor_execute", self._see)

    def _see(self, _connection: object, _cursor: object, statement: str, *_: object) -> None:
        if "FROM keys" in statement:
            self.looked_up.append(statement)

    async def knock(self, key: str) -> str:
        """The id of the key that passes, or the refusal's code."""
        try:
            return (await self.keyring.holder(bearer(key))).key_id
        except (InvalidApiKey, LedgerUnavailable) as refusal:
            return refusal.code


def bearer(key: str) -> Headers:
    return [(b"authorization", b"Bearer " + key.encode())]


@pytest.fixture
def ledger(database_url: str) -> Iterator[Ledger]:
    found = Ledger(database_url)
    yield found
    found.close()


@pytest.fixture
def account(ledger: Ledger) -> Account:
    return ledger.account()


def at_door(ledger: Ledger, scenario: Callable[[Door], Awaitable[None]], remember_seconds: float = LONG) -> Door:
    """Play a scenario at a new door."""
    door = Door(ledger, remember_seconds)

    async def play() -> None:
        await scenario(door)

    try:
        asyncio.run(play())
    finally:
        door.database.close()
    return door


def test_what_is_no_key_never_reaches_the_database(ledger: Ledger, account: Account) -> None:
    key = account.key
    right = f"Bearer {key}".encode()
    slip = key[:-1] + ("a" if key[-1] != "a" else "b")
    requests: list[Headers] = [
        [],
        [(b"authorization", b"")],
        [(b"authorization", b"Bearer")],
        [(b"authorization", b"Bearer ")],
        [(b"authorization", key.encode())],
        [(b"authorization", f"Basic {key}".encode())],
        [(b"authorization", right), (b"authorization", right)],
        [(b"authorization", right + b"\xff")],
        [(b"authorization", right + b", " + right)],
        [(b"x-api-key", key.encode())],
        *(bearer(wrong) for wrong in (slip, key.upper(), key[:-1], key + "a", "sk-" + "a" * 48, "a" * 100_000)),
    ]

    async def scenario(door: Door) -> None:
        for headers in requests:
            with pytest.raises(InvalidApiKey):
                await door.keyring.holder(headers)
        assert door.looked_up == []
        for headers in ([(b"authorization", right)], [(b"authorization", b"bearer   " + key.encode() + b" ")]):
            assert (await door.keyring.holder(headers)).key_id == account.key_id

    assert len(at_door(ledger, scenario).looked_up) == 1


def test_a_key_of_nobody_is_asked_for_each_time(ledger: Ledger, account: Account) -> None:
    async def scenario(door: Door) -> None:
        key = new_key()
        assert [await door.knock(key) for _ in range(3)] == ["invalid_api_key"] * 3

    # It is not remembered: a key may be added at any moment.
    assert len(at_door(ledger, scenario).looked_up) == 3


@pytest.mark.parametrize(("remember_seconds", "look_ups"), [(LONG, 1), (0.0, 3)])
def test_what_is_known_is_remembered_for_as_long_as_it_may_be(
    ledger: Ledger, account: Account, remember_seconds: float, look_ups: int
) -> None:
    async def scenario(door: Door) -> None:
        assert [await door.knock(account.key) for _ in range(3)] == [account.key_id] * 3

    assert len(at_door(ledger, scenario, remember_seconds).looked_up) == look_ups


def test_two_keys_are_two_look_ups(ledger: Ledger, account: Account) -> None:
    other = ledger.another_key()

    async def scenario(door: Door) -> None:
        knocks = [door.knock(key) for key in (account.key, other.key) * 20]
        assert await asyncio.gather(*knocks) == [account.key_id, other.key_id] * 20

    assert len(at_door(ledger, scenario).looked_up) == 2


@pytest.mark.parametrize("end", ["revoke", "archive"])
@pytest.mark.parametrize(("remember_seconds", "noticed"), [(0.0, True), (LONG, False)])
def test_a_key_that_was_ended_is_noticed_once_it_is_forgotten(
    ledger: Ledger, account: Account, end: str, remember_seconds: float, noticed: bool
) -> None:
    async def scenario(door: Door) -> None:
        assert await door.knock(account.key) == account.key_id
        with ledger.database.writing() as connection:
            if end == "revoke":
                accounts.revoke_key(connection, account.key_id, now=NOON, actor="test")
            else:
                accounts.archive_team(connection, "red", now=NOON, actor="test")
        assert await door.knock(account.key) == ("invalid_api_key" if noticed else account.key_id)

    at_door(ledger, scenario, remember_seconds)


def test_a_remembered_key_expires_at_its_instant(ledger: Ledger) -> None:
    account = ledger.account(lifetime=timedelta(hours=1))

    async def scenario(door: Door) -> None:
        for late, answer in ((-1, account.key_id), (0, "invalid_api_key"), (1, "invalid_api_key")):
            door.now = NOON + timedelta(hours=1, microseconds=late)
            assert await door.knock(account.key) == answer

    assert len(at_door(ledger, scenario).looked_up) == 1


def test_many_first_requests_ask_once(ledger: Ledger, account: Account) -> None:
    async def scenario(door: Door) -> None:
        assert await asyncio.gather(*(door.knock(account.key) for _ in range(200))) == [account.key_id] * 200

    assert len(at_door(ledger, scenario).looked_up) == 1


def test_a_caller_that_leaves_spoils_it_for_nobody(ledger: Ledger, account: Account) -> None:
    async def scenario(door: Door) -> None:
        knocks = [asyncio.create_task(door.knock(account.key)) for _ in range(3)]
        await asyncio.sleep(0)
        # The first is the one that asked.
        knocks[0].cancel()
        assert await asyncio.gather(*knocks[1:]) == [account.key_id] * 2
        assert knocks[0].cancelled()

    assert len(at_door(ledger, scenario).looked_up) == 1


def test_without_the_database_only_what_is_remembered_passes(ledger: Ledger, account: Account) -> None:
    remembered = account
    new = ledger.another_key()

    async def scenario(door: Door) -> None:
        assert await door.knock(remembered.key) == remembered.key_id
        # Nobody else's connection, and none of ours that is open already.
        ledger.close()
        door.database.close()
        with database_away(ledger.url):
            assert await asyncio.gather(*(door.knock(new.key) for _ in range(3))) == ["ledger_unavailable"] * 3
            assert await door.knock(remembered.key) == remembered.key_id
            assert await door.knock("sk-bm-mistyped") == "invalid_api_key"
        assert await door.knock(new.key) == new.key_id

    at_door(ledger, scenario)
