"""A gateway whose pages are open, and visitors who ask for them as a browser does."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from html import unescape
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx2

from proxy.app import running
from proxy.settings import load
from proxy.simulator import SimulatorOptions, running_simulator
from tests.live import ORDER, PATIENCE_SECONDS, UPSTREAM_KEY, LiveGateway, Loop, ScriptedUpstream, live_gateway

TOKEN = "the-operators-token"

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "form-action 'self'; frame-ancestors 'none'"
)


class Visitor:
    """Somebody with a browser: keeps cookies, follows nothing, and sends forms with what the last page had in them."""

    def __init__(self, site: str) -> None:
        self.site = site
        self.client = httpx2.Client(base_url=site, timeout=PATIENCE_SECONDS, trust_env=False, follow_redirects=False)
        self.csrf = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.client.close()

    def get(self, path: str, **options: Any) -> httpx2.Response:
        """A page below ``/dashboard``."""
        answer = self.client.get(f"/dashboard{path}", **options)
        found = re.search(r'name="csrf" value="([0-9a-f]+)"', answer.text)
        if found is not None:
            self.csrf = found[1]
        return answer

    def post(self, path: str, fields: dict[str, str] | None = None, **options: Any) -> httpx2.Response:
        """A form, sent from one of our pages unless ``headers`` say otherwise."""
        headers = {"origin": self.site, **options.pop("headers", {})}
        return self.client.post(f"/dashboard{path}", data={"csrf": self.csrf, **(fields or {})}, headers=headers, **options)

    def sign_in(self, credential: str) -> Self:
        answer = self.post("/sign-in", {"credential": credential})
        assert answer.status_code == 303, answer.text
        # The first page has the token that forms need.
        first = self.get("")
        if first.status_code == 303:
            self.get(first.headers["location"].removeprefix("/dashboard"))
        assert self.csrf
        return self

    def done(self, path: str, fields: dict[str, str] | None = None) -> httpx2.Response:
        """A form that has to be taken."""
        answer = self.post(path, fields)
        assert answer.status_code in (201, 303), answer.text
        return answer

    def shown(self, path: str) -> str:
        """What a page says, as text."""
        answer = self.get(path)
        assert answer.status_code == 200, answer.text
        return text_of(answer.text)


def text_of(html: str) -> str:
    """A page's words, with one blank between them."""
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", html)).split())


def error_at(html: str, name: str) -> str:
    """What a page says at the field of that name, which has to be marked as wrong."""
    found = re.search(rf'<(?:input|select)[^>]*name="{name}"[^>]*aria-invalid="true"[^>]*aria-describedby="([^"]+)"', html)
    assert found is not None, f"no field {name!r} is marked"
    told = re.search(rf'<small id="{re.escape(found[1])}"[^>]*>([^<]+)<', html)
    assert told is not None
    return unescape(told[1])


@dataclass
class House:
    """A live gateway with the team ``red``, and whoever comes to look at it."""

    gateway: LiveGateway
    upstream: ScriptedUpstream
    visitors: list[Visitor] = field(default_factory=list)

    @property
    def site(self) -> str:
        return self.gateway.base_url.removesuffix("/v1")

    def visitor(self) -> Visitor:
        self.visitors.append(Visitor(self.site))
        return self.visitors[-1]

    def operator(self) -> Visitor:
        return self.visitor().sign_in(TOKEN)

    def member(self, key: str = "") -> Visitor:
        return self.visitor().sign_in(key or self.gateway.key)

    def order(self, key: str = "", **fields: Any) -> httpx2.Response:
        headers = {"authorization": f"Bearer {key or self.gateway.key}"}
        return self.gateway.client.post("/images/generations", json={**ORDER, **fields}, headers=headers)

    def review(self) -> dict[str, Any]:
        """A charge that nobody knows the cost of."""

        async def break_off(conversation: Any) -> None:
            await conversation.reset()

        script, self.upstream.script = self.upstream.script, break_off
        answer = self.order()
        self.upstream.script = script
        charge = self.gateway.charge_when_ended(answer.headers["x-beanmeter-request-id"])
        assert charge["state"] == "review"
        return charge


@contextmanager
def open_house(database_url: str, directory: Path, **settings: str) -> Iterator[House]:
    with live_gateway(database_url, directory, {"BEANMETER_ADMIN_TOKEN": TOKEN, **settings}) as (gateway, upstream):
        house = House(gateway, upstream)
        try:
            yield house
        finally:
            for visitor in house.visitors:
                visitor.client.close()


@contextmanager
def serving(
    database_url: str,
    directory: Path,
    token: str = TOKEN,
    options: SimulatorOptions | None = None,
    settings: Mapping[str, str] | None = None,
) -> Iterator[str]:
    """A gateway on books that are there, in front of a simulated BeansAI; its address."""
    loop = Loop()
    simulated = running_simulator(options)
    simulator = loop.run(simulated.__aenter__())
    environment = {
        "BEANMETER_UPSTREAM_URL": simulator.base_url,
        "BEANMETER_UPSTREAM_KEY": UPSTREAM_KEY,
        "BEANMETER_DATABASE_URL": database_url,
        "BEANMETER_STATE_DIR": str(directory),
        "BEANMETER_ADMIN_TOKEN": token,
        **(settings or {}),
    }
    gateway = running(load(environment, directory), "127.0.0.1", 0)
    try:
        yield loop.run(gateway.__aenter__()).removesuffix("/v1")
    finally:
        loop.run(gateway.__aexit__(None, None, None))
        loop.run(simulated.__aexit__(None, None, None))
        loop.close()
