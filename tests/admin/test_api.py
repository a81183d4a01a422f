"""What the operator sees and changes over HTTP, and what he is told where it can't be."""

from __future__ import annotations

import json
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import typer

from proxy.admin import BODY_BYTES_MAX, PREFIX
from proxy.admin.operations import ACTOR, OPERATIONS, Operation
from proxy.cli import app
from proxy.door import FAILURES_MAX
from proxy.tokens import is_well_formed
from tests.admin.office import TOKEN, Office, open_office
from tests.live import JSON, ORDER, PRICE_MICRO_USD, json_answer, live_gateway, whole
from tests.outage import database_away

DESCRIBED = ("/openapi.json", "/docs", "/docs.css")


def concrete(operation: Operation) -> str:
    """A path of the operation, with something at each place."""
    return operation.path.format(team="red", key_id="key_x", charge_id="chg_x", period="day")


def by_name(operation: Operation) -> str:
    return operation.name


# Who may come in


@pytest.mark.parametrize("operation", OPERATIONS, ids=by_name)
def test_nobody_comes_in_without_the_token(shared: Office, operation: Operation) -> None:
    for authorization in ({}, {"authorization": f"Basic {TOKEN}"}, {"authorization": f"Bearer {shared.gateway.key}"}):
        answer = shared.client.build_request(operation.method, PREFIX + concrete(operation), headers=authorization)
        if not authorization:
            del answer.headers["authorization"]
        got = shared.client.send(answer)
        assert (got.status_code, got.headers["content-type"]) == (401, "application/problem+json")
        assert got.headers["www-authenticate"] == "Bearer"
        # Whoever is let in meanwhile clears the slips.
        assert shared.read("/teams")["data"]


def test_guessing_is_throttled(desk: Office) -> None:
    guess = {"authorization": "Bearer guess"}
    for _ in range(FAILURES_MAX):
        desk.refused(401, "GET", "/teams", headers=guess)
    throttled = desk.ask("GET", "/teams")
    assert throttled.status_code == 429
    assert 1 <= int(throttled.headers["retry-after"]) <= 60


def test_without_a_token_of_the_operators_all_is_closed(tmp_path: Path) -> None:
    with live_gateway(f"sqlite:///{tmp_path / 'books.db'}", tmp_path) as (gateway, _):
        for path in (*(concrete(operation) for operation in OPERATIONS), *DESCRIBED):
            url = gateway.base_url.removesuffix("/v1") + PREFIX + path
            assert gateway.client.get(url, headers={"authorization": f"Bearer {TOKEN}"}).status_code == 404


# What can be done


def test_a_team_from_its_making_to_its_end(office: Office) -> None:
    team = office.change("POST", "/teams", 201, name="blue & co.")
    path = f"/teams/{quote(team['name'], safe='')}"
    key = office.change("POST", f"{path}/keys", 201, name="<b>web</b>", expires="90d")
    assert key.keys() == {"id", "team", "name", "key", "expires_at"}
    assert is_well_formed(key["key"])
    assert office.change("PUT", f"{path}/budgets/month", limit_micro_usd=1_000_000)["remaining_micro_usd"] == 1_000_000
    office.change("PUT", f"/keys/{key['id']}/budgets/day", limit_micro_usd=PRICE_MICRO_USD)
    office.change("PUT", f"{path}/limit", rpm=7, concurrency=3)
    assert office.change("PUT", f"/keys/{key['id']}/limit", rpm=9)["concurrency"] is None

    def made() -> tuple[int, int]:
        answer = office.gateway.client.post(
            "/images/generations", json=ORDER, headers={"authorization": f"Bearer {key['key']}"}
        )
        return answer.status_code, len(office.upstream.requests)

    # The budget of the key has room for one image.
    assert [made()[0], made()[0]] == [200, 429]
    assert [row["settled_micro_usd"] for row in office.rows("/budgets", team=team["name"])] == [PRICE_MICRO_USD] * 2
    assert office.rows("/limits", team=team["name"]) == [
        {"team": team["name"], "key_id": None, "rpm": 7, "concurrency": 3},
        {"team": team["name"], "key_id": key["id"], "rpm": 9, "concurrency": None},
    ]
    shown = office.read(path)
    assert [one["name"] for one in shown["keys"]] == ["<b>web</b>"]
    assert {(one["scope"], one["period"]) for one in shown["budgets"]} == {("team", "month"), ("key", "day")}

    renewed = office.change("POST", f"/keys/{key['id']}/rotate", 201, overlap="1h")
    assert renewed["key"] != key["key"]
    assert office.change("DELETE", f"/keys/{key['id']}")["revoked_at"]
    office.change("DELETE", f"{path}/budgets/month")
    office.change("DELETE", f"/keys/{key['id']}/limit")
    assert office.change("POST", f"{path}/archive")["archived_at"]
    assert office.gateway.client.get("/models", headers={"authorization": f"Bearer {renewed['key']}"}).status_code == 401

    ours = [row for row in office.rows("/audit") if row["actor"] == ACTOR]
    assert [row["action"] for row in ours] == [
        "team.add",
        "key.add",
        "budget.set",
        "budget.set",
        "limit.set",
        "limit.set",
        "key.add",
        "budget.set",
        "limit.set",
        "key.rotate",
        "key.revoke",
        "budget.remove",
        "limit.remove",
        "team.archive",
    ]
    # A key is shown once: where it is made.
    everything = "".join(office.ask("GET", operation.path).text for operation in OPERATIONS if "{" not in operation.path)
    assert key["key"] not in everything
    assert renewed["key"] not in everything


