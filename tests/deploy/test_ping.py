"""``beanmeter ping``: what health checks ask, of a gateway that serves, one without its database, and none."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.deploy.programs import ROOT
from tests.live import live_gateway
from tests.outage import database_away


def ping(*arguments: str, **settings: str) -> tuple[int, str]:
    """Exit status and standard error; nothing may be on standard output."""
    ran = subprocess.run(
        [sys.executable, "-m", "proxy.cli", "ping", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), **{f"BEANMETER_{name.upper()}": value for name, value in settings.items()}},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ran.stdout == ""
    return ran.returncode, ran.stderr


def test_it_asks_the_process_that_runs(database_url: str, tmp_path: Path) -> None:
    with live_gateway(database_url, tmp_path) as (gateway, _):
        port = str(gateway.port)
        assert ping(port=port) == (0, "")
        assert ping("--live", port=port) == (0, "")
        # Who listens everywhere is asked on loopback.
        assert ping(host="0.0.0.0", port=port) == (0, "")
        # A base URL as the start shows it will do.
        assert ping("--url", gateway.base_url, port="1") == (0, "")
        with database_away(database_url):
            status, said = ping(port=port)
            assert (status, said.startswith(f"beanmeter: http://127.0.0.1:{port} answers HTTP 503: the ledger")) == (1, True)
            assert ping("--live", port=port) == (0, "")
    status, said = ping(port=port)
    assert status == 1
    assert f"no gateway answers at http://127.0.0.1:{port}" in said


def test_on_every_address_of_both_kinds() -> None:
    with socket.socket(socket.AF_INET6) as listener:
        try:
            listener.bind(("::1", 0))
        except OSError as error:
            pytest.skip(f"this machine has no IPv6 loopback: {error.strerror}")
        port = listener.getsockname()[1]
    status, said = ping(host="::", port=str(port))
    assert status == 1
    assert f"http://[::1]:{port}" in said


@pytest.mark.parametrize("url", ["gateway:8080", "ftp://gateway", "http://", "http://gateway:port", "http://[::1"])
def test_a_wrong_url_is_wrong_usage(url: str) -> None:
    status, said = ping("--url", url)
    assert status == 2
    assert "expected an http or https URL" in said


def test_without_a_port_it_has_to_be_told_where() -> None:
    status, said = ping(port="0")
    assert (status, "--url" in said) == (1, True)
