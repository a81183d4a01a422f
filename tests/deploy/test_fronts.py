"""nginx and HAProxy as operators configure them, before two gateways on one PostgreSQL."""

from __future__ import annotations

import os
import re
import socket
import ssl
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx2
import pytest

from proxy.ledger import reviews
from proxy.server import HEAD_BYTES_MAX, HEAD_SECONDS, HEADERS_MAX, IDLE_SECONDS, URL_BYTES_MAX
from proxy.settings import Settings
from tests.bare import GENERATIONS, JSON_TYPE, head
from tests.chaos.crew import Crew, Process, crew
from tests.deploy.programs import DEPLOY, program
from tests.live import ORDER, PATIENCE_SECONDS, ScriptedUpstream, completed, now, wait_for
from tests.pages.house import TOKEN
from tests.ports import free_port
from tests.test_supervisor import BEGINNING, Gate

pytestmark = pytest.mark.postgres

# As many as are surely on both gateways.
EXCHANGES = 8

# A proxy that has just lost a gateway may meet it a few times more; who never finds the other has lost both.
ATTEMPTS_MAX = 60
IN_A_ROW = 10

NGINX = """
daemon off;
worker_processes 2;
pid {place}/nginx.pid;
error_log {place}/nginx.log;
{advised}
http {{
    client_body_temp_path {place}/body;
    proxy_temp_path {place}/proxy;
    fastcgi_temp_path {place}/fastcgi;
    uwsgi_temp_path {place}/uwsgi;
    scgi_temp_path {place}/scgi;
    include {place}/beanmeter.conf;
}}
"""


@dataclass(frozen=True)
class Front:
    """A reverse proxy that listens on loopback with a certificate of its own."""

    port: int
    tls: ssl.SSLContext

    def client(self, key: str) -> httpx2.Client:
        return httpx2.Client(
            base_url=f"https://127.0.0.1:{self.port}/v1",
            headers={"authorization": f"Bearer {key}"},
            timeout=PATIENCE_SECONDS,
            trust_env=False,
            verify=self.tls,
        )

    def connect(self) -> ssl.SSLSocket:
        plain = socket.create_connection(("127.0.0.1", self.port), PATIENCE_SECONDS)
        return self.tls.wrap_socket(plain, server_hostname="127.0.0.1")


def put(text: str, changes: dict[str, str]) -> str:
    """A configuration with what is the operator's own replaced; each of it has to be there, and once."""
    for old, new in changes.items():
        assert text.count(old) == 1, f"{old!r} is there {text.count(old)} times"
        text = text.replace(old, new)
    return text


def certificate(place: Path) -> tuple[Path, Path]:
    openssl = program("openssl", "the Debian package openssl")
    paths = place / "front.crt", place / "front.key"
    options = ["-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2", "-subj", "/CN=front"]
    options += ["-addext", "subjectAltName=IP:127.0.0.1", "-out", str(paths[0]), "-keyout", str(paths[1])]
    subprocess.run([openssl, "req", *options], check=True, capture_output=True)
    return paths


def advised(text: str) -> str:
    """What the file says belongs into nginx.conf: the lines of its head that stand further in."""
    return "\n".join(re.findall(r"^#   (.+)$", text, re.MULTILINE))


def nginx_command(place: Path, port: int, gateways: list[str], changes: dict[str, str]) -> list[str]:
    nginx = program("nginx", "the Debian package nginx")
    crt, key = certificate(place)
    text = (DEPLOY / "nginx" / "beanmeter.conf").read_text("utf-8")
    settings = put(
        text,
        {
            **changes,
            "listen 443 ssl;": f"listen 127.0.0.1:{port} ssl;",
            "10.0.0.11:8080": gateways[0],
            "10.0.0.12:8080": gateways[1],
            "/etc/nginx/beanmeter.crt": str(crt),
            "/etc/nginx/beanmeter.key": str(key),
            "/var/log/nginx/beanmeter.log": str(place / "access.log"),
            "/var/log/nginx/beanmeter.error.log": str(place / "error.log"),
        },
    )
    (place / "beanmeter.conf").write_text(settings)
    (place / "nginx.conf").write_text(NGINX.format(place=place, advised=advised(text)))
    command: list[str] = [nginx, "-e", str(place / "nginx.log"), "-c", str(place / "nginx.conf")]
    subprocess.run([*command, "-t", "-q"], check=True)
    return command