def test_a_budget_that_is_replaced_keeps_what_was_spent(office: Office) -> None:
    office.change("PUT", "/teams/red/budgets/total", limit_micro_usd=500_000)
    assert office.gateway.client.post("/images/generations", json=ORDER).status_code == 200
    lowered = office.change("PUT", "/teams/red/budgets/total", limit_micro_usd=1, soft=True)
    assert (lowered["settled_micro_usd"], lowered["remaining_micro_usd"]) == (PRICE_MICRO_USD, 1 - PRICE_MICRO_USD)
    assert (lowered["soft"], lowered["resets_at"]) == (True, None)


def test_reviews(office: Office) -> None:
    first, second = office.review(), office.review()
    assert [row["id"] for row in office.rows("/reviews")] == [first["id"], second["id"]]
    settled = office.change("POST", f"/reviews/{first['id']}/settle", settled_micro_usd=123)
    assert (settled["state"], settled["settled_micro_usd"], settled["basis"]) == ("settled", 123, "operator")
    released = office.change("POST", f"/reviews/{second['id']}/release", reason="not on the bill <i>")
    assert (released["state"], released["settled_micro_usd"]) == ("released", 0)
    assert office.rows("/reviews") == []
    assert [row["settled_micro_usd"] for row in office.rows("/charges")] == [123, 0]
    assert json.loads(office.rows("/audit")[-1]["after"])["reason"] == "not on the bill <i>"
    for what, body in (("settle", {"settled_micro_usd": 1}), ("release", {"reason": "again"})):
        assert office.refused(409, "POST", f"/reviews/{first['id']}/{what}", json=body)["field"] == "charge_id"


def test_sums_and_charges_are_those_of_the_books(office: Office) -> None:
    office.upstream.answer(whole(200, JSON, json_answer(2)))
    assert office.gateway.client.post("/images/generations", json={**ORDER, "n": 2}).status_code == 200
    office.upstream.answer(whole(400, JSON, b'{"error": {"message": "no"}}'))
    office.gateway.client.post("/images/generations", json=ORDER)
    office.gateway.charge_when_ended(office.gateway.charges()[-1]["request_id"])
    charges = office.rows("/charges")
    assert [(row["state"], row["images_requested"]) for row in charges] == [("settled", 2), ("released", 1)]
    assert charges[0].keys() == office.gateway.charges()[0].keys()
    assert office.rows("/charges", state="released") == charges[1:]
    assert office.rows("/charges", order="newest") == charges[::-1]
    assert office.rows("/charges", team="red", key_id=office.gateway.key_id) == charges
    assert office.rows("/charges", until="1d") == office.rows("/charges", key_id="key_other") == []
    ((one),) = office.rows("/spend", by="team,size,quality")
    assert one["settled_micro_usd"] == sum(row["settled_micro_usd"] for row in charges)
    assert (one["team"], one["size"], one["quality"], one["requests"]) == ("red", "1024x1024", "high", 2)
    assert office.rows("/spend", by="day", since="1h")[0]["images"] == 2


