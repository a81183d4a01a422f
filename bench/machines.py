"""The machines of a measure: the gateway, its peers, the upstreams and the database, each a process of its own on loopback.

Processes are started, weighed and ended only here.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import pytest

from proxy.ledger import accounts
from proxy.ledger.engine import Database
from proxy.ledger.migrate import migrate
from tests.postgres import Server, running_postgres

ROOT = Path(__file__).parent.parent
PEERS = Path(__file__).parent / ".peers"
PORTKEY = PEERS / "portkey" / "node_modules" / "@portkey-ai" / "gateway" / "build" / "start-server.js"
LITELLM = PEERS / "litellm" / "bin" / "litellm"

GENERATIONS = "/v1/images/generations"
EDITS = "/v1/images/edits"
JSON = {"Content-Type": "application/json"}

# Room for every request of every measure, in micro-USD: what is measured is admission, not refusal.
BUDGET_MICRO_USD = 10**15

# LiteLLM takes half a minute, and more beside other work.
START_SECONDS_MAX = 120
STOP_SECONDS_MAX = 10

TICKS_A_SECOND = os.sysconf("SC_CLK_TCK")


class Missing(Exception):
    """A program that a measure needs is not installed; the message says how to get it."""


@dataclass(frozen=True)
class Machine:
    """A running server. ``headers`` are those that a client of it sends; ``start_seconds`` is the time from the start of
    the process to its first sign of readiness."""

    name: str
    port: int
    pid: int
    start_seconds: float
    headers: Mapping[str, str] = field(default_factory=dict)
    database_url: str = ""

    def cpu_seconds(self) -> float:
        """What the process and its children have used by now, user and system together."""
        return sum(_cpu_seconds(pid) for pid in _family(self.pid))

    def pss_bytes(self) -> int:
        """The memory of the process and its children, with each shared page split among those that share it."""
        return sum(_kilobytes(f"/proc/{pid}/smaps_rollup", "Pss") for pid in _family(self.pid))

    def rss_bytes(self) -> int:
        """The memory that the process itself has now."""
        return _kilobytes(f"/proc/{self.pid}/status", "VmRSS")

    def peak_rss_bytes(self) -> int:
        """The most memory that the process itself ever had."""
        return _kilobytes(f"/proc/{self.pid}/status", "VmHWM")


def _family(pid: int) -> list[int]:
    """A process and all its descendants."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The name, in parentheses, can hold anything; what follows the last one is plain.
            parent = int(stat.read_text(errors="replace").rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
        children.setdefault(parent, []).append(int(stat.parent.name))
    family = [pid]
    for member in family:
        family += children.get(member, [])
    return family


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_A_SECOND


def _kilobytes(path: str, name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB$", Path(path).read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


# Starting and ending


@contextmanager
def scratch() -> Iterator[Path]:
    """A directory for a measure's own files, on disk, gone at the end."""
    with tempfile.TemporaryDirectory(prefix="beanmeter-bench-") as directory:
        yield Path(directory)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def allow_descriptors(needed: int) -> None:
    """Let this process, and those that it starts, open as many files as the system allows. Raises :class:`Missing` where
    these are fewer than ``needed``."""
    _, allowed = resource.getrlimit(resource.RLIMIT_NOFILE)
    if allowed < needed:
        raise Missing(
            f"{needed} open files are needed, and {allowed} are allowed: raise the limit, such as with 'ulimit -Hn {needed}'"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, allowed))


@contextmanager
def running(
    name: str,
    command: Sequence[str | Path],
    directory: Path,
    port: int,
    *,
    ready_path: str | None = None,
    environment: Mapping[str, str] | None = None,
    headers: Mapping[str, str] | None = None,
    database_url: str = "",
) -> Iterator[Machine]:
    """A server for as long as the block lasts, ready when ``ready_path`` answers 200, or when it takes connections."""
    log_path = directory / f"{name}-{port}.log"
    inherited = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith("BEANMETER_") and not key.lower().endswith("_proxy")
    }
    with log_path.open("wb") as log:
        started = time.monotonic()
        # A session of its own, so that it ends together with whatever it starts itself.
        process = subprocess.Popen(
            command, cwd=directory, env={**inherited, **(environment or {})}, stdout=log, stderr=log, start_new_session=True
        )
    try:
        while not _ready(port, ready_path):
            if process.poll() is not None or time.monotonic() - started > START_SECONDS_MAX:
                raise SystemExit(f"{name} did not start:\n{log_path.read_text(errors='replace')[-4000:]}")
            time.sleep(0.005)
        yield Machine(name, port, process.pid, time.monotonic() - started, headers or {}, database_url)
    finally:
        _end(process)


