"""The software bill of materials: CycloneDX, of what ships and nothing else.

What ships is what ``requirements.txt`` names for this platform, what the extras of ``pyproject.toml`` add (scope
``optional``), and the files that are vendored with the pages. Names and licences come from the installed packages, by
cyclonedx-py, and so does who needs whom; checksums come from the lock files and the vendored files' own list. The
development tools are left out. The same environment makes the same bytes.

``python -m deploy.supply.materials FILE`` writes it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from base64 import urlsafe_b64decode
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
VENDOR = ROOT / "proxy" / "pages" / "static" / "vendor"
SPEC_VERSION = "1.6"

# How cyclonedx-py calls the project itself.
PROJECT = "root-component"

Component = dict[str, Any]


class NotInstalled(Exception):
    """The environment is not the one that the lock file describes; the message says where they differ."""


def bill() -> dict[str, Any]:
    """The whole document. Raises :class:`NotInstalled`."""
    found = environment()
    components: dict[str, Component] = {canonicalize_name(component["name"]): component for component in found["components"]}
    versions = locked()
    required, extras = wanted()
    needs = needs_of([*required, *extras])
    shipped = {name: _described(components, name, version, "required") for name, version in versions.items()}
    shipped |= {name: _described(components, name, None, "optional") for name in needs.keys() - versions.keys()}
    checksums = locked_checksums()
    for name, component in shipped.items():
        _add_checksums(component, checksums.get(name, ()))
    vendored = list(vendored_components())
    refs = {name: component["bom-ref"] for name, component in shipped.items()}
    direct = [refs[canonicalize_name(item.name)] for item in (*required, *extras)]
    found["components"] = [shipped[name] for name in sorted(shipped)] + vendored
    found["dependencies"] = [
        {"ref": ref, "dependsOn": sorted(refs[need] for need in needs.get(name, ()))} for name, ref in sorted(refs.items())
    ]
    found["dependencies"].append({"ref": PROJECT, "dependsOn": sorted(direct + [part["bom-ref"] for part in vendored])})
    return found


def environment() -> dict[str, Any]:
    """All that is installed beside this interpreter, development tools too, as cyclonedx-py describes it."""
    command = [sys.executable, "-m", "cyclonedx_py", "environment", "--pyproject", str(ROOT / "pyproject.toml")]
    command += ["--mc-type", "application", "--spec-version", SPEC_VERSION, "--output-reproducible"]
    # It would take a while, and it is the finished document that has to be valid.
    command += ["--no-validate", sys.executable]
    # Without it no time is noted, which would be another one at each run.
    inherited = {name: value for name, value in os.environ.items() if name != "SOURCE_DATE_EPOCH"}
    made = subprocess.run(command, check=True, capture_output=True, text=True, env=inherited)  # noqa: S603
    found: dict[str, Any] = json.loads(made.stdout)
    return found


def locked() -> dict[str, str]:
    """The versions of ``requirements.txt``, by name, of what is for this platform."""
    return {name: version for name, version, _ in _pins(ROOT / "requirements.txt")}


def locked_checksums() -> dict[str, list[str]]:
    """SHA-256 of the files that may be installed, by the package's name."""
    return {name: checksums for name, _, checksums in _pins(ROOT / "requirements-full.txt")}


