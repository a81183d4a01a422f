"""How an OpenID provider is spoken to: the authorization code flow with PKCE. The only file that knows Authlib; it is loaded
where the settings name a provider, and not otherwise."""

from __future__ import annotations

import asyncio
import base64
import json
import ssl
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from urllib.parse import quote_plus, urlsplit

import httpx2
from authlib.common.urls import add_params_to_uri
from authlib.oauth2.rfc6749.parameters import prepare_grant_uri
from authlib.oauth2.rfc7636 import create_s256_code_challenge
from authlib.oidc.core import CodeIDToken
from authlib.oidc.discovery import get_well_known_url
from joserfc import jwt
from joserfc.errors import BadSignatureError, ClaimError, InvalidKeyIdError, JoseError
from joserfc.jwk import Key, KeySet, import_key
from joserfc.jws import JWSRegistry

from proxy.pages.identity import Attempt, Away, Refused
from proxy.settings import PREFIX, OpenID, is_safe

# All that one sign-in asks of the provider. A person waits for it, and a provider that is well takes a tenth of a second.
SECONDS_MAX = 10.0

# A set of keys, or a token with hundreds of groups, is far smaller. What is larger is something else.
ANSWER_BYTES_MAX = 256 * 1024

# Anybody may begin to sign in: a crowd must neither fill the memory here nor flood the provider.
AT_ONCE_MAX = 16

# For how long what the provider says of itself is believed. Keys that are not among those known are asked for at once.
FRESH_SECONDS = 3_600

# How far the provider's clock may be from ours.
LEEWAY_SECONDS = 30

# More keys than any provider signs with at a time.
KEYS_MAX = 100

# Signatures that nobody but the provider can make. With "none" anybody could, and with HS256 whoever has the client's secret,
# or a public key where one is taken for a secret.
ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "Ed25519", "EdDSA")
KEY_TYPES = ("RSA", "EC", "OKP")

_NEEDED = ("authorization_endpoint", "token_endpoint", "jwks_uri")
_ENDING = "end_session_endpoint"

_SETTING = f"{PREFIX}OIDC_"

# What to do about the answers that are defined for both ways of asking. Others are told as they are.
_ADVICE = {
    "access_denied": "it did not let this person in: look there whether the client is meant for them",
    "invalid_client": f"it does not take {_SETTING}CLIENT_ID with {_SETTING}CLIENT_SECRET",
    "invalid_grant": "the code was used before, is too old, or was given for another redirect URL",
    "invalid_scope": f"it does not know one of {_SETTING}SCOPES, or not for this client",
    "unauthorized_client": "allow the authorization code flow for this client there",
    "unsupported_response_type": "allow the authorization code flow for this client there",
    "unsupported_grant_type": "allow the authorization code flow for this client there",
}


@dataclass(frozen=True, slots=True)
class _Metadata:
    """What the provider says of itself, as far as it is needed here."""

    authorization_endpoint: str
    token_endpoint: str
    jwks_uri: str
    end_session_endpoint: str | None
    names_itself: bool
    wants_secret_in_body: bool


