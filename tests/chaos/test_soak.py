"""Two gateways with two workers each on one PostgreSQL, under load, while workers are killed and the server crashes."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx2
import pytest
from sqlalchemy import func, select
from sqlalchemy.exc import SQLAlchemyError

from proxy.ledger.schema import balances, budgets, charges
from tests.chaos.crew import Crew, crew, fresh_database
from tests.chaos.sizes import size
from tests.live import ORDER, PATIENCE_SECONDS, PRICE_MICRO_USD, wait_for
from tests.postgres import Server

ROOT = Path(__file__).parents[2]

CLIENTS = size(40, 200)
SOAK_SECONDS = size(6, 60)
KILL_SECONDS = 2
CRASH_SECONDS = size(3, 15)

# How much room the narrow budget gains each second: fewer images than are asked for.
WIDENING_IMAGES = 4

# After the last fault somebody is served again within this.
RECOVERY_SECONDS = 5.0

# What the upstream does, and how often.
DIRECTIVES = {
    "": 6,
    "[[sim latency=0.2]]": 6,
    "[[sim latency=0.05 preview-latency=0.05]]": 3,
    "[[sim cut=50%]]": 1,
    "[[sim deliver=0]]": 1,
    "[[sim error=400]]": 1,
    "[[sim error=500 body=html]]": 1,
    "[[sim reset=before-headers]]": 1,
    "[[sim sse-error-after=0]]": 1,
}


class Gateway:
    """``beanmeter serve --workers 2``, as an operator starts it."""

    def __init__(self, team: Crew, number: int) -> None:
        self.state_dir = team.place / f"var-{number}"
        self.log = team.place / f"serve-{number}.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "proxy.cli", "serve", "--workers", "2"],
                cwd=team.place,
                env={**os.environ, "PYTHONPATH": str(ROOT), **team.settings(state_dir=str(self.state_dir))},
                stderr=log,
            )
        self.base_url = ""

    def wait_until_ready(self) -> None:
        def listens() -> str | None:
            assert self.process.poll() is None, self.log.read_text()
            return next((line for line in self.log.read_text().splitlines() if " listens at " in line), None)

        self.base_url = wait_for(listens).split(" listens at ")[1].partition(",")[0]

    def workers(self) -> list[int]:
        """The process ids of its workers, those that have died too."""
        # A line may be half there: of a worker that was killed while it wrote, or since it is being written now.
        lines = (line for line in self.log.read_text().splitlines() if line.startswith('{"') and line.endswith("}"))
        return [json.loads(line)["pid"] for line in lines if '"event":"worker_started"' in line]

    def kill_one(self, chance: random.Random) -> None:
        """Kill one of the workers that live, if there is one."""
        workers = self.workers()[-4:]
        chance.shuffle(workers)
        for pid in workers:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
            return

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE_SECONDS)

    def close(self) -> None:
        if self.process.poll() is None:
            # Without its supervisor a worker ends itself.
            self.process.kill()
            self.process.wait()


@pytest.mark.postgres
def test_the_books_through_kills_and_crashes(breakable_postgres: Server, tmp_path: Path, chance: random.Random) -> None:
    with ExitStack() as stack:
        team = stack.enter_context(crew(fresh_database(breakable_postgres), tmp_path))
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
        faults = threading.Thread(target=break_things, args=(breakable_postgres, gateways, soak, chance))
        faults.start()
        served_again = asyncio.run(soak.run())
        faults.join()
        assert served_again == {gateway.base_url for gateway in gateways}
        assert soak.ends[200] > 0
        print(soak.ends, looks)
        assert looks["full"], "a budget that is never reached is never tried"
        assert [gateway.stop() for gateway in gateways] == [0, 0]
        for gateway in gateways:
            team.recover(gateway.state_dir)
        rows = team.audit()
        for request_id in soak.answered:
            # Whoever has the whole answer is in the books with it.
            assert rows[request_id]["state"] in ("settled", "review"), rows[request_id]
        for gateway in gateways:
            assert "Traceback" not in gateway.log.read_text(), gateway.log.read_text()


class Soak:
    """Clients that order one image after the other, from either gateway, until told to stop."""

    def __init__(self, base_urls: list[str], keys: tuple[str, str], chance: random.Random) -> None:
        self._base_urls = base_urls
        self._keys = keys
        self._seeds = [chance.random() for _ in range(CLIENTS)]
        # Set when the last fault has been.
        self.calm = threading.Event()
        self.ends: Counter[int | str] = Counter()
        # The requests whose image came whole.
        self.answered: list[str] = []

    async def run(self) -> set[str]:
        """The gateways that served somebody within the time that they have for it after the last fault."""
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=50)
        async with httpx2.AsyncClient(limits=limits, timeout=PATIENCE_SECONDS, trust_env=False) as client:
            ordering = [asyncio.create_task(self._order_on(client, seed)) for seed in self._seeds]
            await asyncio.to_thread(self.calm.wait)
            served = await asyncio.gather(*(self._served(client, url) for url in self._base_urls))
            await asyncio.gather(*ordering)
        return {url for url, found in zip(self._base_urls, served, strict=True) if found}

    async def _order_on(self, client: httpx2.AsyncClient, seed: float) -> None:
        chance = random.Random(seed)
        while not self.calm.is_set():
            (directives,) = chance.choices(list(DIRECTIVES), list(DIRECTIVES.values()))
            url, key = chance.choice(self._base_urls), chance.choice(self._keys)
            end = await self._order(client, url, key, directives, stream=chance.random() < 0.5)
            self.ends[end] += 1
            if end != 200:
                await asyncio.sleep(0.05)

    async def _served(self, client: httpx2.AsyncClient, url: str) -> bool:
        try:
            async with asyncio.timeout(RECOVERY_SECONDS):
                for _ in iter(int, None):
                    if await self._order(client, url, self._keys[0], "", stream=False) == 200:
                        return True
                    await asyncio.sleep(0.05)
        except TimeoutError:
            pass
        return False

    async def _order(self, client: httpx2.AsyncClient, url: str, key: str, directives: str, *, stream: bool) -> int | str:
        """The answer's status, or the kind of break."""
        order = {**ORDER, "prompt": f"a bean [[sim bytes=3000]] {directives}", "stream": stream}
        try:
            answer = await client.post(f"{url}/images/generations", json=order, headers={"authorization": f"Bearer {key}"})
        except httpx2.TransportError as error:
            return type(error).__name__
        if answer.status_code == 200 and b'"b64_json"' in answer.content:
            self.answered.append(answer.headers["x-beanmeter-request-id"])
        assert answer.status_code in (200, 400, 429, 500, 502, 503), answer.text
        return answer.status_code


