"""The life of the gateway's processes, seen from outside: signals, new settings, workers that die. Every process here is a
real one."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import pytest

from proxy.ledger import accounts, reports
from proxy.ledger.engine import Database
from proxy.ledger.migrate import migrate
from tests.bare import Incoming
from tests.live import (
    ORDER,
    PATIENCE_SECONDS,
    PRICE_MICRO_USD,
    SSE,
    UPSTREAM_KEY,
    Conversation,
    Loop,
    ScriptedUpstream,
    booked_charges,
    chunked,
    completed,
    event,
    now,
    wait_for,
)

ROOT = Path(__file__).parent.parent
GENERATIONS = "/images/generations"
BEGINNING = event("image_generation.partial_image", b64_json="aW1hZ2U=", partial_image_index=0)

OLD_CARD = """
version = "old"
[models.gpt-image-2]
qualities = ["high"]
usd_per_image = { 1024x1024 = { high = "0.2107" } }
"""
NEW_CARD = OLD_CARD.replace("old", "new").replace("0.2107", "0.5")
NEW_PRICE_MICRO_USD = 500_000


class Gate:
    """An answer that begins, and ends only when the test says so."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._opened = asyncio.Event()

    async def script(self, conversation: Conversation) -> None:
        whole = chunked(200, SSE, [BEGINNING, completed(size="1024x1024", quality="high")])
        beginning = chunked(200, SSE, [BEGINNING], end=False)
        await conversation.write(beginning)
        await self._opened.wait()
        await conversation.write(whole.removeprefix(beginning))

    def open(self) -> None:
        async def open_it() -> None:
            self._opened.set()

        self._loop.run(open_it())


class Served:
    """A gateway in processes of its own, as ``beanmeter serve`` starts it."""

    def __init__(self, environment: dict[str, str], cwd: Path, key: str, limits: str = "") -> None:
        self.log: list[str] = []
        self._ended = threading.Event()
        self.process = subprocess.Popen(
            ["/bin/sh", "-c", f'{limits} exec "$@"', "serve", sys.executable, "-m", "proxy.cli", "serve"],
            cwd=cwd,
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
            stderr=subprocess.PIPE,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._key = key

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as stderr:
            for line in stderr:
                self.log.append(line.rstrip())
        # Workers write there too, so its end is the end of all processes.
        self._ended.set()

    def wait_until_ready(self) -> None:
        def listens() -> str | None:
            assert self.process.poll() is None, self.log
            return next((line for line in self.log if " listens at " in line), None)

        self.base_url = wait_for(listens).split(" listens at ")[1].partition(",")[0]
        self.port = int(self.base_url.rpartition(":")[2].removesuffix("/v1"))
        self.client = httpx2.Client(
            base_url=self.base_url, headers={"authorization": f"Bearer {self._key}"}, timeout=PATIENCE_SECONDS, trust_env=False
        )

    def close(self) -> None:
        if hasattr(self, "client"):
            self.client.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for worker in self.events("worker_started"):
            try:
                os.kill(worker["pid"], signal.SIGKILL)
            except ProcessLookupError:
                pass
        assert self._ended.wait(PATIENCE_SECONDS)
        self._reader.join()

    def tell(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def status(self) -> int:
        """The exit status, once there is one."""
        return self.process.wait(PATIENCE_SECONDS)

    def wait_until_all_ended(self) -> None:
        assert self._ended.wait(PATIENCE_SECONDS), self.log

    def events(self, name: str) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in list(self.log) if line.startswith("{")]
        return [line for line in lines if line["event"] == name]

    def wait_for_events(self, name: str, number: int = 1) -> list[dict[str, Any]]:
        def enough() -> list[dict[str, Any]] | None:
            found = self.events(name)
            return found if len(found) >= number else None

        return wait_for(enough)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), PATIENCE_SECONDS)

    def wait_until_refusing(self) -> None:
        def refusing() -> bool | None:
            try:
                self.connect().close()
            except OSError:
                return True
            return None

        wait_for(refusing)

    def post(self) -> httpx2.Response:
        """An image, over a connection of its own, so that any worker may have it."""
        with httpx2.Client(headers=self.client.headers, timeout=PATIENCE_SECONDS, trust_env=False) as client:
            return client.post(self.base_url + GENERATIONS, json=ORDER)

    def page(self) -> dict[str, float]:
        """The metrics, by name and labels as they are written."""
        page = httpx2.get(self.base_url.removesuffix("/v1") + "/metrics", trust_env=False)
        assert page.status_code == 200
        rows = (row.rpartition(" ") for row in page.text.splitlines() if not row.startswith("#"))
        return {name: float(value) for name, _, value in rows}


