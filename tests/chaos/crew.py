"""The parts of a fault: gateways in processes that may be killed, the simulated BeansAI behind them with its bill, and the
auditor who compares that with the books."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import httpx2
import psycopg
from sqlalchemy import Connection

from proxy.ledger import accounts
from proxy.ledger.engine import Database
from proxy.ledger.migrate import migrate
from proxy.ledger.reports import list_charges
from proxy.simulator import Simulator, SimulatorOptions, running_simulator
from tests.chaos.runner import Plan, run
from tests.ledger.ledgers import check
from tests.live import ORDER, PATIENCE_SECONDS, UPSTREAM_KEY, Loop, booked_charges, now, wait_for
from tests.postgres import Server

# A process is forked from one that has everything loaded already: a start takes milliseconds, and it has one thread.
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["tests.chaos.runner", "pytest"])

# As far as a clock is put forward to see what is overdue: past any deadline of these tests, far from any review's end.
LATER = timedelta(hours=1)

# What a living gateway has in the directory of its journal: the journal and the notes.
OWN_FILES = 2


class Crashed(Exception):
    """The gateway died before it served."""


class Process:
    """A gateway in a process of its own."""

    def __init__(self, plan: Plan) -> None:
        self.log = plan.log
        self._ours, theirs = _processes.Pipe(duplex=False)
        self._process: BaseProcess = _processes.Process(target=run, args=(plan, theirs), daemon=True)
        self._process.start()
        theirs.close()

    @property
    def base_url(self) -> str:
        """Where it listens, as soon as it does. Raises :class:`Crashed`."""
        if not self._ours.closed:
            if not self._ours.poll(PATIENCE_SECONDS):
                raise AssertionError(f"the gateway did not start:\n{self.log.read_text()}")
            try:
                self._base_url: str = self._ours.recv()
            except EOFError:
                raise Crashed(self.log.read_text()) from None
            self._ours.close()
        return self._base_url

    @property
    def alive(self) -> bool:
        return self._process.is_alive()

    def kill(self) -> None:
        self._process.kill()
        self._process.join(PATIENCE_SECONDS)

    def wait_until_killed(self) -> None:
        self._process.join(PATIENCE_SECONDS)
        assert self._process.exitcode == -signal.SIGKILL, f"{self._process.exitcode}\n{self.log.read_text()}"

    def stop(self) -> int | None:
        """End it in order; its exit status."""
        if self._process.pid is not None and self._process.is_alive():
            os.kill(self._process.pid, signal.SIGTERM)
        self._process.join(PATIENCE_SECONDS)
        return self._process.exitcode

    def close(self) -> None:
        if self._process.is_alive():
            self.kill()
        self._process.close()
        self._ours.close()


class Crew:
    """One database, one simulated BeansAI, one team ``red`` with a key, and any number of gateways."""

    def __init__(self, loop: Loop, simulator: Simulator, database_url: str, place: Path) -> None:
        self.loop = loop
        self.simulator = simulator
        self.place = place
        self.state_dir = place / "var"
        self.database_url = database_url
        self.database = Database(database_url)
        migrate(self.database)
        with self.database.writing() as connection:
            accounts.add_team(connection, "red", now=now(), actor="test")
        self.key_id, self.key = self.add_key()
        self._started: list[Process] = []

    def close(self) -> None:
        for process in self._started:
            process.close()
        self.database.close()

    def add_key(self) -> tuple[str, str]:
        """Another key of the team: its id, and the key."""
        with self.database.writing() as connection:
            key = accounts.add_key(connection, "red", now=now(), actor="test")
        return key.id, key.key

    def set_budget(self, limit_micro_usd: int, key_id: str | None = None) -> None:
        """For all time, of the team or of one of its keys."""
        with self.database.writing() as connection:
            accounts.set_budget(connection, "red", key_id, "total", limit_micro_usd, soft=False, now=now(), actor="test")

    def settings(self, **more: str) -> dict[str, str]:
        return {
            "BEANMETER_UPSTREAM_URL": self.simulator.base_url,
            "BEANMETER_UPSTREAM_KEY": UPSTREAM_KEY,
            "BEANMETER_DATABASE_URL": self.database_url,
            "BEANMETER_STATE_DIR": str(self.state_dir),
            "BEANMETER_PORT": "0",
            "BEANMETER_DRAIN_SECONDS": "5",
            "BEANMETER_UPSTREAM_TIMEOUT_SECONDS": "20",
            **{f"BEANMETER_{name.upper()}": value for name, value in more.items()},
        }

    def plan(self, **settings: str) -> Plan:
        return Plan(self.settings(**settings), self.place / f"gateway-{len(self._started)}.log")

    def start(self, plan: Plan) -> Process:
        process = Process(plan)
        self._started.append(process)
        return process

    def order(self, base_url: str, directives: str = "", *, stream: bool = False) -> int | str | None:
        """One small image: the answer's status, the code of a refusal, ``None`` where the connection broke."""
        prompt = f"a bean [[sim bytes=2000]] {directives}"
        with self.client(base_url) as client:
            try:
                answer = client.post("/images/generations", json={**ORDER, "prompt": prompt, "stream": stream})
            except httpx2.TransportError:
                return None
        return answer.json()["error"]["code"] if answer.status_code >= 400 else answer.status_code

    @contextmanager
    def orders_under_way(self, base_urls: Sequence[str], seconds: float = 2) -> Iterator[list[Future[int | str | None]]]:
        """An order to each gateway; inside the block the upstream has all of them, and answers after so many seconds."""
        arrived = len(self.simulator.requests())
        with ThreadPoolExecutor(len(base_urls)) as clients:
            answers = [clients.submit(self.order, url, f"[[sim latency={seconds}]]", stream=True) for url in base_urls]
            wait_for(lambda: len(self.simulator.requests()) == arrived + len(base_urls) or None)
            yield answers

    def client(self, base_url: str) -> httpx2.Client:
        return httpx2.Client(
            base_url=base_url, headers={"authorization": f"Bearer {self.key}"}, timeout=PATIENCE_SECONDS, trust_env=False
        )

    def charges(self) -> dict[str, dict[str, Any]]:
        """All charges, by the ids of their requests."""

        def look() -> list[dict[str, Any]]:
            with self.reading() as connection:
                return list(list_charges(connection))

        return {row["request_id"]: row for row in booked_charges(look)}

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """The books, on a new connection: the server may have been restarted since the last look."""
        database = Database(self.database_url)
        try:
            with database.reading() as connection:
                yield connection
        finally:
            database.close()

    def recover(self, state_dir: Path | None = None) -> None:
        """A new process, long after, takes over what the dead left; returns once nothing is left."""
        state_dir = state_dir or self.state_dir
        plan = self.plan(state_dir=str(state_dir))
        plan = replace(plan, clock_ahead=LATER, settled_in_seconds=0.0, sweep_seconds=0.05)
        process = self.start(plan)
        assert process.base_url
        journals = state_dir / "journal"

        def ended() -> bool | None:
            open_charges = [row for row in self.charges().values() if row["state"] in ("reserved", "forwarded")]
            return True if not open_charges and len(list(journals.iterdir())) <= OWN_FILES else None

        wait_for(ended)
        assert process.stop() == 0, process.log.read_text()
        # Who ends in order leaves nothing behind, and nobody else is left.
        assert not list(journals.iterdir())

    def audit(self) -> dict[str, dict[str, Any]]:
        """The books agree with the bill, and with themselves; all charges by the ids of their requests."""
        charges = self.charges()
        with self.reading() as connection:
            check(connection)
        compare(self.simulator.bill()["entries"], charges)
        for process in self._started:
            assert "Traceback" not in process.log.read_text(), process.log.read_text()
        return charges


