"""A provider that is down, slow, broken or wrong: nobody comes in by it, nobody waits for long, and everybody else goes on."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from proxy.pages import oidc
from proxy.pages.oidc import ANSWER_BYTES_MAX
from tests.pages.house import House, open_house
from tests.pages.provider import (
    ADMIN,
    DISCOVERY,
    KEYS,
    Provider,
    a_provider,
    causes,
    go_to,
    is_in,
    refused,
    sign_in_with,
    signed,
)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[House, Provider]]:
    directory = tmp_path_factory.mktemp("house")
    with (
        a_provider() as provider,
        open_house(f"sqlite:///{directory / 'books.db'}", directory, **provider.settings()) as house,
    ):
        provider.sites.add(house.site)
        yield house, provider


@pytest.fixture
def shaky(running: tuple[House, Provider], monkeypatch: pytest.MonkeyPatch) -> tuple[House, Provider]:
    """A gateway that believes nothing that its provider said for longer than a moment."""
    monkeypatch.setattr(oidc, "FRESH_SECONDS", 0)
    running[1].reset()
    running[1].person = ADMIN
    return running


UNWELL: dict[str, dict[str, Any]] = {
    "500": {"statuses": 500},
    "a redirect, which is not followed": {"statuses": 302},
    "no JSON": {"bodies": b"<html>"},
    "no object": {"bodies": b"[]"},
    "nothing": {"bodies": b""},
    "deeper than anything": {"bodies": b'{"a":' * 50_000},
    "more than anybody needs": {"bodies": b'{"a": "' + b"x" * ANSWER_BYTES_MAX + b'"}'},
}


@pytest.mark.parametrize("path", [DISCOVERY, "/token", "/keys"])
@pytest.mark.parametrize("illness", UNWELL)
def test_an_answer_that_cannot_be_used(shaky: tuple[House, Provider], log: io.StringIO, illness: str, path: str) -> None:
    house, provider = shaky
    for kind, value in UNWELL[illness].items():
        getattr(provider, kind)[path] = value
    visitor = house.visitor()
    answer = visitor.get("/sign-in/oidc" if path == DISCOVERY else go_to(visitor))
    assert "can't be asked now" in refused(answer, visitor, 502)
    assert len(causes(log)) == 1
    assert provider.asked[path] == 1, "nothing is asked twice"
    getattr(provider, kind).clear()
    sign_in_with(visitor)


@pytest.mark.parametrize(
    ("metadata", "cause"),
    [
        ({"issuer": "https://elsewhere.example/"}, "set BEANMETER_OIDC_ISSUER to that"),
        ({"issuer": None}, "set BEANMETER_OIDC_ISSUER to that"),
        ({"token_endpoint": None}, "names no token_endpoint with https"),
        ({"token_endpoint": "http://elsewhere.example/token"}, "names no token_endpoint with https"),
        ({"jwks_uri": "file:///etc/passwd", "authorization_endpoint": 1}, "no authorization_endpoint and no jwks_uri"),
        ({"authorization_endpoint": "javascript:alert(1)"}, "names no authorization_endpoint with https"),
        ({"authorization_endpoint": "https://user@elsewhere.example/"}, "names no authorization_endpoint with https"),
        ({"authorization_endpoint": "https://[/"}, "names no authorization_endpoint with https"),
    ],
)
def test_a_provider_that_describes_itself_oddly(
    shaky: tuple[House, Provider], log: io.StringIO, metadata: dict[str, Any], cause: str
) -> None:
    house, provider = shaky
    provider.metadata = metadata
    visitor = house.visitor()
    refused(visitor.get("/sign-in/oidc"), visitor, 502)
    (found,) = causes(log)
    assert cause in found


@pytest.mark.parametrize(
    "odd",
    [
        {"kty": "AKP", "kid": "post-quantum"},
        {"kty": "RSA", "kid": "broken", "n": "!", "e": "AQAB"},
        {"kty": "RSA", "kid": "half"},
        # Neither is for signatures, whatever it is called.
        {"kty": "oct", "kid": "key-1", "k": "AAAA"},
        {**KEYS[0].as_dict(private=False), "kid": "key-1", "use": "enc"},
        "no key at all",
    ],
)
def test_a_key_that_is_not_understood_is_passed_over(shaky: tuple[House, Provider], odd: Any) -> None:
    house, provider = shaky
    provider.bodies["/keys"] = json.dumps({"keys": [odd, KEYS[1].as_dict(private=False)]}).encode()
    provider.token = lambda ours: signed(ours, KEYS[1])
    sign_in_with(house.visitor())


def test_a_provider_elsewhere_cannot_lead_to_plain_http_nor_to_this_host() -> None:
    for url in ("http://127.0.0.1:8080/", "http://localhost/", "http://login.example.com/token"):
        assert not oidc._is_endpoint(url, "https://login.example.com")
    assert oidc._is_endpoint("https://tokens.example.com/token", "https://login.example.com")


def test_a_provider_that_is_down(tmp_path: Path, log: io.StringIO) -> None:
    with a_provider() as provider:
        settings = provider.settings()
    with open_house(f"sqlite:///{tmp_path / 'books.db'}", tmp_path, **settings) as house:
        visitor = house.visitor()
        assert "can't be asked now" in refused(visitor.get("/sign-in/oidc"), visitor, 502)
        # Others come in as before.
        assert house.operator().get("/audit").status_code == 200
    (cause,) = causes(log)
    assert cause.startswith("the provider can't be reached")


def test_signing_out_ends_the_session_while_the_provider_is_away(shaky: tuple[House, Provider], log: io.StringIO) -> None:
    house, provider = shaky
    visitor = house.visitor()
    sign_in_with(visitor)
    provider.statuses[DISCOVERY] = 500
    assert visitor.post("/sign-out").headers["location"] == "/dashboard/sign-in?said=signed_out"
    assert not is_in(visitor)
    assert "provider_sign_out_failed" in log.getvalue()


def test_the_doctor_looks_at_the_provider(tmp_path: Path) -> None:
    with a_provider() as provider:
        environment = {**os.environ, **provider.settings()}

        def finding() -> dict[str, Any]:
            command = [sys.executable, "-m", "proxy.cli", "doctor", "--json"]
            ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
            (found,) = [one for one in json.loads(ran.stdout) if one["check"] == "identity provider"]
            return found  # type: ignore[no-any-return]

        assert finding() == {"check": "identity provider", "ok": True, "message": f"{provider.issuer} describes itself"}
        provider.metadata = {"issuer": "https://elsewhere.example"}
        found = finding()
        assert (found["ok"], "set BEANMETER_OIDC_ISSUER to that" in found["message"]) == (False, True)


@pytest.mark.parametrize("path", [DISCOVERY, "/token", "/keys"])
def test_a_provider_that_is_slow(
    shaky: tuple[House, Provider], log: io.StringIO, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    house, provider = shaky
    visitor = house.visitor()
    back = "" if path == DISCOVERY else go_to(visitor)
    provider.delays[path] = 60
    monkeypatch.setattr(oidc, "SECONDS_MAX", 0.3)
    refused(visitor.get(back or "/sign-in/oidc"), visitor, 502)
    (cause,) = causes(log)
    assert cause.startswith("the provider did not answer within")


def test_a_crowd_does_not_wait_for_a_slow_provider(tmp_path: Path, log: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oidc, "AT_ONCE_MAX", 2)
    with a_provider() as provider, open_house(f"sqlite:///{tmp_path / 'books.db'}", tmp_path, **provider.settings()) as house:
        provider.delays[DISCOVERY] = 60
        url = f"{house.site}/dashboard/sign-in/oidc"
        statuses: list[int] = []
        waiting = [
            threading.Thread(target=lambda: statuses.append(httpx2.get(url, trust_env=False, timeout=60).status_code))
            for _ in range(2)
        ]
        for one in waiting:
            one.start()
        while provider.asked[DISCOVERY] < 2:
            time.sleep(0.01)
        assert httpx2.get(url, trust_env=False).status_code == 502
        assert provider.asked[DISCOVERY] == 2
        assert causes(log) == ["2 sign-ins at once wait for the provider already"]
        provider.released.set()
        for one in waiting:
            one.join()
        assert statuses == [303, 303]
