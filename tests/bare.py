"""HTTP on a bare socket: requests as any bytes, answers as they came. For what a client library would tidy up or refuse."""

from __future__ import annotations

import http.client
import io
import json
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tests.live import ORDER, LiveGateway

JSON_TYPE = ("Content-Type", "application/json")

GENERATIONS = "/v1/images/generations"
EDITS = "/v1/images/edits"


@dataclass(frozen=True)
class Reply:
    """An answer, with header names in lower case and in their order."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes

    def values(self, name: str) -> list[str]:
        return [value for key, value in self.headers if key == name]

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.headers]

    @property
    def error(self) -> dict[str, Any]:
        """The refusal's own part of the envelope."""
        envelope = json.loads(self.body)
        assert list(envelope) == ["error"]
        error: dict[str, Any] = envelope["error"]
        return error


def head(method: str, target: str, headers: Iterable[tuple[str, str]]) -> bytes:
    """A request's head, as it is given and with nothing added."""
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers)
    return f"{method} {target} HTTP/1.1\r\n{lines}\r\n".encode("latin-1")


def request(
    method: str, target: str, headers: Iterable[tuple[str, str]] = (), body: bytes = b"", key: str | None = None
) -> bytes:
    """A whole request with a Host, framed by its length; with a key, that of the caller."""
    own = [("Host", "gateway.test")]
    if key is not None:
        own.append(("Authorization", f"Bearer {key}"))
    return head(method, target, [*own, *headers, ("Content-Length", str(len(body)))]) + body


def post(key: str, body: bytes, target: str = GENERATIONS, headers: Sequence[tuple[str, str]] = (JSON_TYPE,)) -> bytes:
    """A whole POST of an order."""
    return request("POST", target, headers, body, key)


def order(**changes: Any) -> bytes:
    """The usual order in JSON, with these members instead of its own."""
    return json.dumps({**ORDER, **changes}).encode()


def send(gateway: LiveGateway, data: bytes, answers: int = 1, method: str = "POST") -> list[Reply]:
    """What comes back for these bytes on a connection of their own: so many answers, or fewer where it is closed."""
    with gateway.connect() as connection:
        try:
            connection.sendall(data)
        except OSError:
            pass  # It was closed before all was sent, perhaps with an answer.
        incoming = Incoming(connection)
        replies: list[Reply] = []
        while len(replies) < answers and (reply := incoming.reply(method)) is not None:
            replies.append(reply)
        return replies


def ask(gateway: LiveGateway, data: bytes) -> Reply:
    """The one answer to these bytes."""
    (reply,) = send(gateway, data, method=data.partition(b" ")[0].decode())
    return reply


class Incoming(io.BufferedReader):
    """What comes in on a connection, for one answer after the other to be read from."""

    def __init__(self, connection: socket.socket) -> None:
        super().__init__(connection.makefile("rb", buffering=0))

    def makefile(self, _mode: str) -> Incoming:
        return self

    def close(self) -> None:
        """Does nothing: an answer closes what it was read from, and another may follow it."""

    def reply(self, method: str = "POST") -> Reply | None:
        """The next answer, ``None`` where the connection ends before one is whole."""
        answer = http.client.HTTPResponse(self, method=method)  # type: ignore[arg-type]
        try:
            answer.begin()
            body = answer.read()
        except (http.client.HTTPException, OSError):
            return None
        return Reply(answer.status, [(name.lower(), value) for name, value in answer.getheaders()], body)
