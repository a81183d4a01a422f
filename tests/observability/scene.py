"""Two gateways on one ledger with everything that their metrics can tell: images and edits of two teams, reviews, charges above
their hold, refusals, and a database that is away for a while. The simulator is their upstream."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2

from proxy.ledger import accounts, reports
from proxy.ledger.engine import Database
from proxy.ledger.migrate import migrate
from proxy.money import MICRO_PER_USD
from proxy.periods import PERIODS
from proxy.simulator import SimulatorOptions, running_simulator
from proxy.spool import MEMORY_BYTES_MAX
from tests.live import PATIENCE_SECONDS, UPSTREAM_KEY, Loop, booked_charges, now, wait_for
from tests.outage import database_away
from tests.test_supervisor import Served

GENERATIONS, EDITS = "/images/generations", "/images/edits"
PIXEL = "data:image/png;base64,iVBORw0KGgo="

# What is asked for over and over: by whom, where, and what is other than a small image that all goes well with. The words in
# brackets tell the simulator what to do.
ASKED: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("design", GENERATIONS, {}),
    ("design", GENERATIONS, {"size": "2048x1152", "quality": "medium", "stream": True}),
    ("design", EDITS, {"images": [{"image_url": PIXEL}]}),
    ("design", GENERATIONS, {"prompt": "[[sim error=400]]"}),
    ("design", GENERATIONS, {"prompt": "[[sim error=500]]"}),
    ("design", GENERATIONS, {"prompt": "[[sim error=401]]"}),
    ("design", GENERATIONS, {"prompt": "[[sim error=429]]"}),
    ("design", EDITS, {"prompt": "[[sim reset=before-headers]]", "images": [{"image_url": PIXEL}]}),
    ("design", GENERATIONS, {"prompt": "[[sim report-quality=high]]"}),
    ("design", GENERATIONS, {"prompt": "[[sim cost=1]]"}),
    ("design", GENERATIONS, {"size": "1x1"}),
    ("design", GENERATIONS, {"user": "x" * (MEMORY_BYTES_MAX + 1)}),
    ("press", GENERATIONS, {"quality": "high"}),
    ("nobody", GENERATIONS, {}),
)

# The press has room for one image of high quality, and has then used more than four fifths of its budget.
PRESS_USD = 0.25

# So much of the traffic goes on at a time when the database goes away.
UNDER_WAY = 4

# Between two rounds: there are two processors, and Prometheus has to keep its pace.
PAUSE_SECONDS = 0.3

# An end in any case: some minutes of rounds.
ROUNDS_MAX = 500


class Scene:
    """``ask_on`` starts the traffic, ``end`` ends it."""

    def __init__(self, place: Path, database_url: str, upstream_url: str) -> None:
        self.database_url = database_url
        self.database = Database(database_url)
        migrate(self.database)
        self._keys = {"nobody": "sk-bm-nobodys", **{team: self._add_team(team) for team in ("design", "press")}}
        for period in PERIODS:
            self._set_budget("design", period, 500)
        self._set_budget("press", "month", PRESS_USD)
        self._set_budget("design", "day", 400, self._key_id("design"))
        # A file where the larger bodies' directory should be: there is no room for them, as on a full disk.
        (place / "var").mkdir()
        (place / "var" / "spool").touch()
        environment = {
            "BEANMETER_UPSTREAM_URL": upstream_url,
            "BEANMETER_UPSTREAM_KEY": UPSTREAM_KEY,
            "BEANMETER_DATABASE_URL": database_url,
            "BEANMETER_PORT": "0",
            "BEANMETER_DRAIN_SECONDS": "5",
        }
        self.gateways = [
            Served({**environment, "BEANMETER_WORKERS": workers}, place, self._keys["design"]) for workers in ("1", "2")
        ]
        self._ending = threading.Event()
        self._traffic = threading.Thread(target=self._ask_on)

    def _add_team(self, name: str) -> str:
        with self.database.writing() as connection:
            accounts.add_team(connection, name, now=now(), actor="test")
            return accounts.add_key(connection, name, now=now(), actor="test").key

    def _key_id(self, team: str) -> str:
        with self.database.reading() as connection:
            key_id: str = next(key["id"] for key in accounts.list_keys(connection) if key["team"] == team)
        return key_id

    def _set_budget(self, team: str, period: Any, usd: float, key_id: str | None = None) -> None:
        limit = int(usd * MICRO_PER_USD)
        with self.database.writing() as connection:
            accounts.set_budget(connection, team, key_id, period, limit, soft=False, now=now(), actor="test")

    def wait_until_ready(self) -> None:
        for gateway in self.gateways:
            gateway.wait_until_ready()

    @property
    def targets(self) -> list[str]:
        return [f"127.0.0.1:{gateway.port}" for gateway in self.gateways]

    def ask_on(self) -> None:
        self._traffic.start()

    def end(self) -> None:
        """No more traffic, and what was asked for is answered and booked."""
        self._ending.set()
        if self._traffic.ident is not None:
            self._traffic.join(PATIENCE_SECONDS)
        wait_for(lambda: not any(charge["state"] == "forwarded" for charge in self.charges()) or None)

    def close(self) -> None:
        self._ending.set()
        if self._traffic.ident is not None:
            self._traffic.join(PATIENCE_SECONDS)
        for gateway in self.gateways:
            gateway.close()
        self.database.close()

    def charges(self) -> list[dict[str, Any]]:
        return booked_charges(self._charges)

    def _charges(self) -> list[dict[str, Any]]:
        """As they are at this moment: nothing is waited for."""
        with self.database.reading() as connection:
            return list(reports.list_charges(connection))

    @contextmanager
    def without_database(self) -> Iterator[None]:
        """The database goes away while images are being made; inside the block all of them have been."""
        with ThreadPoolExecutor(UNDER_WAY) as clients:
            slow = ("design", GENERATIONS, {"prompt": "[[sim latency=2]]"})
            answers = [clients.submit(self._ask, place, slow) for place in range(UNDER_WAY)]
            # Those of the other traffic come and go one at a time.
            wait_for(lambda: sum(charge["state"] == "forwarded" for charge in self._charges()) >= UNDER_WAY or None)
            with database_away(self.database_url):
                for answer in answers:
                    answer.result(PATIENCE_SECONDS)
                yield

    def _ask_on(self) -> None:
        for number in range(ROUNDS_MAX):
            for asked in ASKED:
                if self._ending.is_set():
                    return
                self._ask(number, asked)
            self._ending.wait(PAUSE_SECONDS)

    def _ask(self, number: int, asked: tuple[str, str, dict[str, Any]]) -> None:
        """One request over a connection of its own, so that any worker may have it. What comes of it, the metrics tell."""
        team, path, changes = asked
        order = {"model": "gpt-image-2", "size": "1024x1024", "quality": "low", "prompt": "", **changes}
        order["prompt"] += " [[sim bytes=2000]]"
        url = self.gateways[number % len(self.gateways)].base_url + path
        headers = {"authorization": f"Bearer {self._keys[team]}"}
        try:
            httpx2.post(url, json=order, headers=headers, timeout=PATIENCE_SECONDS, trust_env=False)
        except httpx2.TransportError:
            pass


@contextmanager
def playing(place: Path) -> Iterator[Scene]:
    """The scene, with gateways that are ready and nobody who asks yet."""
    loop = Loop()
    simulator = running_simulator(SimulatorOptions())
    try:
        upstream_url = loop.run(simulator.__aenter__()).base_url
        scene = Scene(place, f"sqlite:///{place / 'beanmeter.db'}", upstream_url)
        try:
            scene.wait_until_ready()
            yield scene
        finally:
            scene.close()
    finally:
        loop.run(simulator.__aexit__(None, None, None))
        loop.close()
