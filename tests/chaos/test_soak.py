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
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx2
import psycopg
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
SOAK_SECONDS = size(9, 60)
KILL_SECONDS = size(1.5, 2.0)
CRASH_SECONDS = size(4, 15)

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
        lines = (json.loads(line) for line in self.log.read_text().splitlines() if line.startswith('{"'))
        return [line["pid"] for line in lines if line["event"] == "worker_started"]

    def kill_one(self, chance: random.Random) -> bool:
        """Kill one of the workers that live; whether there was one."""
        workers = self.workers()[-4:]
        chance.shuffle(workers)
        for pid in workers:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
            return True
        return False

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