def test_nothing_can_be_done_while_the_ledger_is_away(office: Office) -> None:
    with database_away(office.gateway.database_url):
        for method, path, body in (("GET", "/teams", None), ("POST", "/teams", {"name": "blue"})):
            answer = office.ask(method, path, json=body)
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
            assert office.gateway.database_url not in answer.text
    assert [row["name"] for row in office.rows("/teams")] == ["red"]


def test_two_who_make_the_same_team_at_once(office: Office) -> None:
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda _: office.ask("POST", "/teams", json={"name": "blue"}).status_code, range(8)))
    assert sorted(answers) == [201] + [409] * 7


# What can't be


BAD: list[tuple[str, str, dict[str, Any], int, str | None]] = [
    # Names and ids that are in no books.
    ("GET", "/teams/green", {}, 404, "team"),
    ("GET", "/teams/red%00", {}, 404, "team"),
    ("GET", "/teams/%ff", {}, 404, "team"),
    ("GET", "/teams/" + "x" * 3000, {}, 404, "team"),
    ("GET", "/teams/red%2Fkeys", {}, 404, None),
    ("GET", "/teams/", {}, 404, None),
    ("POST", "/teams/red%2fkeys", {"json": {}}, 404, None),
    ("GET", "/budgets?team=green", {}, 404, "team"),
    ("GET", "/budgets?team=%00", {}, 400, "team"),
    ("GET", "/charges?key_id=%0a", {}, 400, "key_id"),
    ("DELETE", "/keys/key_none", {}, 404, "key_id"),
    ("DELETE", "/keys/%00", {}, 404, "key_id"),
    ("POST", "/keys/key_none/rotate", {"json": {}}, 404, "key_id"),
    ("POST", "/reviews/chg_none/settle", {"json": {"settled_micro_usd": 1}}, 404, "charge_id"),
    ("PUT", "/teams/red/budgets/year", {"json": {"limit_micro_usd": 1}}, 404, "period"),
    ("DELETE", "/teams/red/budgets/day", {}, 404, "period"),
    ("DELETE", "/teams/red/limit", {}, 404, "team"),
    ("GET", "/", {}, 404, None),
    ("GET", "/nothing", {}, 404, None),
    # Queries.
    ("GET", "/teams?limit=0", {}, 400, "limit"),
    ("GET", "/teams?limit=1001", {}, 400, "limit"),
    ("GET", "/teams?limit=1.0", {}, 400, "limit"),
    ("GET", "/teams?limit=%EF%BC%91", {}, 400, "limit"),
    ("GET", "/teams?limit=1&limit=2", {}, 400, "limit"),
    ("GET", "/teams?state=review", {}, 400, "state"),
    ("GET", "/charges?state=lost", {}, 400, "state"),
    ("GET", "/charges?since=yesterday", {}, 400, "since"),
    ("GET", "/charges?until=2026-02-30", {}, 400, "until"),
    ("GET", "/charges?order=random", {}, 400, "order"),
    ("GET", "/spend?by=team,sise", {}, 400, "by"),
    ("GET", "/spend?by=", {}, 400, "by"),
    ("PUT", "/teams/red/limit?dry=1", {"json": {"rpm": 1}}, 400, "dry"),
    # Bodies.
    ("POST", "/teams", {"content": b"name=blue", "headers": {"content-type": "application/x-www-form-urlencoded"}}, 415, None),
    ("POST", "/teams", {"content": b"{}"}, 415, None),
    ("POST", "/teams", {"json": {}, "headers": {"content-encoding": "gzip"}}, 415, None),
    ("POST", "/teams", {"content": b"{", "headers": {"content-type": "application/json"}}, 400, None),
    ("POST", "/teams", {"content": b"", "headers": {"content-type": "application/json"}}, 400, None),
    ("POST", "/teams", {"content": b'{"name": "\xff"}', "headers": {"content-type": "application/json"}}, 400, None),
    ("POST", "/teams", {"content": b'{"name": "\\ud800"}', "headers": {"content-type": "application/json"}}, 400, None),
    ("POST", "/teams", {"content": b"[" * 60_000, "headers": {"content-type": "application/json"}}, 400, None),
    ("POST", "/teams", {"json": ["blue"]}, 400, None),
    ("POST", "/teams", {"json": {"name": "x" * BODY_BYTES_MAX}}, 413, None),
    ("POST", "/teams", {"json": {}}, 422, "name"),
    ("POST", "/teams", {"json": {"name": 5}}, 422, "name"),
    ("POST", "/teams", {"json": {"name": "a\x00"}}, 422, "name"),
    ("POST", "/teams", {"json": {"name": "a/b"}}, 422, "name"),
    ("POST", "/teams", {"json": {"name": "<script>"}}, 422, "name"),
    ("POST", "/teams", {"json": {"name": "blue", "admin": True}}, 422, "admin"),
    ("POST", "/teams", {"json": {"name": "red"}}, 409, "name"),
    ("POST", "/teams/red/keys", {"json": {"expires": "0d"}}, 422, "expires"),
    ("POST", "/teams/red/keys", {"json": {"expires": "9999999999w"}}, 422, "expires"),
    ("POST", "/teams/red/keys", {"json": {"name": "a\nb"}}, 422, "name"),
    ("PUT", "/teams/red/budgets/day", {"json": {"limit_micro_usd": -1}}, 422, "limit_micro_usd"),
    ("PUT", "/teams/red/budgets/day", {"json": {"limit_micro_usd": 1.0}}, 422, "limit_micro_usd"),
    ("PUT", "/teams/red/budgets/day", {"json": {"limit_micro_usd": True}}, 422, "limit_micro_usd"),
    ("PUT", "/teams/red/budgets/day", {"json": {"limit_micro_usd": 10**18}}, 422, "limit_micro_usd"),
    ("PUT", "/teams/red/budgets/day", {"json": {"limit_micro_usd": "5"}}, 422, "limit_micro_usd"),
    ("PUT", "/teams/red/budgets/day", {"json": {"limit_micro_usd": 5, "soft": 1}}, 422, "soft"),
    ("PUT", "/teams/red/limit", {"json": {}}, 422, "rpm"),
    ("PUT", "/teams/red/limit", {"json": {"rpm": 1_000_001}}, 422, "rpm"),
    # Methods.
    ("PATCH", "/teams", {}, 405, None),
    ("DELETE", "/teams", {}, 405, None),
    ("POST", "/spend", {"json": {}}, 405, None),
    ("POST", "/openapi.json", {"json": {}}, 405, None),
]