def haproxy_command(place: Path, port: int, gateways: list[str], changes: dict[str, str]) -> list[str]:
    haproxy = program("haproxy", "the Debian package haproxy")
    crt, key = certificate(place)
    (place / "front.pem").write_text(crt.read_text() + key.read_text())
    changes = {
        **changes,
        "bind :443": f"bind 127.0.0.1:{port}",
        "10.0.0.11:8080": gateways[0],
        "10.0.0.12:8080": gateways[1],
        "/etc/haproxy/beanmeter.pem": str(place / "front.pem"),
    }
    if os.geteuid() != 0:
        # Only root can become somebody else.
        changes |= {"    user haproxy\n": "", "    group haproxy\n": "", "    chroot /var/lib/haproxy\n": ""}
    (place / "haproxy.cfg").write_text(put((DEPLOY / "haproxy" / "haproxy.cfg").read_text("utf-8"), changes))
    command: list[str] = [haproxy, "-db", "-f", str(place / "haproxy.cfg")]
    checked = subprocess.run([*command, "-c"], check=True, capture_output=True, text=True)
    assert "WARNING" not in checked.stderr, checked.stderr
    return command


COMMANDS = {"nginx": nginx_command, "haproxy": haproxy_command}


@contextmanager
def running_front(kind: str, place: Path, gateways: list[str], changes: dict[str, str] | None = None) -> Iterator[Front]:
    """The proxy before these addresses, with ``changes`` to its configuration, as long as the block lasts."""
    place.mkdir()
    port = free_port()
    command = COMMANDS[kind](place, port, gateways, changes or {})
    with (place / "output.log").open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        front = Front(port, ssl.create_default_context(cafile=place / "front.crt"))

        def listens() -> bool | None:
            assert process.poll() is None, (place / "output.log").read_text()
            try:
                front.connect().close()
            except ConnectionRefusedError:
                return None
            return True

        wait_for(listens)
        yield front
    finally:
        process.terminate()
        process.wait(PATIENCE_SECONDS)


@dataclass(frozen=True)
class Fleet:
    """Two gateways with a state directory each, and the proxy before them."""

    crew: Crew
    gateways: list[Process]
    front: Front
    place: Path

    def state_dir(self, number: int) -> Path:
        return self.place / f"var-{number}"


@contextmanager
def running_fleet(
    kind: str, database: str, place: Path, changes: dict[str, str] | None = None, **settings: str
) -> Iterator[Fleet]:
    with crew(database, place) as parts:
        gateways = [parts.start(parts.plan(state_dir=str(place / f"var-{number}"), **settings)) for number in range(2)]
        addresses = [gateway.base_url.split("/")[2] for gateway in gateways]
        with running_front(kind, place / kind, addresses, changes) as front:
            fleet = Fleet(parts, gateways, front, place)
            with front.client(parts.key) as client:
                # HAProxy takes a gateway for ready until it has asked; nginx does not ask.
                wait_for(lambda: client.get("/models").status_code == 200 or None)
            yield fleet


