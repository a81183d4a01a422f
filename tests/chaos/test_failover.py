"""The primary PostgreSQL server is lost with its machine, and its standby takes its place: with synchronous replication
the books agree with the bill, without it they lack what the standby had not seen, and that can be found."""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psycopg
import pytest

from proxy.ledger.decisions import Admitted
from proxy.ledger.teller import Step, Teller
from tests.chaos.crew import crew, fresh_database
from tests.chaos.sizes import size
from tests.chaos.test_soak import Gateway, Soak, watching
from tests.ledger.ledgers import Ledger, reservation
from tests.live import PRICE_MICRO_USD, now, wait_for
from tests.markdown import ROOT, blocks_of
from tests.postgres import Server, Standby

FAILOVERS = size(1, 5)

# Long enough for every client to have had an answer before, and for several refusals in between.
LOAD_SECONDS = 1.5
AWAY_SECONDS_MAX = 1.5

# Small, and both at once: what is seen by the standby, what is not, and what is under way.
ORDERS = 4

# Where a reader's shell finds the program.
PROGRAMS = Path(sys.executable).parent


class Pair:
    """A primary and its standby at two addresses that stay, whichever of them is which."""

    def __init__(self, primary: Server, stack: ExitStack) -> None:
        self._stack = stack
        self.primary = primary
        self.standby = stack.enter_context(following(primary))

    def url(self, name: str) -> str:
        """Of a database on whichever server takes writes."""
        hosts = "&".join(f"host=127.0.0.1:{server.port}" for server in (self.primary, self.standby))
        return f"postgresql://postgres@/{name}?{hosts}&target_session_attrs=read-write"

    def fail_over(self) -> None:
        """The standby becomes the primary, which was killed before."""
        self.standby.promote()
        self.primary, self._lost = self.standby, self.primary

    def rebuild(self) -> None:
        """A new standby at the address of the server that was lost."""
        self.standby = self._stack.enter_context(following(self.primary, self._lost.port))
        self.standby.keep_in_step()


@contextmanager
def following(primary: Server, port: int | None = None) -> Iterator[Standby]:
    home = Path(tempfile.mkdtemp(prefix="beanmeter-standby-"))
    try:
        with Standby(primary, home, port) as standby:
            yield standby
    finally:
        shutil.rmtree(home, ignore_errors=True)


@pytest.mark.postgres
def test_the_books_through_failovers(breakable_postgres: Server, tmp_path: Path, chance: random.Random) -> None:
    with ExitStack() as stack:
        pair = Pair(breakable_postgres, stack)
        pair.standby.keep_in_step()
        fresh_database(pair.primary)
        team = stack.enter_context(crew(pair.url("books"), tmp_path))
        team.set_budget(10**12)
        narrow_id, narrow_key = team.add_key()
        team.set_budget(0, narrow_id)
        gateways = [Gateway(team, number) for number in range(2)]
        for gateway in gateways:
            stack.callback(gateway.close)
        for gateway in gateways:
            gateway.wait_until_ready()
        looks = stack.enter_context(watching(team, narrow_id))
        soak = Soak([gateway.base_url for gateway in gateways], (team.key, narrow_key), chance)
        faults = threading.Thread(target=lose_primaries, args=(pair, gateways, soak, chance))
        faults.start()
        served_again = asyncio.run(soak.run())
        faults.join()
        assert served_again == {gateway.base_url for gateway in gateways}
        print(soak.ends, looks)
        assert soak.ends[200] > 0
        assert soak.ends[503] > 0, "nobody ordered while there was no primary"
        assert looks["full"], "a budget that is never reached is never tried"
        assert [gateway.stop() for gateway in gateways] == [0, 0]
        for gateway in gateways:
            team.recover(gateway.state_dir)
        rows = team.audit()
        for request_id in soak.answered:
            # Whoever has the whole answer is in the books with it.
            assert rows[request_id]["state"] in ("settled", "review"), rows[request_id]
        for gateway in gateways:
            log = gateway.log.read_text()
            assert "Traceback" not in log, log
            assert "charge_unknown" not in log, log


def lose_primaries(pair: Pair, gateways: list[Gateway], soak: Soak, chance: random.Random) -> None:
    """Kill the primary in the middle of the load, a worker too, and let the standby take over; and so on."""
    try:
        for turn in range(FAILOVERS):
            if turn:
                pair.rebuild()
            time.sleep(LOAD_SECONDS)
            # What is committed from here on reaches nobody but the primary: so nobody may be told that it is.
            pair.standby.fall_behind()
            time.sleep(0.5)
            pair.primary.kill()
            time.sleep(chance.uniform(0, AWAY_SECONDS_MAX))
            # With what it could not book in its journal, and what it had open in nobody's.
            chance.choice(gateways).kill_one(chance)
            pair.fail_over()
            time.sleep(LOAD_SECONDS)
    finally:
        soak.calm.set()