@pytest.mark.parametrize(("method", "path", "options", "status", "field"), BAD, ids=[f"{one[0]} {one[1][:40]}" for one in BAD])
def test_a_problem_names_the_field_and_changes_nothing(
    shared: Office, method: str, path: str, options: dict[str, Any], status: int, field: str | None
) -> None:
    before = shared.rows("/audit")
    problem = shared.refused(status, method, path, **options)
    assert problem.get("field") == field
    assert shared.rows("/audit") == before


def test_another_method_is_told_which_are_right(shared: Office) -> None:
    assert shared.ask("PATCH", "/teams").headers["allow"] == "GET, HEAD, POST"
    assert shared.ask("GET", "/teams/red/limit").headers["allow"] == "DELETE, PUT"
    assert (shared.ask("HEAD", "/teams").status_code, shared.ask("HEAD", "/teams").content) == (200, b"")


def test_an_archived_team_gets_no_key(desk: Office) -> None:
    desk.change("POST", "/teams/red/archive")
    assert desk.refused(409, "POST", "/teams/red/keys", json={})["field"] == "team"
    # Closing it once more changes nothing.
    audited = desk.rows("/audit")
    assert desk.change("POST", "/teams/red/archive")["archived_at"]
    assert desk.rows("/audit") == audited


def test_a_key_is_rotated_once(desk: Office) -> None:
    desk.change("POST", f"/keys/{desk.gateway.key_id}/rotate", 201)
    assert desk.refused(409, "POST", f"/keys/{desk.gateway.key_id}/rotate", json={})["field"] == "key_id"


def test_a_body_without_end_is_given_up(desk: Office) -> None:
    """In chunks, so that no length announces it."""
    head = f"POST {PREFIX}/teams HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Type: application/json\r\n"
    with desk.gateway.connect() as connection:
        connection.sendall(head.encode() + b"Transfer-Encoding: chunked\r\n\r\n")
        sent = 0
        connection.settimeout(30)
        try:
            while sent <= 4 * BODY_BYTES_MAX:
                connection.sendall(b"4000\r\n" + b" " * 0x4000 + b"\r\n")
                sent += 0x4000
        except OSError:
            pass
        assert b" 413 " in _first_line(connection)


def _first_line(connection: socket.socket) -> bytes:
    return connection.makefile("rb").readline()