def wanted() -> tuple[list[Requirement], list[Requirement]]:
    """What ``pyproject.toml`` asks for on this platform: always, and with its extras, except for the development tools."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = [line for extra, lines in project["optional-dependencies"].items() if extra != "dev" for line in lines]
    return list(_applying(project["dependencies"])), list(_applying(extras))


def needs_of(start: Iterable[Requirement]) -> dict[str, set[str]]:
    """What these packages need, and what that needs, by name; extras of a package only where somebody here asks for them.
    Raises :class:`NotInstalled`."""
    found: dict[str, set[str]] = {}
    asked = [(canonicalize_name(item.name), frozenset(item.extras)) for item in start]
    for name, extras in asked:
        try:
            needed = list(_applying(metadata.requires(name) or (), extras))
        except metadata.PackageNotFoundError:
            raise NotInstalled(
                f"{name} is not installed, and pyproject.toml or a package in it names it: run 'make lint'"
            ) from None
        found.setdefault(name, set()).update(canonicalize_name(item.name) for item in needed)
        # The list grows while it is walked.
        asked += {(canonicalize_name(item.name), frozenset(item.extras)) for item in needed} - set(asked)
    return found


def _applying(lines: Iterable[str], extras: Iterable[str] = ()) -> Iterator[Requirement]:
    for item in map(Requirement, lines):
        if item.marker is None or any(item.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            yield item


def vendored_components() -> Iterator[Component]:
    """The files of other projects that are served with the pages, from the two lists that stand beside them."""
    checksums = dict(line.split("  ")[::-1] for line in (VENDOR / "checksums.txt").read_text("ascii").splitlines())
    rows = re.findall(
        r"^\| `(\S+)` \| (\S+) \| (\S+) \| .* \| \[(\S+)\]", (VENDOR / "README.md").read_text("utf-8"), re.MULTILINE
    )
    assert len(rows) == len(checksums), "each vendored file has a row and a checksum"
    for file, package, version, licence in rows:
        purl = f"pkg:npm/{package.replace('@', '%40')}@{version}"
        yield {
            "bom-ref": f"{package}=={version}",
            "type": "library",
            "name": package,
            "version": version,
            "purl": purl,
            "scope": "required",
            "licenses": [{"license": {"id": licence, "acknowledgement": "declared"}}],
            "components": [_file(str((VENDOR / file).relative_to(ROOT)), checksums[file], purl)],
        }


def _described(components: dict[str, Component], name: str, version: str | None, scope: str) -> Component:
    component = components.get(name)
    if component is None or version not in (None, component["version"]):
        found = "is not installed" if component is None else f"is installed as {component['version']}"
        raise NotInstalled(f"{name} {found}, and requirements.txt says {version}: run 'make install'")
    # What extras of a package others asked for depends on the development tools.
    component.pop("properties", None)
    component["scope"] = scope
    if carried := list(_carried(component)):
        component["components"] = sorted(carried, key=lambda part: str(part["bom-ref"]))
    return component


def _carried(component: Component) -> Iterator[Component]:
    """What a wheel has in it of others: the parts that its own bill of materials names, and shared libraries."""
    owner: str = component["purl"]
    seen = {owner}
    for entry in metadata.files(component["name"]) or ():
        if entry.parts[0].endswith(".libs") and entry.hash is not None:
            yield _file(entry.name, urlsafe_b64decode(f"{entry.hash.value}=").hex(), owner)
        elif entry.parts[1:2] == ("sboms",) and entry.suffix == ".json":
            for part in json.loads(entry.read_text())["components"]:
                reference = f"{owner}#{part['purl']}"
                # Each of them names the wheel itself, too.
                if reference not in seen and canonicalize_name(part["name"]) != canonicalize_name(component["name"]):
                    seen.add(reference)
                    kept = {name: part[name] for name in ("type", "name", "version", "purl", "licenses") if name in part}
                    yield {**kept, "bom-ref": reference}


def _add_checksums(component: Component, checksums: Iterable[str]) -> None:
    hashes = [{"alg": "SHA-256", "content": checksum} for checksum in sorted(checksums)]
    if hashes:
        comment = "the files that the lock file accepts, one for each platform"
        reference = {"type": "distribution", "url": component["purl"], "comment": comment, "hashes": hashes}
        component.setdefault("externalReferences", []).append(reference)


def _file(name: str, sha256: str, owner: str) -> Component:
    return {
        "bom-ref": f"{owner}#{name}",
        "type": "file",
        "name": name,
        "hashes": [{"alg": "SHA-256", "content": sha256}],
    }


def _pins(path: Path) -> Iterator[tuple[str, str, list[str]]]:
    """Name, version and checksums of each package that a lock file has for this platform."""
    for entry in path.read_text("utf-8").replace("\\\n", "").splitlines():
        if not entry or entry.startswith("#"):
            continue
        pinned, *checksums = entry.split("--hash=sha256:")
        requirement = Requirement(pinned)
        if requirement.marker is None or requirement.marker.evaluate():
            (version,) = requirement.specifier
            yield canonicalize_name(requirement.name), version.version, [checksum.strip() for checksum in checksums]


def main() -> int:
    (path,) = map(Path, sys.argv[1:])
    try:
        document = bill()
    except NotInstalled as reason:
        print(reason, file=sys.stderr)
        return 1
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", "utf-8")
    print(f"{path}: {len(document['components'])} components")
    return 0


if __name__ == "__main__":
    sys.exit(main())
