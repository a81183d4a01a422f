"""A stretch of network between a program and PostgreSQL, which can be cut exactly around a COMMIT."""

from __future__ import annotations

import socket
import threading
from typing import Literal, Self

from sqlalchemy import make_url

# The COMMIT is lost on its way; it arrives and its answer is lost; it arrives only after the client has given up.
Cut = Literal["before", "after", "late"]

_COMMIT = b"COMMIT\0"

# The protocol's two messages that are answered at once: sync, and a query by itself.
_AWAITED = b"SQ"

# Before the first message that has a type comes the one that asks for this protocol; there may be others before it.
_PROTOCOL_3 = 3


class _Link:
    """One connection and its two directions."""

    def __init__(self, wire: Wire, client: socket.socket, server: socket.socket) -> None:
        self.wire, self.client, self.server = wire, client, server
        self.muffled = False
        self.silent = False
        self._unread = b""
        self._typed = False
        for pump in (self._to_server, self._to_client):
            threading.Thread(target=pump, daemon=True).start()

    def _to_server(self) -> None:
        try:
            while data := self.client.recv(65_536):
                if self.silent:
                    continue
                self._count(data)
                if _COMMIT in data and (cut := self.wire.take_cut()):
                    self._cut(cut, data)
                    return
                self.server.sendall(data)
        except OSError:
            pass
        if not self.muffled:
            self.close()

    def _to_client(self) -> None:
        try:
            while data := self.server.recv(65_536):
                if self.silent:
                    continue
                if not self.muffled:
                    self.client.sendall(data)
                elif _COMMIT in data:
                    break
        except OSError:
            pass
        self.close()

    def _count(self, data: bytes) -> None:
        """Read the messages, each of which is its length and what it says, most of them behind the letter of their type."""
        self._unread += data
        while len(self._unread) >= 5:
            start = 1 if self._typed else 0
            end = start + int.from_bytes(self._unread[start : start + 4], "big")
            if len(self._unread) < end:
                return
            if self._typed:
                self.wire.waits += self._unread[0] in _AWAITED
            else:
                self._typed = int.from_bytes(self._unread[4:6], "big") == _PROTOCOL_3
            self._unread = self._unread[end:]

    def _cut(self, cut: Cut, data: bytes) -> None:
        if cut == "before":
            self.close()
            return
        self.muffled = True
        if cut == "late":
            self.client.shutdown(socket.SHUT_RDWR)
            self.wire.delivery.wait()
        self.server.sendall(data)

    def close(self) -> None:
        for end in (self.client, self.server):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass


class Wire:
    """Listens on loopback and passes on to a database's server; ``url`` leads through it."""

    def __init__(self, database_url: str) -> None:
        parsed = make_url(database_url)
        self._server = (parsed.host, parsed.port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        port = self._listener.getsockname()[1]
        self.url = parsed.set(host="127.0.0.1", port=port).render_as_string(hide_password=False)
        self._cut: Cut | None = None
        self._spare = 0
        self._stay_down = False
        # How often the client said that it waits for what it has asked for by then.
        self.waits = 0
        # While it is down, connections are closed as soon as they are made.
        self.down = False
        self._links: list[_Link] = []
        self.delivery = threading.Event()
        self._thread = threading.Thread(target=self._accept, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()
        self.delivery.set()
        for link in self._links:
            link.close()
            link.client.close()
            link.server.close()

    def cut_next_commit(self, cut: Cut, *, spare: int = 0, stay_down: bool = False) -> None:
        """Cut the next COMMIT that comes by, or the one after so many that are spared; and stay down."""
        self._cut, self._spare, self._stay_down = cut, spare, stay_down

    def take_cut(self) -> Cut | None:
        """What is to become of the COMMIT that has just come by."""
        if self._cut is None or self._spare:
            self._spare = max(0, self._spare - 1)
            return None
        cut, self._cut = self._cut, None
        self.down = self._stay_down
        return cut

    def fall_silent(self) -> None:
        """From now on nothing comes through on the connections that are there, and none ends; new ones are as before."""
        for link in self._links:
            link.silent = True

    def deliver(self) -> None:
        """Let a late COMMIT arrive now."""
        self.delivery.set()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self.down:
                client.close()
            else:
                self._links.append(_Link(self, client, socket.create_connection(self._server)))