@dataclass
class Stage:
    """A scripted upstream, books with one team, and gateways between them."""

    directory: Path
    loop: Loop
    upstream: ScriptedUpstream
    database: Database
    key: str
    gateways: list[Served] = field(default_factory=list)
    gates: list[Gate] = field(default_factory=list)

    @property
    def database_path(self) -> Path:
        return self.directory / "beanmeter.db"

    def rest(self, pid: int) -> None:
        """Stop a worker where it does not write: stopped in a transaction, it would keep the file from all others."""

        def rests() -> bool | None:
            os.kill(pid, signal.SIGSTOP)
            wait_for(lambda: Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].startswith("T") or None)
            with closing(sqlite3.connect(self.database_path, timeout=0, isolation_level=None)) as file:
                try:
                    file.execute("BEGIN IMMEDIATE")
                except sqlite3.OperationalError:
                    os.kill(pid, signal.SIGCONT)
                    return None
            return True

        wait_for(rests)

    def start(self, *, limits: str = "", **settings: str) -> Served:
        environment = {
            "BEANMETER_UPSTREAM_KEY": UPSTREAM_KEY,
            "BEANMETER_DATABASE_URL": f"sqlite:///{self.database_path}",
            "BEANMETER_PORT": "0",
            **{f"BEANMETER_{name.upper()}": value for name, value in settings.items()},
        }
        if not (self.directory / "beanmeter.toml").exists():
            environment["BEANMETER_UPSTREAM_URL"] = self.upstream.base_url
        gateway = Served(environment, self.directory, self.key, limits)
        self.gateways.append(gateway)
        return gateway

    def serve(self, *, limits: str = "", **settings: str) -> Served:
        gateway = self.start(limits=limits, **settings)
        gateway.wait_until_ready()
        return gateway

    def gate(self) -> Gate:
        """From now on, the upstream's answers wait for it."""
        gate = Gate(self.loop)
        self.gates.append(gate)
        self.upstream.script = gate.script
        return gate

    def charges(self) -> list[dict[str, Any]]:
        def look() -> list[dict[str, Any]]:
            with self.database.reading() as connection:
                return list(reports.list_charges(connection))

        return booked_charges(look)


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    loop = Loop()
    upstream = ScriptedUpstream(loop)
    database = Database(f"sqlite:///{tmp_path / 'beanmeter.db'}")
    migrate(database)
    with database.writing() as connection:
        accounts.add_team(connection, "red", now=now(), actor="test")
        key = accounts.add_key(connection, "red", now=now(), actor="test").key
    stage = Stage(tmp_path, loop, upstream, database, key)
    try:
        yield stage
    finally:
        for gateway in stage.gateways:
            gateway.close()
        for gate in stage.gates:
            gate.open()
        upstream.close()
        loop.close()
        database.close()


STREAM = {**ORDER, "stream": True}


@pytest.mark.parametrize(("workers", "number"), [("1", signal.SIGINT), ("2", signal.SIGTERM)])
def test_an_idle_gateway_ends_well(stage: Stage, workers: str, number: signal.Signals) -> None:
    gateway = stage.serve(workers=workers)
    gateway.tell(number)
    assert gateway.status() == 0
    gateway.wait_until_all_ended()
    assert not list((stage.directory / "var").rglob("*.db"))


