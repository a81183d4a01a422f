"""A small OpenID provider on loopback, with keys of its own: it signs in whoever it is told to, and lies where a test wants
it to. It checks what a provider has to: the client, its secret, the redirect URL, PKCE, and that a code is used once."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from html import unescape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, parse_qsl, unquote_plus, urlencode, urlsplit

import httpx2
from joserfc import jwt
from joserfc.jwk import KeySet, RSAKey

from tests.pages.house import Visitor, text_of

# With signs that have to be written in another way in a head, and in a form.
CLIENT_ID = "beanmeter:at+home"
CLIENT_SECRET = "a:secret/with+odd&signs%in=it"

# Made once: a key takes a moment.
KEYS = [RSAKey.generate_key(2048, {"kid": f"key-{number}", "use": "sig", "alg": "RS256"}) for number in range(2)]

Claims = dict[str, Any]

DISCOVERY = "/realms/home/.well-known/openid-configuration"

ADMIN: Claims = {"sub": "ada-1", "email": "ada@example.com", "groups": ["staff", "admins"]}


def unsigned(header: dict[str, Any], claims: Claims) -> tuple[str, bytes]:
    """The two parts of a token that a signature is made of, and their bytes."""
    parts = (base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=").decode() for part in (header, claims))
    text = ".".join(parts)
    return text, text.encode()


def signed(claims: Claims, key: RSAKey = KEYS[0], algorithm: str = "RS256") -> str:
    return jwt.encode({"alg": algorithm, "kid": key.kid, "typ": "JWT"}, dict(claims), key, algorithms=[algorithm])


@dataclass
class Provider:
    """The provider, and how it behaves now. ``person`` is who is at its browser; ``token`` makes an ID token of claims."""

    port: int
    person: Claims = field(default_factory=lambda: {"sub": "ada-1", "email": "ada@example.com", "groups": ["staff"]})
    secret: str | None = CLIENT_SECRET
    keys: list[RSAKey] = field(default_factory=lambda: [KEYS[0]])
    token: Callable[[Claims], str] = signed
    metadata: dict[str, Any] = field(default_factory=dict)
    # By path: answer these bytes instead, after this many seconds, or with this status.
    bodies: dict[str, bytes] = field(default_factory=dict)
    delays: dict[str, float] = field(default_factory=dict)
    statuses: dict[str, int] = field(default_factory=dict)
    sites: set[str] = field(default_factory=set)
    asked: Counter[str] = field(default_factory=Counter)
    codes: dict[str, dict[str, str]] = field(default_factory=dict)
    ended: list[dict[str, str]] = field(default_factory=list)
    released: threading.Event = field(default_factory=threading.Event)

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def issuer(self) -> str:
        # A path and a slash at the end, as providers have them.
        return f"{self.origin}/realms/home/"

    def settings(self, **more: str) -> dict[str, str]:
        """What a gateway has to be told."""
        ours = {"ISSUER": self.issuer, "CLIENT_ID": CLIENT_ID, "ADMIN_VALUES": "admins,owners"}
        ours |= {"VIEWER_VALUES": "finance", "TEAM_CLAIM": "beanmeter.teams"}
        if self.secret is not None:
            ours["CLIENT_SECRET"] = self.secret
        return {f"BEANMETER_OIDC_{name}": value for name, value in {**ours, **more}.items()}

    def describe(self) -> dict[str, Any]:
        return {
            "issuer": self.issuer,
            "authorization_endpoint": f"{self.origin}/authorize?realm=home",
            "token_endpoint": f"{self.origin}/token",
            "jwks_uri": f"{self.origin}/keys",
            "end_session_endpoint": f"{self.origin}/end-session",
            "response_types_supported": ["code"],
            "subject_types_supported": ["public"],
            "id_token_signing_alg_values_supported": ["RS256"],
            "authorization_response_iss_parameter_supported": True,
            **self.metadata,
        }

    def claims(self, asked: dict[str, str]) -> Claims:
        now = int(time.time())
        about = {"iss": self.issuer, "aud": asked["client_id"], "iat": now, "exp": now + 300, "nonce": asked["nonce"]}
        return {**about, **self.person}

    def authorize(self, asked: dict[str, str]) -> str:
        """Where the browser goes from the login page. A request that is wrong ends the test: providers show a page for it."""
        assert asked["realm"] == "home"
        assert asked["client_id"] == CLIENT_ID
        assert asked["response_type"] == "code"
        assert "openid" in asked["scope"].split()
        assert asked["redirect_uri"] in {f"{site}/dashboard/sign-in/oidc/callback" for site in self.sites}, asked
        assert asked["code_challenge_method"] == "S256"
        assert len(asked["code_challenge"]) == 43
        code = secrets.token_urlsafe(16)
        self.codes[code] = asked
        back = {"code": code, "state": asked["state"], "iss": self.issuer}
        return f"{asked['redirect_uri']}?{urlencode(back)}"

    def redeem(self, form: dict[str, str], authorization: str) -> tuple[int, dict[str, Any]]:
        client_id, secret = form.get("client_id"), form.get("client_secret")
        if authorization:
            pair = base64.b64decode(authorization.removeprefix("Basic ")).decode().split(":")
            client_id, secret = (unquote_plus(part) for part in pair)
        if (client_id, secret) != (CLIENT_ID, self.secret):
            return 401, {"error": "invalid_client"}
        asked = self.codes.pop(form["code"], None)
        challenge = base64.urlsafe_b64encode(hashlib.sha256(form["code_verifier"].encode()).digest()).rstrip(b"=").decode()
        if asked is None or challenge != asked["code_challenge"] or form["redirect_uri"] != asked["redirect_uri"]:
            return 400, {"error": "invalid_grant"}
        assert form["grant_type"] == "authorization_code"
        return 200, {"access_token": "unused", "token_type": "Bearer", "id_token": self.token(self.claims(asked))}

    def reset(self) -> None:
        """As it was when it was made, with what it has counted."""
        fresh = Provider(self.port)
        for name in ("person", "keys", "token", "metadata", "bodies", "delays", "statuses", "ended", "asked"):
            setattr(self, name, getattr(fresh, name))


def go_to(visitor: Visitor) -> str:
    """Begin to sign in, and let the person agree; the way back."""
    begun = visitor.get("/sign-in/oidc")
    assert begun.status_code == 303, begun.text
    return agree(visitor, begun.headers["location"])


def agree(visitor: Visitor, url: str) -> str:
    """Let the person agree at the provider; where that sends the browser back to, as a path of the site."""
    page = httpx2.get(url, trust_env=False)
    assert page.status_code == 200, page.text
    back = unescape(page.text.split('href="')[1].split('"')[0])
    assert back.startswith(f"{visitor.site}/dashboard/")
    return back.removeprefix(f"{visitor.site}/dashboard")


def sign_in_with(visitor: Visitor) -> httpx2.Response:
    """Sign in by way of the provider; the page that is shown first."""
    answer = visitor.get(go_to(visitor))
    assert (answer.status_code, answer.headers.get("location")) == (303, "/dashboard"), answer.text
    first = visitor.get("")
    if first.status_code == 303:
        first = visitor.get(first.headers["location"].removeprefix("/dashboard"))
    assert first.status_code == 200, first.text
    return first


def causes(log: io.StringIO) -> list[str]:
    lines = [json.loads(line) for line in log.getvalue().splitlines()]
    return [line["cause"] for line in lines if line["event"] == "sign_in_failed"]


def is_in(visitor: Visitor) -> bool:
    """Whether somebody is signed in."""
    return visitor.get("/prices").status_code == 200


def refused(answer: httpx2.Response, visitor: Visitor, status: int = 403) -> str:
    """What a visitor is told who was not signed in; nothing of the provider and the settings among it."""
    assert answer.status_code == status, answer.text
    assert not is_in(visitor)
    told = text_of(answer.text)
    for secret in ("ID token", "BEANMETER", "claim", "endpoint", CLIENT_ID, CLIENT_SECRET, "127.0.0.1"):
        assert secret not in told
    return told


class _Handler(BaseHTTPRequestHandler):
    provider: Provider
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        asked = dict(parse_qsl(parts.query))
        provider = self.provider
        if self._interrupted(parts.path):
            return
        if parts.path == DISCOVERY:
            self._json(200, provider.describe())
        elif parts.path == "/keys":
            self._json(200, KeySet(list(provider.keys)).as_dict(private=False))
        elif parts.path == "/authorize":
            # A person presses a button here; whoever is no browser follows the link.
            link = provider.authorize(asked).replace("&", "&amp;")
            page = (
                f'<!doctype html><title>Provider</title><a id="continue" href="{link}">Continue as {provider.person["sub"]}</a>'
            )
            self._answer(200, "text/html", page.encode())
        elif parts.path == "/end-session":
            provider.ended.append(asked)
            assert asked["post_logout_redirect_uri"] in {f"{site}/dashboard/sign-in" for site in provider.sites}
            page = (
                f'<!doctype html><title>Provider</title><a id="back" href="{asked["post_logout_redirect_uri"]}">Signed out</a>'
            )
            self._answer(200, "text/html", page.encode())
        elif parts.path == "/favicon.ico":
            # Browsers ask for one, and complain where there is none.
            self._answer(204, "image/svg+xml", b"")
        else:
            self._answer(404, "text/plain", b"")

    def do_POST(self) -> None:
        form = parse_qs(self.rfile.read(int(self.headers["content-length"])).decode())
        if self._interrupted(self.path):
            return
        status, found = self.provider.redeem(
            {name: value for name, (value,) in form.items()}, self.headers["authorization"] or ""
        )
        self._json(status, found)

    def _interrupted(self, path: str) -> bool:
        provider = self.provider
        provider.asked[path] += 1
        if path in provider.delays:
            provider.released.wait(provider.delays[path])
        if path in provider.bodies or path in provider.statuses:
            self._answer(provider.statuses.get(path, 200), "application/json", provider.bodies.get(path, b"{}"))
            return True
        return False

    def _json(self, status: int, value: Any) -> None:
        self._answer(status, "application/json", json.dumps(value).encode())

    def _answer(self, status: int, kind: str, body: bytes) -> None:
        try:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            if status in (301, 302, 307):
                self.send_header("Location", self.provider.origin + "/keys")
            self.end_headers()
            self.wfile.write(body)
        except ConnectionError:
            # Who asked has had enough.
            self.close_connection = True


@contextmanager
def a_provider(secret: str | None = CLIENT_SECRET) -> Iterator[Provider]:
    """A provider for as long as the block lasts."""

    class Handler(_Handler):
        pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    Handler.provider = provider = Provider(server.server_address[1], secret=secret)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield provider
    finally:
        provider.released.set()
        server.shutdown()
        server.server_close()
        thread.join()
