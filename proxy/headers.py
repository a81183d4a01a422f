"""Which headers cross the gateway, both ways. Pure; names are bytes in lower case as the server hands them in."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Headers = Sequence[tuple[bytes, bytes]]

# RFC 9110, 7.6.1: these speak of one connection, not of the message.
_HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)

# What is the caller's own business with the gateway, or is written anew for the upstream.
_NOT_UPSTREAM = frozenset(
    {
        b"accept-encoding",  # the answer has to be readable as it goes by
        b"authorization",
        b"content-length",
        b"cookie",
        b"expect",
        b"host",
        # Kept here: upstream all teams are one account, and two teams may use the same key.
        b"idempotency-key",
    }
)

# What nearly every message says of its connection, and that names no header.
_USUAL_OPTIONS = ([b"keep-alive"], [b"close"])
_NOTHING: frozenset[bytes] = frozenset()

_NOT_SENT = _HOP_BY_HOP | _NOT_UPSTREAM

# An answer's own names that only the gateway may say.
_OURS = b"x-beanmeter-"


def values(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> list[bytes]:
    """All values of a header, in order."""
    return [value for key, value in headers if key == name]


def value(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> bytes | None:
    """The first value of a header, ``None`` where there is none."""
    for key, found in headers:
        if key == name:
            return found
    return None


def to_upstream(headers: Headers, *, host: bytes, key: str, body_bytes: int, request_id: str) -> list[tuple[bytes, bytes]]:
    """The caller's end-to-end headers with the organisation's credentials, for a body of ``body_bytes``."""
    dropped = _NOT_SENT | _named_by_connection(headers)
    kept = [field for field in headers if field[0] not in dropped and not field[0].startswith(_OURS)]
    return [
        (b"host", host),
        (b"authorization", b"Bearer " + key.encode("ascii")),
        *kept,
        (b"accept-encoding", b"identity"),
        (b"content-length", b"%d" % body_bytes),
        # So that a bill or a log of the upstream can be matched with the books, whatever became of the answer.
        (b"x-beanmeter-request-id", request_id.encode("ascii")),
    ]


def to_client(headers: Headers) -> list[tuple[bytes, bytes]]:
    """The upstream's end-to-end headers, duplicates and order kept. ``content-length`` is one of them."""
    lowered = [(name.lower(), value) for name, value in headers]
    dropped = _HOP_BY_HOP | _named_by_connection(lowered)
    return [field for field in lowered if field[0] not in dropped and not field[0].startswith(_OURS)]


def bearer(headers: Headers) -> str | None:
    """The bearer token of a request; ``None`` for none, for several and for another scheme."""
    given = values(headers, b"authorization")
    if len(given) != 1:
        return None
    scheme, _, token = given[0].partition(b" ")
    if scheme.lower() != b"bearer":
        return None
    try:
        return token.strip(b" ").decode("ascii")
    except UnicodeDecodeError:
        return None


def _named_by_connection(headers: Headers) -> frozenset[bytes]:
    """What a message says to be of its connection alone; its names are in lower case."""
    options = [value for name, value in headers if name == b"connection"]
    if not options or options in _USUAL_OPTIONS:
        return _NOTHING
    named = {option.strip().lower() for value in options for option in value.split(b",")}
    # A sender can't declare away what frames the message.
    return frozenset(named - {b"content-length", b"content-type", b"close", b""})
