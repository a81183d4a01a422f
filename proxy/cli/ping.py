"""``beanmeter ping``: does the gateway that runs here serve? Asks the running process over HTTP, and nothing else."""

from __future__ import annotations

import http.client
from typing import TYPE_CHECKING, Annotated
from urllib.parse import urlsplit

import typer

from proxy.cli.arguments import read
from proxy.cli.failures import Failed
from proxy.cli.opening import read_settings

if TYPE_CHECKING:
    from proxy.settings import Settings

# A gateway that is well answers in milliseconds; one whose database is stuck gives up on it after five seconds.
ANSWER_SECONDS = 8

# What the gateway says about itself is one line; another server may answer with anything.
ANSWER_BYTES_MAX = 500

# Where a server listens on every address, this is one of them.
LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - they are asked, not listened on


def ping(
    url: Annotated[
        str | None, typer.Option(metavar="URL", help="The gateway to ask.  [default: BEANMETER_HOST and BEANMETER_PORT]")
    ] = None,
    live: Annotated[
        bool, typer.Option("--live", help="Ask only whether the process lives, not whether it can take requests.")
    ] = False,
) -> None:
    """Ask the running gateway whether it can take requests."""
    where = _address(read_settings()) if url is None else url
    connection = read("--url", lambda: _connection(where))
    try:
        connection.request("GET", "/livez" if live else "/readyz")
        answer = connection.getresponse()
        said = answer.read(ANSWER_BYTES_MAX).decode("utf-8", "replace").strip()
    except (OSError, http.client.HTTPException) as error:
        # A name that can't be resolved, a certificate that can't be checked and a silent host are OSErrors too.
        raise Failed(f"no gateway answers at {where} ({str(error) or type(error).__name__}): is it running there?") from None
    finally:
        connection.close()
    if answer.status != http.client.OK:
        raise Failed(f"{where} answers HTTP {answer.status}: {said or 'without a word'}")


def _address(settings: Settings) -> str:
    if not settings.port:
        raise Failed("BEANMETER_PORT is 0, so the port is the system's choice: say where the gateway listens with --url")
    host = LOOPBACK.get(settings.host, settings.host)
    return f"http://[{host}]:{settings.port}" if ":" in host else f"http://{host}:{settings.port}"


def _connection(url: str) -> http.client.HTTPConnection:
    """A connection to the gateway of ``url``, whatever its path. Raises ``ValueError``."""
    expected = "expected an http or https URL with a host, such as http://127.0.0.1:8080"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise ValueError(expected) from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(expected)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    return kind(parts.hostname, port, timeout=ANSWER_SECONDS)