def compare(bill: Iterable[dict[str, Any]], charges: dict[str, dict[str, Any]]) -> None:
    """Each entry of the bill has one charge, settled at that amount or in review; nothing is settled that is not on the
    bill; nothing is open."""
    entries = list(bill)
    billed = {entry["client_request_id"]: entry for entry in entries}
    assert len(billed) == len(entries), "no request is sent twice"
    for request_id, entry in billed.items():
        charge = charges[request_id]
        if charge["state"] == "review":
            assert charge["settled_micro_usd"] <= entry["micro_usd"], charge
        else:
            assert (charge["state"], charge["settled_micro_usd"]) == ("settled", entry["micro_usd"]), (charge, entry)
    for request_id, charge in charges.items():
        assert charge["state"] in ("settled", "released", "review"), charge
        assert charge["state"] != "settled" or request_id in billed, charge


@contextmanager
def crew(database_url: str, place: Path, options: SimulatorOptions | None = None) -> Iterator[Crew]:
    """A crew, and its end."""
    loop = Loop()
    simulating = running_simulator(options)
    simulator = loop.run(simulating.__aenter__())
    found = Crew(loop, simulator, database_url, place)
    try:
        yield found
    finally:
        found.close()
        loop.run(simulating.__aexit__(None, None, None))
        loop.close()


def fresh_database(server: Server) -> str:
    """The URL of an empty database on a server of the test's own."""
    with psycopg.connect(server.url, autocommit=True) as connection:
        connection.execute("CREATE DATABASE books")
    return server.url.removesuffix("postgres") + "books"