def _ready(port: int, path: str | None) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        if path is None:
            connection.connect()
            return True
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _end(process: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        try:
            process.wait(STOP_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            continue


def program(name: str) -> str:
    """Where a program of Debian's is. Raises :class:`Missing`."""
    found = shutil.which(name)
    if found is None:
        raise Missing(f"{name} is not installed: bench/peers/install-debian.sh installs it")
    return found


# The gateway


def open_books(database_url: str) -> str:
    """An up to date database with one team that has a hard budget; a key of that team."""
    database = Database(database_url)
    migrate(database)
    now = datetime.now(UTC)
    with database.writing() as connection:
        accounts.add_team(connection, "bench", now=now, actor="bench")
        accounts.set_budget(connection, "bench", None, "month", BUDGET_MICRO_USD, soft=False, now=now, actor="bench")
        key = accounts.add_key(connection, "bench", now=now, actor="bench").key
    database.close()
    return key


@contextmanager
def gateway(
    upstream: Machine,
    directory: Path,
    *,
    name: str = "Beanmeter",
    workers: int = 1,
    database_url: str = "",
    key: str = "",
    checkout: Path = ROOT,
    program: Sequence[str] = ("-m", "proxy.cli"),
) -> Iterator[Machine]:
    """``beanmeter serve``, on a new SQLite database with a team and its budget, unless another one is named with a key; its
    code is this checkout's or another's. ``program`` is what Python is to run in place of the command."""
    directory = Path(tempfile.mkdtemp(dir=directory))
    database_url = database_url or f"sqlite:///{directory / 'beanmeter.db'}"
    key = key or open_books(database_url)
    port = free_port()
    with running(
        name,
        [sys.executable, *program, "serve", "--port", str(port), "--workers", str(workers)],
        directory,
        port,
        ready_path="/readyz",
        environment={
            "PYTHONPATH": str(checkout),
            "BEANMETER_UPSTREAM_URL": f"http://127.0.0.1:{upstream.port}/v1",
            "BEANMETER_UPSTREAM_KEY": "sk-beans-bench",
            "BEANMETER_DATABASE_URL": database_url,
            "BEANMETER_STATE_DIR": str(directory / "var"),
            "BEANMETER_DRAIN_SECONDS": "2",
        },
        headers={"Authorization": f"Bearer {key}"},
        database_url=database_url,
    ) as machine:
        yield machine


@contextmanager
def postgres() -> Iterator[Server]:
    """A PostgreSQL server of this measure's own, which syncs every commit. Raises :class:`Missing`."""
    try:
        with running_postgres() as server:
            yield server
    except pytest.skip.Exception as reason:
        raise Missing(str(reason)) from None


# The peers


@contextmanager
def portkey(upstream: Machine, directory: Path) -> Iterator[Machine]:
    if not PORTKEY.exists():
        raise Missing("Portkey is not installed: bench/peers/install-portkey.sh installs it")
    port = free_port()
    headers = {
        "Authorization": "Bearer sk-beans-bench",
        "x-portkey-provider": "openai",
        "x-portkey-custom-host": f"http://127.0.0.1:{upstream.port}/v1",
    }
    command: list[str | Path] = [program("node"), PORTKEY, f"--port={port}", "--headless"]
    environment = {"NODE_ENV": "production", "TRUSTED_CUSTOM_HOSTS": "127.0.0.1,localhost"}
    with running("Portkey", command, directory, port, ready_path="/", environment=environment, headers=headers) as machine:
        yield machine


@contextmanager
def litellm(upstream: Machine, directory: Path) -> Iterator[Machine]:
    """LiteLLM's proxy, with one worker and no database."""
    if not LITELLM.exists():
        raise Missing("LiteLLM is not installed: bench/peers/install-litellm.sh installs it")
    port = free_port()
    parameters = {
        "model": "openai/gpt-image-2",
        "api_base": f"http://127.0.0.1:{upstream.port}/v1",
        "api_key": "sk-beans-bench",
    }
    config = {
        "model_list": [{"model_name": "gpt-image-2", "litellm_params": parameters, "model_info": {"mode": "image_generation"}}]
    }
    # Its best case: it asks nobody who they are, reads prices from its own files, and sends nothing anywhere.
    environment = {
        "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "LITELLM_LOG": "ERROR",
        "LITELLM_MODE": "PRODUCTION",
        "PATH": f"{LITELLM.parent}:{os.environ['PATH']}",
    }
    # JSON is YAML.
    config_path = directory / "litellm.yaml"
    config_path.write_text(json.dumps(config))
    command: list[str | Path] = [
        LITELLM,
        "--config",
        config_path,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--num_workers",
        "1",
    ]
    with running(
        "LiteLLM",
        command,
        directory,
        port,
        ready_path="/health/readiness",
        environment=environment,
        headers={"Authorization": "Bearer sk-litellm"},
    ) as machine:
        yield machine


# nginx, as the upstream and as the wire's limit

_NGINX = """
daemon off;
worker_processes {workers};
worker_rlimit_nofile 16384;
pid {home}/nginx.pid;
error_log stderr error;
{user}
events {{ worker_connections 8192; }}
http {{
    access_log off;
    sendfile on;
    tcp_nodelay on;
    keepalive_requests 100000000;
    client_max_body_size 0;
    client_body_temp_path {home}/client_body;
    proxy_temp_path {home}/proxy;
    fastcgi_temp_path {home}/fastcgi;
    uwsgi_temp_path {home}/uwsgi;
    scgi_temp_path {home}/scgi;
    {servers}
}}
"""

# What a small generation is answered with.
ANSWER = json.dumps(
    {
        "created": 1_760_000_000,
        "data": [{"b64_json": "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNkYAAAAAYAAjCB0C8AAAAASUVORK5CYII="}],
        "size": "1024x1024",
        "quality": "low",
        "output_format": "png",
        "usage": {"total_tokens": 206, "input_tokens": 10, "output_tokens": 196},
    }
)

_ANSWERING = "default_type application/json; return 200 '{answer}';"

# A file is never an answer to a POST, so the refusal of one is made to lead to it.
_STREAMING = """
        error_page 405 =200 /{file};
        return 405;
    }}
    location = /{file} {{
        root {root};
        default_type text/event-stream;
"""


@contextmanager
def _nginx(name: str, directory: Path, port: int, servers: str) -> Iterator[Machine]:
    home = Path(tempfile.mkdtemp(dir=directory))
    config = home / "nginx.conf"
    user = "user root;" if os.geteuid() == 0 else ""
    config.write_text(_NGINX.format(home=home, servers=servers, user=user, workers=1))
    command: list[str | Path] = [program("nginx"), "-p", home, "-c", config]
    with running(name, command, directory, port) as machine:
        yield machine


@contextmanager
def upstream(directory: Path, stream: Path | None = None) -> Iterator[Machine]:
    """nginx that answers every request with :data:`ANSWER`, or with the events in the file ``stream``."""
    port = free_port()
    how = _STREAMING.format(file=stream.name, root=stream.parent) if stream else _ANSWERING.format(answer=ANSWER)
    with _nginx(
        "upstream", directory, port, f"server {{ listen 127.0.0.1:{port} backlog=4096; location / {{ {how} }} }}"
    ) as machine:
        yield machine


@contextmanager
def nginx(upstream: Machine, directory: Path, *, name: str = "nginx", buffer_requests: bool = True) -> Iterator[Machine]:
    """nginx as a reverse proxy that passes answers on as they come. ``buffer_requests``: a request's body is whole before
    any of it is sent on, which is also nginx's default."""
    port = free_port()
    servers = f"""
    upstream beans {{ server 127.0.0.1:{upstream.port}; keepalive 128; }}
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        location / {{
            proxy_pass http://beans;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_buffering off;
            proxy_request_buffering {"on" if buffer_requests else "off"};
            proxy_read_timeout 600s;
        }}
    }}"""
    with _nginx(name, directory, port, servers) as machine:
        yield machine