def test_an_open_exchange_finishes_after_sigterm(stage: Stage) -> None:
    gateway = stage.serve(workers="2")
    gate = stage.gate()
    with gateway.client.stream("POST", GENERATIONS, json=STREAM) as answer:
        pieces = answer.iter_raw()
        received = next(pieces)
        gateway.tell(signal.SIGTERM)
        gateway.wait_until_refusing()
        gate.open()
        received += b"".join(pieces)
    assert received == BEGINNING + completed(size="1024x1024", quality="high")
    assert gateway.status() == 0
    assert [(row["state"], row["settled_micro_usd"]) for row in stage.charges()] == [("settled", PRICE_MICRO_USD)]


def test_a_kept_connection_is_told_that_the_gateway_is_not_ready_any_more(stage: Stage) -> None:
    gateway = stage.serve()
    gate = stage.gate()
    ask = b"GET /readyz HTTP/1.1\r\nHost: gateway.test\r\n\r\n"
    with gateway.connect() as kept, gateway.client.stream("POST", GENERATIONS, json=STREAM) as answer:
        incoming = Incoming(kept)
        kept.sendall(ask)
        before = incoming.reply("GET")
        assert before is not None
        assert before.status == 200
        pieces = answer.iter_raw()
        next(pieces)
        gateway.tell(signal.SIGTERM)
        gateway.wait_until_refusing()
        kept.sendall(ask)
        after = incoming.reply("GET")
        assert after is not None
        assert (after.status, after.values("connection")) == (503, ["close"])
        gate.open()
        assert b"".join(pieces) == completed(size="1024x1024", quality="high")
    assert gateway.status() == 0
    assert [row["state"] for row in stage.charges()] == ["settled"]


@pytest.mark.parametrize(
    ("workers", "drain_seconds", "times"),
    [
        pytest.param("1", "0.1", 1, id="the time to drain is over"),
        pytest.param("2", "600", 2, id="told twice"),
    ],
)
def test_what_is_broken_off_is_booked(stage: Stage, workers: str, drain_seconds: str, times: int) -> None:
    gateway = stage.serve(workers=workers, drain_seconds=drain_seconds)
    stage.gate()
    with gateway.client.stream("POST", GENERATIONS, json=STREAM) as answer:
        pieces = answer.iter_raw()
        assert next(pieces) == BEGINNING
        gateway.tell(signal.SIGTERM)
        if times == 2:
            gateway.wait_until_refusing()
            gateway.tell(signal.SIGTERM)
        with pytest.raises(httpx2.TransportError):
            next(pieces)
    assert gateway.status() == 0
    gateway.wait_until_all_ended()
    assert len(gateway.events("exchanges_broken_off")) == 1
    # Its client is told in its own way, and not with a traceback in the log.
    assert not [line for line in gateway.log if "Traceback" in line]
    assert [(row["state"], row["reserved_micro_usd"]) for row in stage.charges()] == [("review", PRICE_MICRO_USD)]