def test_who_leaves_after_asking_has_asked_all_the_same(desk: Office) -> None:
    body = b'{"name": "blue"}'
    head = (
        f"POST {PREFIX}/teams HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with desk.gateway.connect() as connection:
        connection.sendall(head.encode() + body)
        assert b" 201 " in _first_line(connection)
    assert [row["name"] for row in desk.rows("/teams")] == ["red", "blue"]


def changing_commands() -> set[str]:
    """The commands that take a change to teams, keys, budgets, limits or reviews, such as 'team add'."""
    groups: Any = typer.main.get_command(app)
    rooms = ("team", "key", "budget", "limit", "review")
    return {f"{room} {name}" for room in rooms for name in groups.commands[room].commands if name not in ("list", "show")}


# Of this host, of a start, or read here in another way.
NOT_HERE = {"serve", "demo", "simulator", "ping", "migrate", "doctor"}


def test_every_command_is_here_or_of_a_host() -> None:
    groups: Any = typer.main.get_command(app)
    single = {name for name, command in groups.commands.items() if not hasattr(command, "commands")}
    offered = {operation.path.split("/")[1] for operation in OPERATIONS}
    assert single - NOT_HERE <= offered


def test_a_declaration_is_applied_as_from_a_file(office: Office) -> None:
    toml = '[teams.violet]\nbudgets = { month = "60" }\nlimit = { rpm = 5 }\n'
    planned = office.change("POST", "/apply", toml=toml, dry_run=True)
    assert [step["action"] for step in planned["changes"]] == ["team.add", "budget.set", "limit.set"]
    assert "violet" not in {team["name"] for team in office.rows("/teams")}
    made = office.change("POST", "/apply", toml=toml)
    assert made == {"dry_run": False, "changes": planned["changes"]}
    assert office.change("POST", "/apply", toml=toml) == {"dry_run": False, "changes": []}
    assert office.ask("GET", "/teams/violet").json()["budgets"][0]["limit_micro_usd"] == 60_000_000
    (row,) = [row for row in office.rows("/audit") if row["action"] == "team.add" and row["subject"] == "violet"]
    assert row["actor"] == "admin api"
    office.change("POST", "/apply", toml=toml.replace("rpm = 5", "rpm = 6"), prune=False)
    assert {team["name"] for team in office.rows("/teams") if team["archived_at"] is None} >= {"violet", "red"}


@pytest.mark.parametrize(
    ("toml", "status", "told"),
    [
        ("teams = 1", 422, "teams"),
        ("[teams.red", 422, "not TOML"),
        ("", 422, "no teams"),
        ("a = " + "[" * 20_000, 422, "nested too deeply"),
        ("a = " + "1" * 20_000, 422, "not TOML"),
        ('[teams.red]\nbudgets = { month = "-1" }', 422, "teams.red.budgets.month: "),
        ("[teams.red.keys.key_nobody]\nlimit = { rpm = 1 }", 409, "key_nobody"),
    ],
)
def test_a_declaration_that_cannot_come_true_changes_nothing(office: Office, toml: str, status: int, told: str) -> None:
    problem = office.refused(status, "POST", "/apply", json={"toml": toml})
    assert problem["field"] == "toml"
    assert told in problem["detail"]
    assert ACTOR not in {row["actor"] for row in office.rows("/audit")}


def test_all_that_the_command_line_changes_can_be_changed_here() -> None:
    words = [operation.name.replace("set_team", "set").replace("remove_team", "remove") for operation in OPERATIONS]
    offered = {f"{noun} {verb}" for verb, _, noun in (word.partition("_") for word in words)}
    assert changing_commands() <= offered


def test_texts_are_texts_in_every_answer(office: Office) -> None:
    name = "=1+1 <script>alert(1)</script> שלום 🫘"
    office.change("POST", "/teams", 201, name="日本 team")
    office.change("POST", f"/teams/{quote('日本 team')}/keys", 201, name=name)
    answer = office.ask("GET", "/keys", params={"team": "日本 team"})
    assert answer.json()["data"][0]["name"] == name
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.text.isascii()


def test_the_token_is_asked_for_before_anything_is_told(tmp_path: Path) -> None:
    with open_office(f"sqlite:///{tmp_path / 'books.db'}", tmp_path) as office:
        for path in ("/nothing", "/teams/red", "/teams/green"):
            assert office.ask("PATCH", path, headers={"authorization": "Bearer x"}).status_code == 401
            office.rows("/teams")