def break_things(server: Server, gateways: list[Gateway], soak: Soak, chance: random.Random) -> None:
    """Kill a worker now and then and crash the server now and then; the last fault is a kill."""
    began = time.monotonic()
    crash_at = began + CRASH_SECONDS
    try:
        while time.monotonic() < began + SOAK_SECONDS:
            time.sleep(KILL_SECONDS)
            chance.choice(gateways).kill_one(chance)
            if time.monotonic() > crash_at:
                crash_at += CRASH_SECONDS
                server.crash()
                server.start()
                chance.choice(gateways).kill_one(chance)
    finally:
        soak.calm.set()


@contextmanager
def watching(team: Crew, narrow_id: str) -> Iterator[Counter[str]]:
    """Looks at the books for as long as the block lasts, and makes the narrow budget a little wider now and then, so that
    there is always something to race for. What the looks found."""
    looks: Counter[str] = Counter()
    faults: list[str] = []
    ended = threading.Event()

    def watch() -> None:
        limit, widen_at = 0, 0.0
        while not ended.wait(0.1):
            try:
                if time.monotonic() > widen_at:
                    widen_at = time.monotonic() + 1
                    limit += WIDENING_IMAGES * PRICE_MICRO_USD
                    team.set_budget(limit, narrow_id)
                found = look(team)
            except SQLAlchemyError:
                looks["away"] += 1
                continue
            looks["looks"] += 1
            for key_id, (most, counted, added_up) in found.items():
                looks["full"] += counted + PRICE_MICRO_USD > most
                if counted > most or counted != added_up:
                    faults.append(f"{key_id}: {counted} of {most} counted, {added_up} added up")

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield looks
    finally:
        ended.set()
        thread.join()
    assert not faults, faults[:5]


def look(team: Crew) -> dict[str | None, tuple[int, int, int]]:
    """For each budget, at one instant: its limit, what its balance says, and what its charges add up to."""
    found: dict[str | None, tuple[int, int, int]] = {}
    amount = charges.c.settled_micro_usd + charges.c.reserved_micro_usd
    with team.database.reading() as connection:
        for row in connection.execute(select(budgets, balances).join(balances)):
            scope = [] if row.key_id is None else [charges.c.key_id == row.key_id]
            added_up = connection.execute(select(func.coalesce(func.sum(amount), 0)).where(*scope)).scalar_one()
            found[row.key_id] = (row.limit_micro_usd, row.settled_micro_usd + row.held_micro_usd, int(added_up))
    return found
