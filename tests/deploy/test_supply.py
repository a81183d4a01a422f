"""What Beanmeter is made of: a bill of materials that others' programs can read, licences that were weighed, and an audit that
doesn't call unseen what it could not look at."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from deploy.supply import licences, materials

ROOT = materials.ROOT

# The wheels that the pages and tables tell of; those of other platforms carry other parts.
pytestmark = pytest.mark.skipif(
    (platform.system(), platform.machine()) != ("Linux", "x86_64"), reason="the page of licences is of Linux on x86-64"
)


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return materials.bill()


def named(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {component["name"].lower().replace("_", "-"): component for component in document["components"]}


def test_the_bill_is_cyclonedx_and_the_same_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    for number in range(2):
        path = tmp_path / "dist" / f"{number}.json"
        monkeypatch.setenv("SOURCE_DATE_EPOCH", str(number))
        monkeypatch.setattr(sys, "argv", ["materials", str(path)])
        assert materials.main() == 0
        written.append(path.read_text("utf-8"))
    assert written[0] == written[1]
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(written[0]) is None


def test_the_validator_sees_what_is_wrong(document: dict[str, Any]) -> None:
    wrong = {**document, "components": [{"name": "without a type"}]}
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(wrong)) is not None


def test_what_is_locked_ships_and_what_is_for_development_does_not(document: dict[str, Any]) -> None:
    found = named(document)
    locked = materials.locked()
    required = {name: c for name, c in found.items() if c["scope"] == "required" and c["purl"].startswith("pkg:pypi/")}
    assert {name: component["version"] for name, component in required.items()} == locked
    for component in required.values():
        assert any(reference.get("hashes") for reference in component["externalReferences"]), component["name"]
    assert not {"pytest", "ruff", "mypy", "hypothesis", "playwright", "cyclonedx-bom"} & found.keys()
    # Packages for other platforms stand in the lock file too.
    assert "colorama" not in found


def test_vendored_files_are_in_it_as_they_are(document: dict[str, Any]) -> None:
    files = {
        part["name"]: part["hashes"][0]["content"]
        for component in document["components"]
        if component["purl"].startswith("pkg:npm/")
        for part in component["components"]
    }
    assert len(files) == 3
    assert files == {name: sha256((ROOT / name).read_bytes()).hexdigest() for name in files}


def test_whoever_needs_and_is_needed_is_in_it(document: dict[str, Any]) -> None:
    refs = {component["bom-ref"] for component in document["components"]} | {materials.PROJECT}
    needs = {entry["ref"]: entry["dependsOn"] for entry in document["dependencies"]}
    assert refs >= needs.keys()
    assert refs >= {need for needed in needs.values() for need in needed}
    assert any(need.startswith("starlette==") for need in needs[materials.PROJECT])
    (uvicorn,) = (ref for ref in refs if ref.startswith("uvicorn=="))
    assert any(need.startswith("h11==") for need in needs[uvicorn])


def test_an_environment_that_is_not_the_locked_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    locked = materials.locked()
    monkeypatch.setattr(materials, "locked", lambda: {**locked, "starlette": "0.0.1"})
    with pytest.raises(materials.NotInstalled, match=r"starlette is installed as .+ and requirements.txt says 0\.0\.1"):
        materials.bill()


# Licences


@pytest.mark.parametrize(
    ("expression", "answer"),
    [
        ("MIT", True),
        ("GPL-3.0-only", False),
        ("Apache-2.0 OR GPL-2.0-only", True),
        ("MIT AND PSF-2.0", True),
        ("MIT AND LGPL-3.0-only", False),
        ("(MIT OR Apache-2.0) AND Unicode-3.0", True),
        ("(MIT OR Apache-2.0) AND GPL-3.0-only", False),
        ("unknown", False),
    ],
)
def test_what_is_permissive(expression: str, answer: bool) -> None:
    assert licences.permissive(expression) is answer


def test_all_that_ships_is_permissive_or_was_weighed(document: dict[str, Any]) -> None:
    assert [component["name"] for component in document["components"] if not licences.allowed(component)] == []


def test_what_is_inside_of_wheels_is_permissive_or_was_weighed(document: dict[str, Any]) -> None:
    for component in document["components"]:
        for part in licences.compiled_in(component):
            assert licences.permissive(licences.licence(part)), (component["name"], part["name"])
        if not component["purl"].startswith("pkg:npm/"):
            copyleft = [name for name in licences.libraries(component) if not licences.permissive(licences.LIBRARIES[name][1])]
            assert not copyleft or component["name"] in licences.WEIGHED, (component["name"], copyleft)


def test_the_page_is_what_the_command_writes(document: dict[str, Any]) -> None:
    text = licences.PAGE.read_text("utf-8")
    assert licences.page(text, document) == text, "run 'make licences'"


# The audit


def test_an_audit_that_can_not_look_fails(tmp_path: Path) -> None:
    """The command of ``make audit``, with its line to the data cut."""
    recipe = re.search(r"^audit:.*\n\t(.+)$", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    assert recipe is not None
    command = recipe[1].replace("$(VENV)/bin", str(Path(sys.executable).parent)).split()
    nowhere = {"HTTPS_PROXY": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9", "NO_PROXY": ""}
    environment = {**os.environ, **nowhere, **{name.lower(): value for name, value in nowhere.items()}}
    environment["PIP_AUDIT_CACHE_DIR"] = environment["XDG_CACHE_HOME"] = str(tmp_path)
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode != 0
    assert "No known vulnerabilities" not in ran.stdout + ran.stderr