@pytest.fixture(params=sorted(COMMANDS))
def kind(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


def test_events_arrive_while_the_upstream_holds_the_rest(kind: str, postgres_database: str, tmp_path: Path) -> None:
    with crew(postgres_database, tmp_path) as parts:
        upstream = ScriptedUpstream(parts.loop)
        gate = Gate(parts.loop)
        upstream.script = gate.script
        gateways = [parts.start(parts.plan(upstream_url=upstream.base_url)) for _ in range(2)]
        addresses = [gateway.base_url.split("/")[2] for gateway in gateways]
        with (
            running_front(kind, tmp_path / kind, addresses) as front,
            front.client(parts.key) as client,
            client.stream("POST", "/images/generations", json={**ORDER, "stream": True}) as answer,
        ):
            pieces = answer.iter_raw()
            seen = b""
            while len(seen) < len(BEGINNING):
                seen += next(pieces)
            # The upstream has written this much and no more: nothing behind it can be in here yet.
            assert seen == BEGINNING
            gate.open()
            seen += b"".join(pieces)
        assert seen == BEGINNING + completed(size="1024x1024", quality="high")
        assert len(upstream.requests) == 1
        upstream.close()
        assert [row["state"] for row in parts.charges().values()] == ["settled"]


def test_a_request_is_passed_on_as_it_comes(kind: str, postgres_database: str, tmp_path: Path) -> None:
    with running_fleet(kind, postgres_database, tmp_path) as fleet, closing(fleet.front.connect()) as connection:
        # The gateway refuses a wrong key before the body: its answer can be here only if the head did not wait for the rest.
        headers = [("Host", "x"), ("Authorization", "Bearer wrong"), JSON_TYPE, ("Content-Length", "50000000")]
        connection.sendall(head("POST", GENERATIONS, headers) + b'{"model": ')
        answer = connection.recv(65_536)
        assert answer.startswith(b"HTTP/1.1 401 ")
        assert b"x-beanmeter-request-id:" in answer.lower()
        assert not fleet.crew.simulator.requests()


def test_a_gateway_is_killed_in_the_middle(kind: str, postgres_database: str, tmp_path: Path) -> None:
    with running_fleet(kind, postgres_database, tmp_path) as fleet, ThreadPoolExecutor(EXCHANGES) as clients:
        simulator = fleet.crew.simulator
        # Of streams the answer has begun, of the others not even its head is there: neither may be asked for a second time.
        orders = [clients.submit(comes_whole, fleet, number % 2 == 0) for number in range(EXCHANGES)]
        wait_for(lambda: len(simulator.requests()) == EXCHANGES or None)
        fleet.gateways[0].kill()
        wait(orders)
        came = [order.result() for order in orders]
        assert 0 < came.count(True) < EXCHANGES, "both gateways had some"
        assert len(simulator.requests()) == EXCHANGES, "nothing was sent twice"

        in_a_row = attempts = served = 0
        while in_a_row < IN_A_ROW:
            assert attempts < ATTEMPTS_MAX, "the other gateway is not found"
            attempts += 1
            status = order(fleet)
            assert status in (200, 502, 503)
            served += status == 200
            in_a_row = in_a_row + 1 if status == 200 else 0
        assert len(simulator.requests()) == EXCHANGES + served, "what failed was not sent"

        wait_for(lambda: len(simulator.bill()["entries"]) == EXCHANGES + served or None)
        assert fleet.gateways[1].stop() == 0
        fleet.crew.recover(fleet.state_dir(0))
        charges = fleet.crew.audit()
        in_review = {row["request_id"]: row for row in charges.values() if row["state"] == "review"}
        assert len(in_review) == came.count(False)
        bill = simulator.bill()
        for entry in bill["entries"]:
            if (charge := in_review.get(entry["client_request_id"])) is not None:
                with fleet.crew.database.writing() as connection:
                    reviews.settle(connection, charge["id"], entry["micro_usd"], now=now(), actor="test")
        settled = [row["settled_micro_usd"] for row in fleet.crew.charges().values()]
        assert (len(settled), sum(settled)) == (EXCHANGES + served, bill["total_micro_usd"])


def comes_whole(fleet: Fleet, stream: bool) -> bool:
    """One image that takes a while; whether it came. What is broken has to look so."""
    order = {**ORDER, "prompt": "a bean [[sim bytes=2000 latency=3]]", "stream": stream}
    with fleet.front.client(fleet.crew.key) as client:
        try:
            answer = client.post("/images/generations", json=order)
        except httpx2.TransportError:
            return False
    assert answer.status_code in (200, 502), answer.text
    image = b"image_generation.completed" if stream else b"b64_json"
    assert (answer.status_code == 200) == (image in answer.content), "what was cut ended as if it were whole"
    return answer.status_code == 200


def order(fleet: Fleet) -> int:
    with fleet.front.client(fleet.crew.key) as client:
        return client.post("/images/generations", json={**ORDER, "prompt": "a bean [[sim bytes=2000]]"}).status_code


def test_what_crosses_and_what_does_not(kind: str, postgres_database: str, tmp_path: Path) -> None:
    with running_fleet(kind, postgres_database, tmp_path) as fleet, fleet.front.client(fleet.crew.key) as client:
        # Ids cross both ways, and nothing tells the upstream who called.
        answer = client.post("/images/generations", json=ORDER, headers={"x-request-id": "the-callers-own"})
        assert answer.status_code == 200
        (entry,) = fleet.crew.simulator.bill()["entries"]
        assert answer.headers.get_list("x-request-id") == [entry["request_id"]]
        assert answer.headers["x-beanmeter-request-id"] == entry["client_request_id"]
        (arrived,) = fleet.crew.simulator.requests()
        headers = {name.lower(): value for name, value in arrived["headers"]}
        assert headers["x-request-id"] == "the-callers-own"
        assert not {"via", "forwarded", "x-real-ip"} & headers.keys()
        assert not [name for name in headers if name.startswith("x-forwarded")]

        # A path in another spelling gets the gateway's own answer, not that of the path it resembles.
        for path in ("/v1//models", "/v1/models/", "/v1/%6dodels", "/v1/nothing"):
            assert client.get(f"https://127.0.0.1:{fleet.front.port}{path}").json()["error"]["code"] == "unknown_url"
        # What is for the inside is not there.
        for path in ("/metrics", "/readyz", "/livez", "/", "/v2/models"):
            answer = client.get(f"https://127.0.0.1:{fleet.front.port}{path}")
            assert answer.status_code == 404, path
            assert "x-beanmeter-request-id" not in answer.headers
        # The operator's own: from here it is allowed, so the gateway answers.
        assert client.get(f"https://127.0.0.1:{fleet.front.port}/admin/v1/teams").status_code in (401, 403, 404)


def test_what_is_too_large_ends_at_the_front(kind: str, postgres_database: str, tmp_path: Path) -> None:
    with running_fleet(kind, postgres_database, tmp_path) as fleet, fleet.front.client(fleet.crew.key) as client:

        def status(path: str = "/models", **headers: str) -> int | None:
            try:
                answer = client.get(path, headers={name.replace("_", "-"): value for name, value in headers.items()})
            except httpx2.TransportError:
                return None
            # The gateway gives an id to whatever comes to it.
            assert answer.status_code == 200 or "x-beanmeter-request-id" not in answer.headers
            return answer.status_code

        assert status() == 200
        assert status(x_large="x" * 4_000) == 200
        assert status("/models?" + "x" * 2 * URL_BYTES_MAX) in (400, 414)
        assert status(**{f"x-large-{number}": "x" * 7_000 for number in range(HEAD_BYTES_MAX // 7_000 + 2)}) in (400, 431, None)

        # A head that says that it brings too much is answered before anything is brought.
        with closing(fleet.front.connect()) as connection:
            connection.sendall(head("POST", GENERATIONS, [("Host", "x"), JSON_TYPE, ("Content-Length", "100000000")]))
            assert connection.recv(65_536).startswith(b"HTTP/1.1 413 ")
        assert not fleet.crew.simulator.requests()


# More than a worker of nginx has room for as Debian sets it up. HAProxy has room for 8,000: the test leaves it fewer.
SILENT = {"nginx": 2 * 768, "haproxy": 300}
FEWER = {"nginx": {}, "haproxy": {"maxconn 8000": "maxconn 250"}}
BY_ADDRESS = 200


def test_one_address_that_says_nothing_does_not_shut_out_the_others(kind: str, postgres_database: str, tmp_path: Path) -> None:
    with running_fleet(kind, postgres_database, tmp_path, FEWER[kind]) as fleet, ExitStack() as silent:
        connections = [silent.enter_context(silent_client(fleet.front.port)) for _ in range(SILENT[kind])]
        # Only what is turned away says so, and that at once.
        if kind == "haproxy":
            wait_for(lambda: sum(map(is_open, connections)) == BY_ADDRESS or None)
        assert order(fleet) == 200
        assert sum(map(is_open, connections)) == (BY_ADDRESS if kind == "haproxy" else SILENT[kind]), "nobody made room"


def silent_client(port: int) -> socket.socket:
    """A connection from another address of this machine; it may have been ended already."""
    connection = socket.socket()
    connection.settimeout(PATIENCE_SECONDS)
    connection.bind(("127.0.0.2", 0))
    with suppress(ConnectionResetError):
        connection.connect(("127.0.0.1", port))
    return connection


def is_open(connection: socket.socket) -> bool:
    """Whether the other side, which has nothing to say, has not ended it."""
    connection.setblocking(False)
    try:
        connection.recv(1)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
def test_a_client_of_haproxy_may_be_silent_while_its_image_is_made(
    stream: bool, postgres_database: str, tmp_path: Path
) -> None:
    with running_fleet("haproxy", postgres_database, tmp_path, {"timeout client 60s": "timeout client 1s"}) as fleet:
        assert comes_whole(fleet, stream)


def test_people_sign_in_to_the_dashboard(kind: str, postgres_database: str, tmp_path: Path) -> None:
    with running_fleet(kind, postgres_database, tmp_path, admin_token=TOKEN) as fleet:
        site = f"https://127.0.0.1:{fleet.front.port}"
        with httpx2.Client(base_url=site, timeout=PATIENCE_SECONDS, trust_env=False, verify=fleet.front.tls) as browser:
            form = {"credential": TOKEN}
            assert browser.post("/dashboard/sign-in", data=form, headers={"origin": "https://elsewhere"}).status_code == 403
            answer = browser.post("/dashboard/sign-in", data=form, headers={"origin": site})
            assert (answer.status_code, answer.headers["location"]) == (303, "/dashboard")
            first = browser.get("/dashboard")
            assert first.status_code == 200
            assert "red" in first.text
            (sheet, *_) = re.findall(r'rel="stylesheet" href="([^"]+)"', first.text)
            assert browser.get(sheet).headers["content-type"].startswith("text/css")
            # What only begins like it is not for the outside.
            answer = browser.get("/dashboards")
            assert answer.status_code == 404
            assert "x-beanmeter-request-id" not in answer.headers


@pytest.mark.parametrize("port", ["", ":8443"])
def test_nginx_hands_on_the_name_that_the_browser_sent(port: str, postgres_database: str, tmp_path: Path) -> None:
    with running_fleet("nginx", postgres_database, tmp_path, admin_token=TOKEN) as fleet:
        site = f"https://images.example.com{port}"
        headers = {"host": f"images.example.com{port}", "origin": site}
        with fleet.front.client(fleet.crew.key) as client:
            url = f"https://127.0.0.1:{fleet.front.port}/dashboard/sign-in"
            assert client.post(url, data={"credential": TOKEN}, headers=headers).status_code == 303


def directives(text: str) -> dict[str, list[str]]:
    """The lines of a configuration by their first word."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        name, _, rest = line.strip().rstrip(";").partition(" ")
        found.setdefault(name, []).append(rest)
    return found


def seconds(value: str) -> int:
    assert value.endswith("s")
    return int(value.removesuffix("s"))


def test_nginx_waits_for_longer_than_an_image_takes_and_for_less_than_an_attack_needs() -> None:
    settings = Settings.model_validate({})
    text = (DEPLOY / "nginx" / "beanmeter.conf").read_text("utf-8")
    found = directives(text)
    assert (found["proxy_buffering"], found["proxy_request_buffering"]) == (["off"], ["off"])
    assert found["proxy_next_upstream"] == ["off"]
    assert "keepalive" not in found
    assert all(
        seconds(*found[name]) > settings.upstream_timeout_seconds for name in ("proxy_read_timeout", "proxy_send_timeout")
    )
    assert found["client_header_timeout"] == [f"{HEAD_SECONDS}s"]
    assert seconds(*found["keepalive_timeout"]) < IDLE_SECONDS
    assert found["client_header_buffer_size"] == [f"{URL_BYTES_MAX // 1024}k"]
    assert found["large_client_header_buffers"] == [f"{HEAD_BYTES_MAX // URL_BYTES_MAX} {URL_BYTES_MAX // 1024}k"]
    assert found["client_max_body_size"] == [f"{settings.max_body_bytes // 2**20 + 1}m"]
    # What does not fit into the file is said at its top and in the manual, letter by letter.
    manual = (DEPLOY.parent / "docs" / "deployment.md").read_text("utf-8")
    assert all(f"`{line}`" in manual for line in advised(text).splitlines())


def test_haproxy_waits_for_longer_than_an_image_takes_and_for_less_than_an_attack_needs() -> None:
    settings = Settings.model_validate({})
    text = (DEPLOY / "haproxy" / "haproxy.cfg").read_text("utf-8")
    found = directives(text)
    timeouts = dict(line.split() for line in found["timeout"])
    assert found["retries"] == ["0"]
    assert "option redispatch" in found["no"]
    assert "option http-buffer-request" in found["no"]
    assert "http-server-close" in found["option"]
    assert seconds(timeouts["server"]) > settings.upstream_timeout_seconds
    assert timeouts["http-request"] == f"{HEAD_SECONDS}s"
    assert seconds(timeouts["http-keep-alive"]) < IDLE_SECONDS
    assert seconds(*found["hard-stop-after"]) > settings.upstream_timeout_seconds
    assert found["tune.http.maxhdr"] == [str(HEADERS_MAX)]
    # What is left of the buffer for a head.
    assert int(*found["tune.bufsize"]) - int(*found["tune.maxrewrite"]) == HEAD_BYTES_MAX
    assert f"url -m len gt {URL_BYTES_MAX} " in text
    assert f"req.body_size gt {settings.max_body_bytes + 2**20} " in text
