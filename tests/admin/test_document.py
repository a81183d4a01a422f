"""The description of the API is true: what it says is what a server answers, to a tool that tries to find where not."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import httpx2
import pytest

from proxy.admin import PREFIX
from proxy.admin.operations import ACTOR, OPERATIONS
from proxy.admin.reference import render
from tests.admin.office import TOKEN, Office
from tests.live import ORDER

SEED = "1"
EXAMPLES = "8"

# What a description can be wrong about. Whether each valid request succeeds depends on the books.
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "unsupported_method",
    "allow_header_conformance",
)

# A run takes half a minute on a slow machine.
HANGS_SECONDS = 300


def described(office: Office) -> dict[str, Any]:
    document: dict[str, Any] = office.read("/openapi.json")
    return document


def with_names(document: dict[str, Any], names: dict[str, list[str]]) -> dict[str, Any]:
    """The document with names that are in the books, so that a tool gets further than to a 404."""
    for path in document["paths"].values():
        for operation in path.values():
            for parameter in operation.get("parameters", ()):
                if parameter["in"] == "path" and parameter["name"] in names:
                    parameter["schema"] = {"type": "string", "enum": names[parameter["name"]]}
                    parameter.pop("example", None)
    return document


def try_all(office: Office, document: dict[str, Any], directory: Path, tag: str, token: str) -> None:
    """Let Schemathesis try everything under a tag; it fails where the description is wrong."""
    (directory / "openapi.json").write_text(json.dumps(document))
    command = [sys.executable, "-m", "schemathesis.cli", "run", "openapi.json", "--url", str(office.client.base_url)]
    command += ["--header", f"Authorization: Bearer {token}", "--include-tag", tag, "--seed", SEED]
    command += ["--max-examples", EXAMPLES, "--generation-database", "none", "--phases", "examples,coverage,fuzzing"]
    command += ["--checks", ",".join(CHECKS), "--no-color"]
    ran = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=HANGS_SECONDS, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    tested = sum(tag in operation["tags"] for path in document["paths"].values() for operation in path.values())
    assert re.search(rf"Tested: {tested}\b", ran.stdout), ran.stdout


def test_the_admin_api_answers_as_it_is_described(office: Office, tmp_path: Path) -> None:
    reviews = [office.review()["id"] for _ in range(3)]
    keys = [office.gateway.key_id, *(office.gateway.add_team(name)[0] for name in ("blue team", "green"))]
    names = {"team": ["red", "blue team", "none"], "key_id": [*keys, "key_none"], "charge_id": [*reviews, "chg_none"]}
    try_all(office, with_names(described(office), names), tmp_path, "Admin", TOKEN)
    done = {row["action"] for row in office.read("/audit", limit=1000)["data"] if row["actor"] == ACTOR}
    # It was not refused at the door: it has made, changed and ended something of everything.
    assert done >= {"team.add", "team.archive", "key.add", "key.revoke", "budget.set", "budget.remove", "limit.set"}
    assert done & {"review.settle", "review.release"}


def test_what_clients_read_is_answered_as_it_is_described(desk: Office, tmp_path: Path) -> None:
    assert desk.gateway.client.post("/images/generations", json=ORDER).status_code == 200
    desk.gateway.set_budget(1_000_000)
    document = with_names(described(desk), {"model": ["gpt-image-2", "other"]})
    try_all(desk, document, tmp_path, "Clients", desk.gateway.key)
    try_all(desk, document, tmp_path, "Description", "none")


def test_every_operation_is_described_once(shared: Office) -> None:
    document = described(shared)
    listed = {(path, method) for path, methods in document["paths"].items() for method in methods}
    assert {(PREFIX + one.path, one.method.lower()) for one in OPERATIONS} <= listed
    assert {path for path, _ in listed if path.startswith("/v1/")} == {
        "/v1/models",
        "/v1/models/{model}",
        "/v1/budget",
        "/v1/prices",
        "/v1/organization/usage/images",
        "/v1/organization/costs",
    }
    names = [operation["operationId"] for methods in document["paths"].values() for operation in methods.values()]
    assert len(names) == len(set(names))
    assert document["openapi"].startswith("3.1.")
    for kind, name in re.findall(r'"#/components/(\w+)/(\w+)"', json.dumps(document)):
        assert name in document["components"][kind]


@pytest.mark.parametrize("path", ["/openapi.json", "/docs", "/docs.css"])
def test_it_is_read_without_a_token(shared: Office, path: str) -> None:
    answer = httpx2.get(f"{shared.client.base_url}{PREFIX}{path}", trust_env=False)
    assert answer.status_code == 200
    assert TOKEN not in answer.text
    assert shared.gateway.key not in answer.text


class Page(HTMLParser):
    """What a browser would find in a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def values(self, name: str) -> list[str]:
        return [attributes[name] or "" for _, attributes in self.elements if name in attributes]


def test_the_reference_is_read_offline(shared: Office) -> None:
    answer = shared.ask("GET", "/docs")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    page = Page(answer.text)
    assert not {"script", "style", "iframe", "img", "form"} & {tag for tag, _ in page.elements}
    assert not [name for _, attributes in page.elements for name in attributes if name == "style" or name.startswith("on")]
    places = page.values("id")
    assert len(places) == len(set(places))
    for link in page.values("href"):
        if link.startswith("#"):
            assert link[1:] in places
        else:
            assert shared.ask("GET", f"/{link}").status_code == 200
    assert {operation.name for operation in OPERATIONS} <= set(places)
    assert shared.ask("GET", "/docs.css").headers["content-type"].startswith("text/css")


def test_texts_of_the_description_are_no_markup() -> None:
    evil = '"><script>alert(1)</script>'
    operation = {
        "operationId": evil,
        "tags": [evil],
        "summary": evil,
        "security": [{evil: []}],
        "parameters": [{"name": evil, "in": evil, "description": evil, "schema": {"type": evil, "default": evil}}],
        "requestBody": {"content": {evil: {"schema": {"$ref": evil}}}},
        "responses": {"200": {"description": evil, "content": {evil: {"schema": {"enum": [evil]}}}}},
    }
    document = {
        "info": {"title": evil, "version": evil, "summary": evil, "description": evil},
        "tags": [{"name": evil, "description": evil}],
        "paths": {evil: {"get": operation}},
        "components": {
            "securitySchemes": {evil: {"description": evil}},
            "responses": {},
            "schemas": {evil: {"description": evil, "properties": {evil: {"type": evil, "description": evil}}}},
        },
    }
    assert "script" not in {tag for tag, _ in Page(render(document)).elements}


def test_it_is_described_only_where_somebody_asks() -> None:
    """A gateway that nobody asks does not carry what describes it."""
    program = "import sys, proxy.app; print('proxy.admin.answers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout == "False\n"
