"""Who may have which page, and what a session is: how it begins, what it opens, and how it ends."""

from __future__ import annotations

from pathlib import Path

import httpx2
import pytest

from proxy.ledger import accounts
from proxy.pages.routes import PAGES, Page
from tests.live import live_gateway, now
from tests.pages.house import POLICY, TOKEN, House, Visitor, open_house, serving
from tests.pages.provider import Claims, Provider, a_provider, sign_in_with

# Who has which page; for everybody else it is not there.
ACCESS = {
    ("GET", "/sign-in"): "anybody",
    ("POST", "/sign-in"): "anybody",
    ("GET", "/sign-in/oidc"): "anybody",
    ("GET", "/sign-in/oidc/callback"): "anybody",
    ("POST", "/sign-out"): "signed in",
    ("GET", ""): "signed in",
    ("GET", "/prices"): "signed in",
    ("GET", "/playground"): "signed in",
    ("GET", "/playground/price"): "signed in",
    ("GET", "/playground/cost"): "signed in",
    ("GET", "/teams/{team}"): "team",
    ("GET", "/teams/{team}/figures"): "team",
    ("GET", "/teams/{team}/burn-down.csv"): "team",
    ("GET", "/teams/{team}/split.csv"): "team",
    ("GET", "/teams/{team}/requests"): "team",
    ("GET", "/teams/{team}/requests.csv"): "team",
    ("POST", "/teams/{team}/keys/{key_id}/rotate"): "own key",
    ("POST", "/teams/{team}/keys/{key_id}/revoke"): "own key",
    ("GET", "/figures"): "admin",
    ("GET", "/spend.csv"): "admin",
    ("POST", "/teams"): "admin",
    ("POST", "/teams/{team}/archive"): "admin",
    ("POST", "/teams/{team}/keys"): "admin",
    ("POST", "/teams/{team}/budgets"): "admin",
    ("POST", "/teams/{team}/budgets/remove"): "admin",
    ("POST", "/teams/{team}/limits"): "admin",
    ("POST", "/teams/{team}/limits/remove"): "admin",
    ("GET", "/reviews"): "admin",
    ("POST", "/reviews/{charge_id}/settle"): "admin",
    ("POST", "/reviews/{charge_id}/release"): "admin",
    ("GET", "/audit"): "admin",
    ("GET", "/health"): "admin",
}


def test_every_page_is_in_the_table() -> None:
    assert ACCESS.keys() == {(page.method, page.path) for page in PAGES}


def ask(visitor: Visitor, page: Page, house: House, charge_id: str) -> httpx2.Response:
    path = page.path.format(team="red", key_id=house.gateway.key_id, charge_id=charge_id)
    if page.path == "/playground/cost":
        path += f"?request_id={charge_id.replace('chg', 'req')}"
    if page.path == "/playground/price":
        path += "?model=gpt-image-2&size=auto&quality=low&n=1"
    fields = {"usd": "1", "name": "blue", "reason": "", "period": "week", "key_id": "nobody's"}
    return visitor.get(path) if page.method == "GET" else visitor.post(path, fields)


@pytest.mark.parametrize(
    "who",
    [
        "nobody",
        "another team",
        "the team",
        "another key of the team",
        "an operator",
        "an account of another team",
        "an account of the team",
        "an account of both teams",
        "a viewer",
        "an account of an admin",
    ],
)
def test_who_may_what(tmp_path: Path, who: str) -> None:
    with a_provider() as provider, open_house(f"sqlite:///{tmp_path / 'books.db'}", tmp_path, **provider.settings()) as house:
        provider.sites.add(house.site)
        check_who_may_what(house, provider, who)


