"""Signing in by way of an OpenID provider: who comes in as what, and who does not, whatever is sent in place of the truth."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from joserfc import jws, jwt
from joserfc.jwk import OctKey, RSAKey

from proxy.ledger import accounts
from proxy.ledger.pages import Turn, list_audit
from tests.live import now
from tests.pages.house import House, Visitor, open_house, serving, text_of
from tests.pages.provider import (
    ADMIN,
    CLIENT_ID,
    CLIENT_SECRET,
    KEYS,
    Claims,
    Provider,
    a_provider,
    agree,
    causes,
    go_to,
    is_in,
    refused,
    sign_in_with,
    signed,
)

VIEWER = {"sub": "vera-2", "groups": "finance"}
MEMBER = {"sub": "mia-3", "beanmeter": {"teams": ["red"]}}


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
def provider(running: tuple[House, Provider]) -> Provider:
    running[1].reset()
    running[1].person = ADMIN
    return running[1]


@pytest.fixture
def house(running: tuple[House, Provider], provider: Provider) -> House:
    return running[0]


# Who comes in


@pytest.mark.parametrize(
    ("said", "first", "pages"),
    [
        (ADMIN, "Make a team", {"/audit": 200, "/teams/red": 200, "/teams/green": 200}),
        ({"sub": "x", "groups": "owners"}, "Make a team", {"/audit": 200}),
        (VIEWER, "Overview", {"/audit": 200, "/teams/red": 200, "/teams/green": 200}),
        (MEMBER, "Budgets and limits", {"/audit": 404, "/teams/red": 200, "/teams/green": 404}),
        ({"sub": "x", "beanmeter": {"teams": "red"}}, "Budgets and limits", {"/teams/red": 200}),
        # A claim whose own name has a dot in it.
        ({"sub": "x", "beanmeter.teams": ["red"]}, "Budgets and limits", {"/teams/red": 200}),
        (
            {"sub": "x", "beanmeter": {"teams": ["red", "green", "nobody's"]}},
            "Your teams",
            {"/teams/red": 200, "/teams/green": 200, "/teams/blue": 404, "/audit": 404},
        ),
        # Of several roles the one that may most.
        ({"sub": "x", "groups": ["finance", "admins"], "beanmeter": {"teams": ["red"]}}, "Make a team", {"/audit": 200}),
    ],
)
def test_a_claim_makes_the_role(
    home_of_three: House, provider: Provider, said: Claims, first: str, pages: dict[str, int]
) -> None:
    provider.person = said
    visitor = home_of_three.visitor()
    assert first in text_of(sign_in_with(visitor).text)
    assert {path: visitor.get(path).status_code for path in pages} == pages


@pytest.fixture
def home_of_three(house: House) -> House:
    with house.gateway.database.writing() as connection:
        there = {team["name"] for team in accounts.list_teams(connection)}
        for name in {"green", "blue"} - there:
            accounts.add_team(connection, name, now=now(), actor="test")
    return house


def test_a_member_of_several_teams_finds_all_of_them(home_of_three: House, provider: Provider) -> None:
    provider.person = {"sub": "x", "beanmeter": {"teams": ["red", "green"]}}
    visitor = home_of_three.visitor()
    chooser = sign_in_with(visitor).text
    assert 'href="/dashboard/teams/green"' in chooser
    assert 'href="/dashboard/teams/red"' in chooser
    assert "blue" not in chooser


def test_a_viewer_sees_no_form_that_changes(house: House, provider: Provider) -> None:
    provider.person = VIEWER
    house.review()
    visitor = house.visitor()
    sign_in_with(visitor)
    for path in ("", "/teams/red", "/teams/red/requests", "/reviews", "/prices", "/playground", "/audit", "/health"):
        page = visitor.get(path)
        assert page.status_code == 200
        assert page.text.count('method="post"') == page.text.count('action="/dashboard/sign-out"') == 1, path
    # Nor does one work that somebody wrote down.
    refusal = visitor.post("/teams", {"name": "violet"})
    assert (refusal.status_code, "changes nothing" in refusal.text) == (403, True)
    assert visitor.get("/teams/violet").status_code == 404


def test_the_audit_names_the_account(house: House, provider: Provider) -> None:
    cases: list[tuple[Claims, str]] = [
        ({}, "ada-1 (ada@example.com)"),
        ({"email_verified": False}, "ada-1"),
        ({"email_verified": "false"}, "ada-1"),
        ({"email": "a\u202eb@example.com"}, "ada-1"),
        ({"email": "a" * 300}, "ada-1"),
        ({"email": ["ada@example.com"]}, "ada-1"),
    ]
    for number, (said, account) in enumerate(cases):
        provider.person = {**ADMIN, **said}
        visitor = house.visitor()
        sign_in_with(visitor)
        visitor.done("/teams", {"name": f"made {number}"})
        with house.gateway.database.reading() as connection:
            rows = [
                row for row in list_audit(connection, Turn(50), newest_first=True).rows if row["subject"] == f"made {number}"
            ]
        assert [row["actor"] for row in rows] == [f"oidc:{account}"]
        assert f"oidc:{account}" in visitor.shown("/audit")


def test_signing_out_ends_the_session_here_and_goes_on_to_the_provider(house: House, provider: Provider) -> None:
    visitor = house.visitor()
    sign_in_with(visitor)
    cookies = dict(visitor.client.cookies)
    answer = visitor.post("/sign-out")
    assert answer.status_code == 200
    assert not visitor.client.cookies
    headers = {"cookie": "; ".join(f"{name}={value}" for name, value in cookies.items())}
    assert house.visitor().get("/prices", headers=headers).status_code == 303
    seconds, _, url = answer.headers["refresh"].partition("; url=")
    assert seconds == "0"
    assert httpx2.get(url, trust_env=False).status_code == 200
    assert provider.ended == [{"client_id": CLIENT_ID, "post_logout_redirect_uri": f"{house.site}/dashboard/sign-in"}]


def test_a_provider_without_a_place_to_sign_out(tmp_path: Path) -> None:
    with a_provider() as provider:
        provider.person = ADMIN
        provider.metadata = {"end_session_endpoint": None}
        with open_house(f"sqlite:///{tmp_path / 'books.db'}", tmp_path, **provider.settings()) as house:
            provider.sites.add(house.site)
            visitor = house.visitor()
            sign_in_with(visitor)
            assert visitor.post("/sign-out").headers["location"] == "/dashboard/sign-in?said=signed_out"
            assert not is_in(visitor)


def test_who_came_with_a_key_stays_here_when_signing_out(house: House, provider: Provider) -> None:
    assert house.member().post("/sign-out").headers["location"] == "/dashboard/sign-in?said=signed_out"


def test_a_role_that_is_taken_away_is_gone_at_the_next_sign_in(house: House, provider: Provider) -> None:
    visitor = house.visitor()
    sign_in_with(visitor)
    former = {"cookie": f"beanmeter={visitor.client.cookies['beanmeter']}"}
    provider.person = VIEWER
    assert visitor.post("/teams", {"name": "before"}).status_code == 303
    sign_in_with(visitor)
    assert visitor.post("/teams", {"name": "after"}).status_code == 403
    assert house.visitor().get("/prices", headers=former).status_code == 303


def test_a_session_lasts_as_long_as_the_settings_say(tmp_path: Path) -> None:
    with a_provider() as provider:
        settings = provider.settings(SESSION_HOURS="0.5")
        with open_house(f"sqlite:///{tmp_path / 'books.db'}", tmp_path, **settings) as house:
            provider.sites.add(house.site)
            provider.person = ADMIN
            visitor = house.visitor()
            answer = visitor.get(go_to(visitor))
            (cookie,) = [one for one in answer.headers.get_list("set-cookie") if one.startswith("beanmeter=")]
            assert "Max-Age=1800" in cookie


def ticket_of(visitor: Visitor) -> dict[str, str]:
    """The cookie of an attempt, for somebody else to use."""
    return {"cookie": f"beanmeter-oidc={visitor.client.cookies['beanmeter-oidc']}"}


def test_without_the_provider_in_the_settings_its_sessions_are_over_and_its_pages_are_not_there(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'books.db'}"
    with a_provider() as provider:
        provider.person = ADMIN
        with open_house(url, tmp_path, **provider.settings()) as house:
            provider.sites.add(house.site)
            visitor = house.visitor()
            sign_in_with(visitor)
            cookie = {"cookie": f"beanmeter={visitor.client.cookies['beanmeter']}"}
            assert house.visitor().get("/prices", headers=cookie).status_code == 200
    with serving(url, tmp_path) as site:
        for path, status in (("/prices", 303), ("/sign-in/oidc", 404), ("/sign-in/oidc/callback", 404), ("/sign-in", 200)):
            answer = httpx2.get(f"{site}/dashboard{path}", headers=cookie, trust_env=False)
            assert answer.status_code == status, path
            assert "sign-in/oidc" not in answer.text


def test_another_process_may_finish_what_one_began(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'books.db'}"
    with a_provider() as provider:
        provider.person = ADMIN
        settings = provider.settings()
        with (
            open_house(url, tmp_path / "one", **settings) as house,
            serving(url, tmp_path / "other", settings=settings) as other,
        ):
            provider.sites.add(house.site)
            visitor = house.visitor()
            back = go_to(visitor)
            # As behind a load balancer: the same address, and another process.
            headers = {"host": house.site.removeprefix("http://"), **ticket_of(visitor)}
            answer = httpx2.get(f"{other}/dashboard{back}", headers=headers, trust_env=False)
            assert (answer.status_code, answer.headers["location"]) == (303, "/dashboard")


def test_over_tls_cookies_are_this_hosts_alone(house: House, provider: Provider) -> None:
    provider.sites.add("https://meter.example")
    visitor, tls = house.visitor(), {"host": "meter.example"}
    begun = visitor.get("/sign-in/oidc", headers=tls)
    assert "redirect_uri=https%3A%2F%2Fmeter.example%2Fdashboard%2Fsign-in%2Foidc%2Fcallback" in begun.headers["location"]
    ticket = begun.headers["set-cookie"]
    assert ticket.startswith("__Host-beanmeter-oidc=")
    assert {"HttpOnly", "SameSite=lax", "Path=/", "Secure", "Max-Age=600"} <= {part.strip() for part in ticket.split(";")}
    page = httpx2.get(begun.headers["location"], trust_env=False).text
    back = page.split('href="')[1].split('"')[0].replace("&amp;", "&").removeprefix("https://meter.example/dashboard")
    value = ticket.partition("=")[2].partition(";")[0]
    # A neighbour's host can set a cookie without the prefix.
    plain = house.visitor().get(back, headers={**tls, "cookie": f"beanmeter-oidc={value}"})
    assert plain.status_code == 403
    answer = house.visitor().get(back, headers={**tls, "cookie": f"__Host-beanmeter-oidc={value}"})
    assert answer.status_code == 303
    assert [one.partition("=")[0] for one in answer.headers.get_list("set-cookie")] == [
        "__Host-beanmeter",
        "__Host-beanmeter-oidc",
    ]


@pytest.mark.parametrize("secret", [None, CLIENT_SECRET])
@pytest.mark.parametrize("methods", [None, ["client_secret_post"], ["client_secret_basic", "client_secret_post"]])
def test_the_client_says_who_it_is_in_each_way(tmp_path: Path, secret: str | None, methods: list[str] | None) -> None:
    with a_provider(secret) as provider:
        provider.person = ADMIN
        if methods is not None:
            provider.metadata = {"token_endpoint_auth_methods_supported": methods}
        with open_house(f"sqlite:///{tmp_path / 'books.db'}", tmp_path, **provider.settings()) as house:
            provider.sites.add(house.site)
            sign_in_with(house.visitor())


# Who does not


@pytest.mark.parametrize(
    "said",
    [
        {},
        {"groups": []},
        {"groups": ["staff"]},
        {"groups": "admins,owners"},
        {"groups": "Admins"},
        {"groups": {"admins": True}},
        {"groups": [["admins"]]},
        {"groups": None},
        {"groups": True},
        {"beanmeter": "red"},
        {"beanmeter": {"teams": ["nobody's"]}},
        {"beanmeter": {"teams": ["", "RED", " red", "red\x00", "x" * 1_000]}},
        {"beanmeter": {"teams": {"red": 1}}},
        {"beanmeter": {"teams": [f"team {number}" for number in range(5_000)]}},
    ],
)
def test_a_claim_that_says_nothing_opens_nothing(house: House, provider: Provider, log: io.StringIO, said: Claims) -> None:
    provider.person = {"sub": "ada-1", **said}
    visitor = house.visitor()
    answer = visitor.get(go_to(visitor))
    assert "no role here" in refused(answer, visitor)
    (cause,) = causes(log)
    assert "ID token" in cause


def with_claims(**claims: Any) -> Callable[[Claims], str]:
    """A token with other claims; ``None`` takes one out."""
    return lambda ours: signed({name: value for name, value in {**ours, **claims}.items() if value is not None})


def with_time(**claims: int) -> Callable[[Claims], str]:
    """A token with times so many seconds from now."""
    return lambda ours: signed({**ours, **{name: int(time.time()) + seconds for name, seconds in claims.items()}})


def encoded(part: Any) -> str:
    return base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=").decode()


def unsigned(ours: Claims) -> str:
    return f"{encoded({'alg': 'none', 'kid': 'key-0'})}.{encoded(ours)}."


def signed_with_the_public_key(form: str) -> Callable[[Claims], str]:
    """HS256 with what everybody knows, in the form that a careless reader would take for the secret."""

    def make(ours: Claims) -> str:
        pem = KEYS[0].as_pem(private=False)
        secret = {"pem": pem, "stripped": pem.strip(), "jwk": json.dumps(KEYS[0].as_dict(private=False)).encode()}[form]
        return by_hand({"alg": "HS256", "kid": "key-0"}, ours, secret)

    return make


def by_hand(header: dict[str, str], ours: Claims, secret: bytes) -> str:
    # The library itself would not sign with such a key.
    import hashlib
    import hmac

    text = f"{encoded(header)}.{encoded(ours)}"
    signature = hmac.digest(secret, text.encode(), hashlib.sha256)
    return f"{text}.{base64.urlsafe_b64encode(signature).rstrip(b'=').decode()}"


def not_an_object(_: Claims) -> str:
    return jws.serialize_compact({"alg": "RS256", "kid": "key-0"}, b'["admins"]', KEYS[0])


LAX = jws.JWSRegistry(strict_check_header=False)

FOREIGN = RSAKey(KEYS[1].raw_value, KEYS[1].raw_value, {"kid": "key-0"})

ATTACKS: dict[str, Callable[[Claims], str]] = {
    "nonce of another attempt": with_claims(nonce="another"),
    "no nonce": with_claims(nonce=None),
    "nonce that is no text": with_claims(nonce=["another"]),
    "another issuer": with_claims(iss="https://elsewhere.example"),
    "the issuer without its slash": lambda ours: signed({**ours, "iss": ours["iss"].rstrip("/")}),
    "no issuer": with_claims(iss=None),
    "another client": with_claims(aud="another"),
    "several clients without ours": with_claims(aud=["another", "a third"]),
    "several clients and nobody for whom": with_claims(aud=[CLIENT_ID, "another"]),
    "for another of the clients": with_claims(aud=[CLIENT_ID, "another"], azp="another"),
    "another client, by way of ours": with_claims(aud="another", azp=CLIENT_ID),
    "several clients without ours, by way of ours": with_claims(aud=["another", "a third"], azp=CLIENT_ID),
    "no client": with_claims(aud=None),
    "over": with_time(iat=-600, exp=-120),
    "never over": with_claims(exp=None),
    "over at no number": with_claims(exp="tomorrow"),
    "made in the future": with_time(iat=600, exp=900),
    "made at no time": with_claims(iat=None),
    "not yet": with_time(nbf=600),
    "nobody's": with_claims(sub=None),
    "of nobody": with_claims(sub=""),
    "of somebody with a long name": with_claims(sub="x" * 256),
    "of somebody unprintable": with_claims(sub="ada\nadmin"),
    "alg none": unsigned,
    "alg none with a signature": lambda ours: unsigned(ours) + "AAAA",
    "HS256 with the public key": signed_with_the_public_key("pem"),
    "HS256 with the public key without its last line end": signed_with_the_public_key("stripped"),
    "HS256 with the public key as JSON": signed_with_the_public_key("jwk"),
    "HS256 with the client's secret": lambda ours: jwt.encode(
        {"alg": "HS256"}, ours, OctKey.import_key(CLIENT_SECRET), algorithms=["HS256"]
    ),
    "signed by somebody else": lambda ours: signed(ours, FOREIGN),
    "signed by somebody unknown": lambda ours: signed(ours, KEYS[1]),
    "another algorithm than the key's": lambda ours: f"{encoded({'alg': 'ES256', 'kid': 'key-0'})}.{encoded(ours)}.AAAA",
    "claims changed after signing": lambda ours: ".".join(
        (signed(ours).split(".")[0], encoded({**ours, "groups": ["owners"]}), signed(ours).split(".")[2])
    ),
    "no object": not_an_object,
    "not a token": lambda _: "admins",
    "five parts": lambda _: "a.b.c.d.e",
    "empty": lambda _: "",
    "too long": with_claims(groups=["admins", "x" * 150_000]),
    "a header that must be understood": lambda ours: (
        f"{encoded({'alg': 'RS256', 'kid': 'key-0', 'crit': ['x'], 'x': 1})}.{encoded(ours)}.{signed(ours).split('.')[2]}"
    ),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_token_that_does_not_hold_signs_nobody_in(house: House, provider: Provider, log: io.StringIO, attack: str) -> None:
    provider.token = ATTACKS[attack]
    visitor = house.visitor()
    answer = visitor.get(go_to(visitor))
    assert "did not vouch" in refused(answer, visitor)
    assert len(causes(log)) == 1
    assert "ey" + "J" not in log.getvalue(), "no token is logged"
    # The attempt is over: what comes after it begins anew.
    assert "beanmeter-oidc" not in visitor.client.cookies
    provider.token = signed
    sign_in_with(visitor)


@pytest.mark.parametrize(
    "allowed",
    [
        with_time(iat=20, exp=300),
        with_time(exp=-10),
        with_claims(aud=[CLIENT_ID], azp=CLIENT_ID),
        with_claims(aud=[CLIENT_ID, "another"], azp=CLIENT_ID),
        with_claims(at_hash="of an access token that nobody uses"),
        lambda ours: jwt.encode({"alg": "RS256", "x-own": "1", "kid": "key-0"}, ours, KEYS[0], registry=LAX),
    ],
)
def test_a_token_that_holds_is_taken(house: House, provider: Provider, allowed: Callable[[Claims], str]) -> None:
    provider.token = allowed
    sign_in_with(house.visitor())


def test_keys_are_asked_for_anew_once_where_one_is_unknown(house: House, provider: Provider) -> None:
    sign_in_with(house.visitor())
    before = provider.asked["/keys"]
    sign_in_with(house.visitor())
    assert provider.asked["/keys"] == before, "known keys are not asked for"
    provider.keys, provider.token = [KEYS[0], KEYS[1]], lambda ours: signed(ours, KEYS[1])
    sign_in_with(house.visitor())
    assert provider.asked["/keys"] == before + 1
    # A key that nobody knows costs one question, and opens nothing.
    provider.keys = [KEYS[0]]
    provider.token = lambda ours: signed(ours, RSAKey(KEYS[1].raw_value, KEYS[1].raw_value, {"kid": "key-9"}))
    visitor = house.visitor()
    refused(visitor.get(go_to(visitor)), visitor)
    assert provider.asked["/keys"] == before + 2


# The way there and back


def changed(back: str, **parameters: str | None) -> str:
    """The address of the way back with other parameters; ``None`` takes one out."""
    path, _, query = back.partition("?")
    found = {**dict(httpx2.QueryParams(query)), **parameters}
    return f"{path}?{httpx2.QueryParams({name: value for name, value in found.items() if value is not None})}"


def test_the_state_is_the_browsers_own(house: House, provider: Provider) -> None:
    victim, attacker = house.visitor(), house.visitor()
    theirs = go_to(attacker)
    # A browser that began nothing, one that began something else, and one whose cookie somebody wrote.
    assert victim.get(theirs).status_code == 403
    ours = go_to(victim)
    refused(victim.get(theirs), victim)
    state = httpx2.QueryParams(ours.partition("?")[2])["state"]
    refused(victim.get(changed(theirs, state="")), victim)
    refused(victim.get(changed(theirs, state=None)), victim)
    refused(victim.get(changed(theirs, state="\u00e9")), victim)
    refused(victim.get(f"{ours}&state={state}"), victim)
    for ticket in ("1", "x", "99999999999.x", "." * 65, "a=b", ""):
        assert house.visitor().get(theirs, headers={"cookie": f"beanmeter-oidc={ticket}"}).status_code == 403
    # The attempt is still the browser's own, and its code was not spent on any of this.
    assert victim.get(ours).status_code == 303
    assert is_in(victim)


def test_a_code_of_somebody_else_is_not_redeemed(house: House, provider: Provider, log: io.StringIO) -> None:
    victim, attacker = house.visitor(), house.visitor()
    code = httpx2.QueryParams(go_to(attacker).partition("?")[2])["code"]
    # Their code with a state of one's own: PKCE is in the way.
    refused(victim.get(changed(go_to(victim), code=code)), victim)
    (cause,) = causes(log)
    assert cause.startswith("the provider answered invalid_grant")
    assert code not in log.getvalue()


def test_a_way_back_is_gone_once(house: House, provider: Provider) -> None:
    visitor = house.visitor()
    back = go_to(visitor)
    ticket = ticket_of(visitor)
    asked = provider.asked["/token"]
    assert visitor.get(back).status_code == 303
    # The same address again, from the history; then with the cookie that it had.
    assert visitor.get(back).status_code == 403
    assert provider.asked["/token"] == asked + 1
    again = house.visitor()
    assert again.get(back, headers=ticket).status_code == 403
    assert provider.asked["/token"] == asked + 2
    assert not is_in(again)


def test_an_attempt_is_over_after_its_time(house: House, provider: Provider, monkeypatch: pytest.MonkeyPatch) -> None:
    def back_with_the_cookie() -> httpx2.Response:
        visitor = house.visitor()
        begun = visitor.get("/sign-in/oidc")
        # Kept by somebody who does not keep to how long it lasts.
        headers = {"cookie": begun.headers["set-cookie"].partition(";")[0]}
        return house.visitor().get(agree(visitor, begun.headers["location"]), headers=headers)

    assert back_with_the_cookie().status_code == 303
    monkeypatch.setattr("proxy.pages.gate.TICKET_SECONDS", -1)
    answer = back_with_the_cookie()
    assert (answer.status_code, "too long ago" in answer.text, "set-cookie" in answer.headers) == (403, True, False)


@pytest.mark.parametrize("path", ["/sign-in/oidc", "/sign-in"])
def test_nobody_is_led_elsewhere(house: House, provider: Provider, path: str) -> None:
    elsewhere = "https://elsewhere.example/"
    names = ("next", "redirect", "redirect_uri", "return_to", "target_link_uri", "issuer", "iss", "url", "to")
    query = str(httpx2.QueryParams(dict.fromkeys(names, elsewhere)))
    visitor = house.visitor()
    begun = visitor.get(f"{path}?{query}")
    assert "elsewhere" not in begun.text + str(begun.headers)
    back = go_to(visitor)
    answer = visitor.get(f"{back}&{query.replace('iss=', 'is=')}")
    assert (answer.status_code, answer.headers["location"]) == (303, "/dashboard")


def test_another_host_is_the_providers_to_refuse(house: House, provider: Provider) -> None:
    # Whoever can send a Host of their own is no victim's browser; and the provider knows its clients' addresses.
    url = house.visitor().get("/sign-in/oidc", headers={"host": "elsewhere.example"}).headers["location"]
    with pytest.raises(httpx2.RemoteProtocolError):
        httpx2.get(url, trust_env=False)


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"code": None, "error": "access_denied"}, "the provider answered access_denied: it did not let this person in"),
        ({"error": "invalid_scope"}, "the provider answered invalid_scope: it does not know one of BEANMETER_OIDC_SCOPES"),
        ({"code": None, "error": "own_\u202e"}, "the provider answered something unprintable"),
        ({"code": None, "error": "x" * 500}, f"the provider answered {'x' * 64}"),
        ({"code": None}, "the provider sent neither a code nor an error"),
        ({"code": ""}, "the provider sent neither a code nor an error"),
        ({"iss": "https://elsewhere.example"}, "another provider answered than the one that was asked"),
        ({"iss": None}, "another provider answered than the one that was asked"),
    ],
)
def test_what_the_provider_answers_instead_of_a_code(
    house: House, provider: Provider, log: io.StringIO, changes: dict[str, str | None], cause: str
) -> None:
    visitor = house.visitor()
    told = refused(visitor.get(changed(go_to(visitor), error_description="<b>call-this-number</b>", **changes)), visitor)
    assert "call-this-number" not in told
    (found,) = causes(log)
    assert found.startswith(cause)
    assert "call-this-number" not in log.getvalue()


def test_a_wrong_secret_is_told_to_the_operator_without_it(tmp_path: Path, log: io.StringIO) -> None:
    with a_provider() as provider:
        settings = provider.settings(CLIENT_SECRET="another-secret")
        with open_house(f"sqlite:///{tmp_path / 'books.db'}", tmp_path, **settings) as house:
            provider.sites.add(house.site)
            visitor = house.visitor()
            refused(visitor.get(go_to(visitor)), visitor)
    (cause,) = causes(log)
    assert "does not take BEANMETER_OIDC_CLIENT_ID with BEANMETER_OIDC_CLIENT_SECRET" in cause
    assert "another-secret" not in log.getvalue()


def test_nothing_that_opens_anything_is_logged(house: House, provider: Provider, log: io.StringIO) -> None:
    seen: list[str] = [CLIENT_SECRET]

    def make(ours: Claims) -> str:
        seen.append(signed({**ours, "aud": "another"}))
        return seen[-1]

    provider.token = make
    visitor = house.visitor()
    back = go_to(visitor)
    seen += [*httpx2.QueryParams(back.partition("?")[2]).values(), visitor.client.cookies["beanmeter-oidc"]]
    seen.remove(provider.issuer)
    refused(visitor.get(back), visitor)
    assert causes(log)
    assert [one for one in seen if one in log.getvalue()] == []


# What it costs who does not use it


def test_authlib_is_loaded_only_where_a_provider_is_named() -> None:
    code = (
        "import sys, proxy.app, proxy.pages.routes; "
        "print(sorted({name.partition('.')[0] for name in sys.modules} & {'authlib', 'joserfc', 'cryptography'}))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert ran.stdout.strip() == "[]"