class Provider:
    """The provider that the settings name. What it says of itself is remembered for an hour."""

    def __init__(self, terms: OpenID) -> None:
        self.terms = terms
        # Reading the system's certificates takes a moment: once, and not for each sign-in.
        self._tls = httpx2.create_ssl_context()
        self._places = asyncio.Semaphore(AT_ONCE_MAX)
        self._metadata: _Metadata | None = None
        self._metadata_until = 0.0
        self._keys: KeySet | None = None
        self._keys_until = 0.0

    async def check(self) -> None:
        """Whether it is there and describes itself so that it can be used. Raises :class:`Away`."""
        async with self._conversation() as client:
            await self._describe(client)

    async def begin(self, redirect_url: str, attempt: Attempt) -> str:
        """The URL where the browser is sent to. Raises :class:`Away`."""
        async with self._conversation() as client:
            metadata = await self._describe(client)
        url: str = prepare_grant_uri(
            metadata.authorization_endpoint,
            self.terms.client_id,
            "code",
            redirect_url,
            self.terms.scopes,
            attempt.state,
            nonce=attempt.nonce,
            code_challenge=create_s256_code_challenge(attempt.verifier),
            code_challenge_method="S256",
        )
        return url

    async def finish(self, redirect_url: str, attempt: Attempt, answer: Mapping[str, str], now: datetime) -> Mapping[str, Any]:
        """The claims of the person who came back with ``answer`` in the query; the caller has compared its state. Raises
        :class:`Away` and :class:`Refused`."""
        async with self._conversation() as client:
            metadata = await self._describe(client)
            code = self._code_of(answer, metadata)
            token = await self._redeem(client, metadata, code, redirect_url, attempt.verifier)
            return await self._verify(client, metadata, token, attempt.nonce, now)

    async def farewell(self, back_url: str) -> str | None:
        """Where the browser signs out at the provider too, and comes back from; ``None`` where there is no such place. Raises
        :class:`Away`."""
        async with self._conversation() as client:
            metadata = await self._describe(client)
        if metadata.end_session_endpoint is None:
            return None
        # Without the ID token as a hint: it is not kept, so the provider may ask the person whether they mean it.
        fields = [("client_id", self.terms.client_id), ("post_logout_redirect_uri", back_url)]
        url: str = add_params_to_uri(metadata.end_session_endpoint, fields)
        return url

    @asynccontextmanager
    async def _conversation(self) -> AsyncIterator[httpx2.AsyncClient]:
        """A client for some calls, which end in time together."""
        if self._places.locked():
            raise Away(f"{AT_ONCE_MAX} sign-ins at once wait for the provider already")
        try:
            async with (
                asyncio.timeout(SECONDS_MAX),
                self._places,
                httpx2.AsyncClient(verify=self._tls, trust_env=False, follow_redirects=False, timeout=SECONDS_MAX) as client,
            ):
                yield client
        except TimeoutError:
            raise Away(f"the provider did not answer within {SECONDS_MAX:.0f} seconds") from None
        except (httpx2.HTTPError, httpx2.InvalidURL, ssl.SSLError, OSError) as error:
            cause = str(error) or type(error).__name__
            raise Away(f"the provider can't be reached ({cause}): check {_SETTING}ISSUER, the network, TLS") from None

    async def _describe(self, client: httpx2.AsyncClient) -> _Metadata:
        if self._metadata is None or time.monotonic() >= self._metadata_until:
            url = get_well_known_url(self.terms.issuer, external=True)
            found = await _get(client, url)
            if found.get("issuer") != self.terms.issuer:
                # The whole of what tokens are compared with, so it is told letter by letter.
                said = str(found.get("issuer"))[:200]
                raise Away(f"{url} is of the issuer {said!r}: set {_SETTING}ISSUER to that, if it is the one you mean")
            methods = found.get("token_endpoint_auth_methods_supported")
            endpoints = {name: found[name] for name in (*_NEEDED, _ENDING) if _is_endpoint(found.get(name), self.terms.issuer)}
            if missing := [name for name in _NEEDED if name not in endpoints]:
                raise Away(f"{url} names no {' and no '.join(missing)} with https")
            self._metadata = _Metadata(
                authorization_endpoint=endpoints["authorization_endpoint"],
                token_endpoint=endpoints["token_endpoint"],
                jwks_uri=endpoints["jwks_uri"],
                end_session_endpoint=endpoints.get(_ENDING),
                names_itself=found.get("authorization_response_iss_parameter_supported") is True,
                # Where nothing is said, the head is what every provider has to take.
                wants_secret_in_body=isinstance(methods, list) and "client_secret_basic" not in methods,
            )
            self._metadata_until = time.monotonic() + FRESH_SECONDS
        return self._metadata

    def _code_of(self, answer: Mapping[str, str], metadata: _Metadata) -> str:
        if (metadata.names_itself or "iss" in answer) and answer.get("iss") != self.terms.issuer:
            raise Refused("another provider answered than the one that was asked")
        if "error" in answer:
            raise _refusal(answer["error"])
        if not answer.get("code"):
            raise Refused("the provider sent neither a code nor an error")
        return answer["code"]

    async def _redeem(
        self, client: httpx2.AsyncClient, metadata: _Metadata, code: str, redirect_url: str, verifier: str
    ) -> str:
        """The ID token for a code."""
        form = {"grant_type": "authorization_code", "code": code, "redirect_uri": redirect_url, "code_verifier": verifier}
        headers = {}
        if self.terms.client_secret is None:
            form["client_id"] = self.terms.client_id
        elif metadata.wants_secret_in_body:
            form |= {"client_id": self.terms.client_id, "client_secret": self.terms.client_secret.get_secret_value()}
        else:
            pair = f"{quote_plus(self.terms.client_id)}:{quote_plus(self.terms.client_secret.get_secret_value())}"
            headers["authorization"] = "Basic " + base64.b64encode(pair.encode("ascii")).decode("ascii")
        request = client.build_request("POST", metadata.token_endpoint, data=form, headers=headers)
        status, found = await _answer_to(client, request)
        if status != 200:
            if status < 500 and isinstance(found.get("error"), str):
                raise _refusal(found["error"])
            raise Away(f"the provider's token endpoint answered {status}")
        token = found.get("id_token")
        if not isinstance(token, str):
            raise Refused("the provider sent no ID token for the code")
        return token

    async def _verify(
        self, client: httpx2.AsyncClient, metadata: _Metadata, token: str, nonce: str, now: datetime
    ) -> Mapping[str, Any]:
        """The claims of an ID token that the provider made for this attempt."""
        try:
            decoded = await self._decode(client, metadata, token)
            claims = CodeIDToken(
                decoded.claims,
                decoded.header,
                options={
                    "iss": {"essential": True, "value": self.terms.issuer},
                    "aud": {"essential": True, "value": self.terms.client_id},
                },
                params={"nonce": nonce, "client_id": self.terms.client_id},
            )
            claims.validate(now=int(now.timestamp()), leeway=LEEWAY_SECONDS)
        except ClaimError as error:
            raise Refused(
                f"the ID token does not hold for its claim {error.claim!r} ({error.error}): "
                "it is of another issuer, client, attempt or time; compare the clocks too"
            ) from None
        except (JoseError, ValueError, TypeError) as error:
            raise Refused(f"the ID token does not hold ({getattr(error, 'error', type(error).__name__)})") from None
        return dict(claims)

    async def _decode(self, client: httpx2.AsyncClient, metadata: _Metadata, token: str) -> jwt.Token:
        """A token whose signature holds. Keys may have changed since they were asked for, so they are asked for once more."""
        # What a header has beyond the standard's fields is not looked at.
        registry = JWSRegistry(algorithms=ALGORITHMS, strict_check_header=False)
        if self._keys is not None and time.monotonic() < self._keys_until:
            try:
                return jwt.decode(token, self._keys, registry=registry)
            except (InvalidKeyIdError, BadSignatureError):
                pass
        self._keys = _keys_of(await _get(client, metadata.jwks_uri))
        self._keys_until = time.monotonic() + FRESH_SECONDS
        return jwt.decode(token, self._keys, registry=registry)