def check_who_may_what(home: House, provider: Provider, who: str) -> None:
    charge_id = home.review()["id"]
    _, other_team = home.gateway.add_team("green")
    with home.gateway.database.writing() as connection:
        other_key = accounts.add_key(connection, "red", now=now(), actor="test").key
    credential = {
        "another team": other_team,
        "the team": home.gateway.key,
        "another key of the team": other_key,
        "an operator": TOKEN,
    }
    said: dict[str, Claims] = {
        "an account of another team": {"beanmeter": {"teams": ["green"]}},
        "an account of the team": {"beanmeter": {"teams": "red"}},
        "an account of both teams": {"beanmeter": {"teams": ["red", "green"]}},
        "a viewer": {"groups": ["finance"]},
        "an account of an admin": {"groups": ["admins"]},
    }
    provider.person = {"sub": "ada-1", **said.get(who, {})}
    of_the_team = who in ("the team", "another key of the team", "an account of the team", "an account of both teams")
    sees_all = who in ("an operator", "an account of an admin", "a viewer")
    # What ends the key comes last.
    for page in sorted(PAGES, key=lambda page: page.path.endswith("/revoke")):
        visitor = home.visitor()
        if who in said:
            sign_in_with(visitor)
        elif who != "nobody":
            visitor.sign_in(credential[who])
        access = ACCESS[page.method, page.path]
        status = ask(visitor, page, home, charge_id).status_code
        where = f"{page.method} {page.path} for {who}"
        if access == "anybody":
            begins = page.path == "/sign-in/oidc"
            # Nobody comes back from the provider without having gone there.
            returns = page.path == "/sign-in/oidc/callback"
            assert status in ((303,) if begins else (403,) if returns else (200, 422)), where
        elif who == "nobody":
            assert status == 303, where
        elif access == "signed in":
            # Of a request by another team, nobody learns that it was made.
            unseen = page.path == "/playground/cost" and not of_the_team and not sees_all
            assert status == 404 if unseen else status in {200, 201, 303, 422}, where
        elif who == "a viewer":
            assert status == (200 if page.method == "GET" else 403), where
        elif sees_all:
            assert status in {200, 201, 303, 422}, where
        elif access == "team":
            assert status == (200 if of_the_team else 404), where
        elif access == "own key":
            assert status in ({201, 303} if who == "the team" else {404}), where
        else:
            assert status == 404, where


def test_without_an_admin_token_everything_is_closed(tmp_path: Path) -> None:
    with live_gateway(f"sqlite:///{tmp_path / 'books.db'}", tmp_path) as (gateway, _):
        for path in ("/dashboard", "/dashboard/sign-in", "/dashboard/static/x/pico.css"):
            answer = httpx2.get(gateway.base_url.removesuffix("/v1") + path, trust_env=False)
            assert (answer.status_code, "BEANMETER_ADMIN_TOKEN" in answer.text) == (404, True)


def test_every_answer_has_its_headers(home: House) -> None:
    visitor = home.operator()
    pages = [visitor.get(path) for path in ("", "/sign-in", "/nothing", "/spend.csv", "/playground/cost", "/prices?size=x")]
    for answer in [*pages, visitor.post("/teams"), visitor.client.put("/dashboard/prices"), home.visitor().get("")]:
        assert answer.headers["content-security-policy"] == POLICY
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["referrer-policy"] == "same-origin"
        assert answer.headers["x-content-type-options"] == "nosniff"


def test_assets_are_kept_for_good_and_nothing_else_is_served(home: House) -> None:
    visitor = home.visitor()
    path = visitor.get("/sign-in").text.split('rel="stylesheet" href="/dashboard')[1].split('"')[0]
    answer = visitor.get(path)
    assert (answer.status_code, answer.headers["cache-control"]) == (200, "public, max-age=31536000, immutable")
    assert answer.headers["content-type"] == "text/css; charset=utf-8"
    digest = path.split("/")[2]
    for other in (f"/static/{digest}/dashboard.css", f"/static/{digest}/checksums.txt", "/static/0/pico.css"):
        assert visitor.get(other).status_code == 404
    assert visitor.get(f"/static/{digest}/..%2f..%2froutes.py").status_code == 303


# Sessions


def test_a_cookie_is_the_servers_alone_and_on_tls_this_hosts_alone(home: House) -> None:
    plain = home.visitor().post("/sign-in", {"credential": TOKEN}).headers["set-cookie"]
    assert plain.startswith("beanmeter=")
    assert {"HttpOnly", "SameSite=lax", "Path=/"} <= {part.strip() for part in plain.split(";")}
    assert "Secure" not in plain
    headers = {"host": "meter.example", "origin": "https://meter.example"}
    over_tls = home.visitor().post("/sign-in", {"credential": TOKEN}, headers=headers).headers["set-cookie"]
    assert over_tls.startswith("__Host-beanmeter=")
    assert {"HttpOnly", "SameSite=lax", "Path=/", "Secure"} <= {part.strip() for part in over_tls.split(";")}
    assert "Domain" not in over_tls
    token = over_tls.partition("=")[2].partition(";")[0]

    def first_page(name: str, host: str) -> int:
        cookie = {"cookie": f"{name}={token}", "host": host}
        return home.visitor().get("", headers=cookie).status_code

    assert first_page("__Host-beanmeter", "meter.example") == 200
    # A neighbour's host can set a cookie without the prefix.
    assert first_page("beanmeter", "meter.example") == 303


def test_a_name_without_tls_is_told_so(home: House) -> None:
    headers = {"host": "meter.example", "origin": "http://meter.example"}
    answer = home.visitor().post("/sign-in", {"credential": TOKEN}, headers=headers)
    assert (answer.status_code, "over HTTPS" in answer.text, "set-cookie" in answer.headers) == (403, True, False)


def test_a_proxy_may_leave_the_port_out_of_the_host(home: House) -> None:
    headers = {"host": "meter.example", "origin": "https://meter.example:8443"}
    assert home.visitor().post("/sign-in", {"credential": TOKEN}, headers=headers).status_code == 303