def test_new_settings_hold_for_the_next_request_and_not_for_an_open_one(stage: Stage) -> None:
    other = ScriptedUpstream(stage.loop)
    config, card = stage.directory / "beanmeter.toml", stage.directory / "card.toml"
    card.write_text(OLD_CARD)
    config.write_text(f'prices = "card.toml"\nupstream_url = "{stage.upstream.base_url}"\n')
    gateway = stage.serve()
    gate = stage.gate()
    with gateway.client.stream("POST", GENERATIONS, json=STREAM) as open_answer:
        pieces = open_answer.iter_raw()
        assert next(pieces) == BEGINNING
        card.write_text(NEW_CARD)
        config.write_text(f'prices = "card.toml"\nupstream_url = "{other.base_url}"\nworkers = 3\nstate_dir = "elsewhere"\n')
        gateway.tell(signal.SIGHUP)
        gateway.wait_for_events("settings_renewed")
        wait_for(lambda: gateway.page().get('beanmeter_price_card_info{version="new"}'))
        answer = gateway.post()
        assert (answer.status_code, answer.headers["x-beanmeter-reserved-usd"]) == (200, "0.500000")
        gate.open()
        assert b"".join(pieces) == completed(size="1024x1024", quality="high")
    assert (len(stage.upstream.requests), len(other.requests)) == (1, 1)
    (warning,) = gateway.events("settings_not_changed")
    assert warning["settings"] == ["BEANMETER_WORKERS", "BEANMETER_STATE_DIR"]
    gateway.tell(signal.SIGTERM)
    assert gateway.status() == 0
    other.close()
    assert [(row["price_card"], row["settled_micro_usd"]) for row in stage.charges()] == [
        ("old", PRICE_MICRO_USD),
        ("new", NEW_PRICE_MICRO_USD),
    ]


def test_all_workers_have_the_new_settings_also_those_that_start_later(stage: Stage) -> None:
    card = stage.directory / "card.toml"
    card.write_text(OLD_CARD)
    gateway = stage.serve(prices=str(card), workers="2")
    workers = gateway.wait_for_events("worker_started", 2)
    assert gateway.post().headers["x-beanmeter-reserved-usd"] == "0.210700"
    card.write_text(NEW_CARD)
    gateway.tell(signal.SIGHUP)
    gateway.wait_for_events("settings_renewed")
    # What is in the file now was not accepted, so nobody starts with it.
    card.write_text("broken")
    gateway.tell(signal.SIGHUP)
    gateway.wait_for_events("settings_refused")
    for number, worker in enumerate(workers, 3):
        os.kill(worker["pid"], signal.SIGKILL)
        gateway.wait_for_events("worker_started", number)
    assert [gateway.post().headers["x-beanmeter-reserved-usd"] for _ in range(10)] == ["0.500000"] * 10


def test_settings_that_cannot_be_used_change_nothing(stage: Stage) -> None:
    card = stage.directory / "card.toml"
    card.write_text(OLD_CARD)
    gateway = stage.serve(prices=str(card))
    card.write_text(NEW_CARD.replace('"0.5"', '"half a dollar"'))
    gateway.tell(signal.SIGHUP)
    (refused,) = gateway.wait_for_events("settings_refused")
    assert str(card) in refused["reason"]
    assert "half a dollar" in refused["reason"]
    assert gateway.post().headers["x-beanmeter-reserved-usd"] == "0.210700"
    assert not gateway.events("settings_renewed")


def test_no_request_is_lost_while_settings_are_read_again_and_again(stage: Stage) -> None:
    gateway = stage.serve(workers="2")
    statuses = []
    for count in range(1, 6):
        gateway.tell(signal.SIGHUP)
        statuses += [gateway.post().status_code for _ in range(4)]
        gateway.wait_for_events("settings_renewed", count)
    assert statuses == [200] * 20
    assert len(gateway.events("worker_started")) == 2


def test_every_worker_serves(stage: Stage) -> None:
    gateway = stage.serve(workers="2")
    pids = [started["pid"] for started in gateway.wait_for_events("worker_started", 2)]
    assert len({*pids, gateway.process.pid}) == 3
    for resting in pids:
        stage.rest(resting)
        assert gateway.post().status_code == 200
        os.kill(resting, signal.SIGCONT)
    assert gateway.page()['beanmeter_requests_total{operation="generation",outcome="settled",team="red"}'] == 2
    for pid in (*pids, gateway.process.pid):
        assert resource.prlimit(pid, resource.RLIMIT_CORE) == (0, 0)