@pytest.mark.postgres
def test_what_a_standby_has_not_seen_is_missing_and_can_be_found(breakable_postgres: Server, tmp_path: Path) -> None:
    """Replication that nobody waits for, and a line to the standby that is cut a while before the primary is lost."""
    with ExitStack() as stack:
        pair = Pair(breakable_postgres, stack)
        fresh_database(pair.primary)
        team = stack.enter_context(crew(pair.url("books"), tmp_path))
        team.set_budget(2 * ORDERS * PRICE_MICRO_USD)
        gateway = Gateway(team, 0)
        stack.callback(gateway.close)
        gateway.wait_until_ready()
        for _ in range(ORDERS - 1):
            assert team.order(gateway.base_url) == 200
        with team.orders_under_way([gateway.base_url], 5) as half_seen:
            wait_for(lambda: states_on(pair.standby) == ["forwarded"] + ["settled"] * (ORDERS - 1) or None)
            pair.standby.fall_behind()
            assert [order.result() for order in half_seen] == [200]
        for _ in range(ORDERS - 2):
            assert team.order(gateway.base_url) == 200
        assert team.order(gateway.base_url, "[[sim reset=before-headers bill=yes]]") == "upstream_failed"
        with team.orders_under_way([gateway.base_url], 5) as under_way:
            pair.primary.kill()
            pair.fail_over()
            # Holds that nobody remembers leave their room to others: this much of the budget is spent twice.
            assert [team.order(gateway.base_url) for _ in range(ORDERS)] == [200] * ORDERS
            assert [order.result() for order in under_way] == [200]
        wait_for(lambda: "charge_unknown" in gateway.log.read_text() or None)
        assert gateway.stop() == 0
        team.recover(gateway.state_dir)

        charges = team.charges()
        # What the standby saw the hold of, and not the end, comes up for review.
        assert sorted(row["state"] for row in charges.values()) == ["review"] + ["settled"] * (2 * ORDERS - 1)
        billed = {entry["client_request_id"]: entry["micro_usd"] for entry in team.simulator.bill()["entries"]}
        assert len(billed) == 3 * ORDERS, "a budget for two thirds of these"
        missing = billed.keys() - charges.keys()
        assert len(missing) == ORDERS
        in_books = sum(row["settled_micro_usd"] + row["reserved_micro_usd"] for row in charges.values())
        assert sum(billed.values()) - in_books == ORDERS * PRICE_MICRO_USD

        # As the documents say: whatever was logged with money and has no charge is missing, and nothing else is.
        with gateway.log.open("a") as log:
            log.write('{"timestamp": "2026-11-22T12:00:00Z", "event": "excha')
        found = [line.split() for line in as_documented(team.database_url, gateway.log)]
        assert sorted(request_id for request_id, *_ in found) == sorted(missing)
        settled, review = ["red", "settled", str(PRICE_MICRO_USD), "0"], ["red", "review", "0", str(PRICE_MICRO_USD)]
        assert sorted(rest for _, *rest in found) == [review] + [settled] * (ORDERS - 1)
        # And the log says of the one that was under way that it has no charge.
        lines = [json.loads(line) for line in gateway.log.read_text().splitlines() if line.endswith("}")]
        (unknown,) = (line for line in lines if line["event"] == "charge_unknown")
        assert (unknown["level"], unknown["state"], unknown["settled_micro_usd"]) == ("critical", "settled", PRICE_MICRO_USD)


def as_documented(database_url: str, log: Path) -> list[str]:
    """What the commands of the document print, where this log is the only gateway's."""
    (block,) = [block for block in blocks_of(ROOT / "docs" / "scaling.md") if block.language == "sh"]
    place = Path(tempfile.mkdtemp(dir=log.parent))
    shutil.copy(log, place / "gateway-0.log")
    environment = {**os.environ, "BEANMETER_DATABASE_URL": database_url, "PATH": f"{PROGRAMS}:{os.environ['PATH']}"}
    ran = subprocess.run(
        ["/bin/sh", "-euc", block.code], cwd=place, env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.splitlines()


def states_on(server: Server) -> list[str]:
    """The states of the charges that a standby has seen."""
    with psycopg.connect(server.url.removesuffix("postgres") + "books") as connection:
        return [row[0] for row in connection.execute("SELECT state FROM charges ORDER BY state")]


@pytest.mark.postgres
def test_several_dead_connections_refuse_nobody(breakable_postgres: Server) -> None:
    """Whoever comes first after a failover is served, however many idle connections it has cut."""

    class Nobody:
        def committed(self, step: Step, seconds: float) -> None:
            pass

        def failed(self, step: Step) -> None:
            raise AssertionError(f"to {step} failed")

    async def reserve() -> None:
        ledger = Ledger(fresh_database(breakable_postgres))
        account = ledger.account()
        with ledger.database.writing(), ledger.database.writing() as second:
            second.exec_driver_sql("SELECT 1")
        teller = Teller(ledger.database, now, Nobody())
        teller.start()
        breakable_postgres.crash()
        breakable_postgres.start()
        assert isinstance(await teller.reserve(reservation(account)), Admitted)
        await teller.close(10)
        ledger.close()

    asyncio.run(reserve())