@pytest.mark.parametrize(
    "origin", ["", "null", "https://elsewhere.example", "http://127.0.0.1:1", "ftp://127.0.0.1", "https://127.0.0.1.example"]
)
def test_a_form_of_another_site_changes_nothing(home: House, origin: str) -> None:
    visitor = home.operator()
    headers = {"origin": origin}
    assert visitor.post("/teams", {"name": "blue"}, headers=headers).status_code == 403
    assert home.visitor().post("/sign-in", {"credential": TOKEN}, headers=headers).status_code == 403
    assert visitor.get("/teams/blue").status_code == 404


def test_a_form_needs_the_token_of_its_own_session(home: House) -> None:
    visitor, other = home.operator(), home.operator()
    assert visitor.csrf != other.csrf
    for csrf in ("", "0" * 64, other.csrf, "é"):
        visitor.csrf = csrf
        assert visitor.post("/teams", {"name": "blue"}).status_code == 403
    assert other.get("/teams/blue").status_code == 404


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"name=%ff", "application/x-www-form-urlencoded"),
        (b"name=a&name=b", "application/x-www-form-urlencoded"),
        (b"a=" * 30, "application/x-www-form-urlencoded"),
        (b"&".join(b"%d=" % number for number in range(30)), "application/x-www-form-urlencoded"),
        (b"name=" + b"x" * 20_000, "application/x-www-form-urlencoded"),
        (b'{"name": "blue"}', "application/json"),
        (b"", ""),
    ],
)
def test_what_is_no_form_is_not_taken(home: House, content: bytes, kind: str) -> None:
    visitor = home.operator()
    headers = {"origin": home.site, "content-type": kind}
    answer = visitor.client.post("/dashboard/teams", content=content, headers=headers)
    assert answer.status_code in (400, 403)


def test_signing_out_ends_the_session_and_not_only_its_cookie(home: House) -> None:
    visitor = home.operator()
    cookies = dict(visitor.client.cookies)
    assert visitor.post("/sign-out").status_code == 303
    assert not visitor.client.cookies
    headers = {"cookie": "; ".join(f"{name}={value}" for name, value in cookies.items())}
    assert home.visitor().get("", headers=headers).status_code == 303


def test_signing_in_again_ends_the_former_session(home: House) -> None:
    visitor = home.operator()
    former = {"cookie": f"beanmeter={visitor.client.cookies['beanmeter']}"}
    visitor.sign_in(home.gateway.key)
    assert home.visitor().get("", headers=former).status_code == 303
    assert visitor.get("/audit").status_code == 404


def test_a_revoked_key_ends_its_sessions(house: House) -> None:
    visitor = house.member()
    assert visitor.get("/teams/red").status_code == 200
    with house.gateway.database.writing() as connection:
        accounts.revoke_key(connection, house.gateway.key_id, now=now(), actor="test")
    assert visitor.get("/teams/red").status_code == 303
    assert visitor.get("/teams/red/figures", headers={"hx-request": "true"}).headers["hx-redirect"] == "/dashboard/sign-in"
    refused = house.visitor().post("/sign-in", {"credential": house.gateway.key})
    assert (refused.status_code, "neither the admin token" in refused.text) == (422, True)
    assert house.gateway.key not in refused.text


def test_an_archived_team_ends_its_sessions(house: House) -> None:
    visitor = house.member()
    house.operator().done("/teams/red/archive", {"name": "red"})
    assert visitor.get("/teams/red").status_code == 303


def test_another_admin_token_ends_all_sessions(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'books.db'}"
    with open_house(url, tmp_path) as house:
        cookies = [{"cookie": f"beanmeter={one.client.cookies['beanmeter']}"} for one in (house.operator(), house.member())]
        assert [house.visitor().get("/prices", headers=cookie).status_code for cookie in cookies] == [200, 200]
    for token, status in ((TOKEN, 200), ("another-token", 303)):
        with serving(url, tmp_path, token) as site:
            answers = [httpx2.get(f"{site}/dashboard/prices", headers=cookie, trust_env=False) for cookie in cookies]
            assert [answer.status_code for answer in answers] == [status, status]


def test_wrong_tokens_are_throttled(home: House) -> None:
    visitor = home.visitor()
    told = [visitor.post("/sign-in", {"credential": "guess"}).text for _ in range(7)]
    assert ["Too many wrong tries" in one for one in told] == [False] * 5 + [True] * 2
    # The token itself is not looked at then.
    assert visitor.post("/sign-in", {"credential": TOKEN}).status_code == 422
    # Keys can't be guessed: a member behind the same address still comes in.
    assert home.visitor().post("/sign-in", {"credential": home.gateway.key}).status_code == 303