def test_killed_workers_are_replaced_and_what_they_counted_stays(stage: Stage) -> None:
    gateway = stage.serve(workers="2")
    settled = 'beanmeter_requests_total{operation="generation",outcome="settled",team="red"}'
    inflight = 'beanmeter_inflight_requests{operation="generation"}'
    seconds = 'beanmeter_request_duration_seconds_count{operation="generation",outcome="settled"}'
    assert [gateway.post().status_code for _ in range(4)] == [200] * 4
    stage.gate()
    with gateway.client.stream("POST", GENERATIONS, json=STREAM) as answer:
        pieces = answer.iter_raw()
        next(pieces)
        before = gateway.page()
        assert (before[settled], before[seconds], before[inflight]) == (4, 4, 1)
        for started in gateway.wait_for_events("worker_started", 2):
            os.kill(started["pid"], signal.SIGKILL)
        with pytest.raises(httpx2.TransportError):
            next(pieces)
    gateway.wait_for_events("worker_started", 4)
    assert {event["status"] for event in gateway.wait_for_events("worker_died", 2)} == {-signal.SIGKILL}
    # A worker that is killed while it starts leaves such files.
    (metrics,) = (stage.directory / "var" / "metrics").iterdir()
    (metrics / "counter_7.db").write_bytes(b"")
    (metrics / "histogram_7.db").write_bytes(b"\xff\xff\x00\x00half")
    stage.upstream.answer(chunked(200, SSE, [completed(size="1024x1024", quality="high")]))
    assert [gateway.post().status_code for _ in range(4)] == [200] * 4
    after = gateway.page()
    assert (after[settled], after[seconds], after[inflight]) == (8, 8, 0)
    gateway.tell(signal.SIGTERM)
    assert gateway.status() == 0


def test_workers_whose_supervisor_was_killed_finish_and_end(stage: Stage) -> None:
    gateway = stage.serve(workers="2")
    gateway.wait_for_events("worker_started", 2)
    gate = stage.gate()
    with gateway.client.stream("POST", GENERATIONS, json=STREAM) as answer:
        pieces = answer.iter_raw()
        next(pieces)
        gateway.tell(signal.SIGKILL)
        gateway.wait_until_refusing()
        gate.open()
        assert b"".join(pieces) == completed(size="1024x1024", quality="high")
    gateway.wait_until_all_ended()
    assert [row["state"] for row in stage.charges()] == ["settled"]
    # The next one at this address begins with empty books of metrics.
    (left,) = (stage.directory / "var" / "metrics").iterdir()
    assert list(left.iterdir())
    follower = stage.serve(workers="2", port=str(gateway.port))
    assert not [name for name in follower.page() if name.startswith("beanmeter_requests_total")]


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_gateway_that_can_never_start_gives_up(stage: Stage, workers: str) -> None:
    (stage.directory / "var").mkdir()
    (stage.directory / "var" / "journal").write_text("not a directory")
    gateway = stage.start(workers=workers)
    assert gateway.status() == 1
    gateway.wait_until_all_ended()
    assert not [line for line in gateway.log if " listens at " in line]


def test_without_descriptors_it_lives_and_serves_again(stage: Stage) -> None:
    gateway = stage.serve(limits="ulimit -n 64;")
    assert gateway.post().status_code == 200
    crowd = [gateway.connect() for _ in range(100)]
    for one in crowd:
        one.settimeout(PATIENCE_SECONDS)

    def turned_away() -> socket.socket | None:
        one = gateway.connect()
        try:
            one.sendall(b"GET /livez HTTP/1.1\r\nHost: gateway.test\r\n\r\n")
            return None if one.recv(1) else one
        except OSError:
            return one
        finally:
            one.close()

    wait_for(turned_away)
    for one in crowd:
        one.close()

    def served() -> int | None:
        try:
            return gateway.post().status_code
        except httpx2.TransportError:
            return None

    assert wait_for(served) == 200
    gateway.tell(signal.SIGTERM)
    assert gateway.status() == 0