def _is_endpoint(url: object, issuer: str) -> bool:
    """Whether it is a URL that may be used: a provider on loopback may speak plain http, and no other may lead us there."""
    if not isinstance(url, str):
        return False
    try:
        safe = is_safe(url) and "@" not in urlsplit(url).netloc
    except ValueError:
        return False
    return safe and url.isascii() and url.isprintable() and (url.startswith("https://") or issuer.startswith("http://"))


def _keys_of(found: Mapping[str, Any]) -> KeySet:
    """The keys that signatures can be checked with. One that is not understood is no reason to refuse the others."""
    listed = found.get("keys")
    keys: list[Key] = []
    for one in listed[:KEYS_MAX] if isinstance(listed, list) else ():
        if not isinstance(one, dict) or one.get("kty") not in KEY_TYPES or one.get("use") == "enc":
            continue
        try:
            keys.append(import_key(one))
        except (JoseError, ValueError, TypeError, KeyError):
            continue
    if not keys:
        raise Away("the provider's jwks_uri has no key that signatures could be checked with")
    return KeySet(keys)


def _refusal(code: str) -> Refused | Away:
    if code in ("server_error", "temporarily_unavailable"):
        return Away(f"the provider answered {code}")
    shown = code[:64] if code.isprintable() else "something unprintable"
    return Refused(f"the provider answered {shown}" + (f": {_ADVICE[code]}" if code in _ADVICE else ""))


async def _get(client: httpx2.AsyncClient, url: str) -> dict[str, Any]:
    status, found = await _answer_to(client, client.build_request("GET", url))
    if status != 200:
        raise Away(f"{url} answered {status}")
    return found


async def _answer_to(client: httpx2.AsyncClient, request: httpx2.Request) -> tuple[int, dict[str, Any]]:
    """The status and the JSON object of an answer; an empty one where there is none."""
    request.headers["accept"] = "application/json"
    # What is packed small can be large: the bound is on what is kept.
    request.headers["accept-encoding"] = "identity"
    response = await client.send(request, stream=True)
    try:
        body = bytearray()
        async for piece in response.aiter_raw():
            body += piece
            if len(body) > ANSWER_BYTES_MAX:
                raise Away(f"{request.url} answered with more than {ANSWER_BYTES_MAX} bytes")
    finally:
        await response.aclose()
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        if response.status_code == 200:
            raise Away(f"{request.url} did not answer with a JSON object")
        found = {}
    return response.status_code, found
