"""The licences of what ships, as the tables of docs/licences.md, and the rule that they are held to.

``python -m deploy.supply.licences`` writes the tables anew. What is neither permissive nor named here as an exception
has to be weighed before it ships, and a test fails until it is.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deploy.supply.materials import ROOT, NotInstalled, bill

PAGE = ROOT / "docs" / "licences.md"

# Use, change and pass on, for the price of a notice.
PERMISSIVE = {
    *("0BSD", "Apache-2.0", "Apache-2.0 WITH LLVM-exception", "BSD-2-Clause", "BSD-3-Clause", "ISC", "MIT", "MIT-0"),
    *("PSF-2.0", "Unicode-3.0", "Unicode-DFS-2016", "Zlib"),
    # Of shared libraries alone.
    *("BSD-4-Clause", "OLDAP-2.8", "PostgreSQL"),
}

# What says nothing exact of its licence, each as its licence file has it.
READ = {"Jinja2": "BSD-3-Clause", "openssl": "Apache-2.0", "protobuf": "BSD-3-Clause"}

# Not permissive in the strict sense, and weighed: docs/decisions/supply-chain.md. certifi comes with the extra for traces.
WEIGHED = {"psycopg": "LGPL-3.0-only", "psycopg-binary": "LGPL-3.0-only", "certifi": "MPL-2.0"}

# The shared libraries in wheels, which the wheels say nothing about: whose they are, and under what.
LIBRARIES = {
    "libcom_err": ("e2fsprogs and MIT Kerberos", "MIT"),
    "libcrypt": ("the GNU C library", "LGPL-2.1-or-later"),
    "libcrypto": ("OpenSSL", "Apache-2.0"),
    "libgssapi_krb5": ("MIT Kerberos", "MIT"),
    "libk5crypto": ("MIT Kerberos", "MIT"),
    "libkeyutils": ("keyutils", "LGPL-2.0-or-later"),
    "libkrb5": ("MIT Kerberos", "MIT"),
    "libkrb5support": ("MIT Kerberos", "MIT"),
    "liblber": ("OpenLDAP", "OLDAP-2.8"),
    "libldap": ("OpenLDAP", "OLDAP-2.8"),
    "libpq": ("PostgreSQL", "PostgreSQL"),
    "libsasl2": ("Cyrus SASL", "BSD-4-Clause"),
    "libssl": ("OpenSSL", "Apache-2.0"),
}


def licence(component: dict[str, Any]) -> str:
    """What a component is under, as an SPDX expression where it says so in one."""
    said = component.get("licenses", [])
    # Beside an identifier a classifier only repeats it in other words.
    exact = [entry.get("expression") or entry["license"].get("id") for entry in said]
    if any(exact):
        return " AND ".join(sorted({name for name in exact if name}))
    return READ.get(component["name"], "unknown")


def permissive(expression: str) -> bool:
    """Whether an SPDX expression leaves a permissive choice."""
    inner = re.compile(r"\(([^()]*)\)")
    while found := inner.search(expression):
        kept = "MIT" if permissive(found[1]) else "no"
        expression = expression[: found.start()] + kept + expression[found.end() :]
    choices = expression.split(" OR ")
    return any(all(name.strip() in PERMISSIVE for name in choice.split(" AND ")) for choice in choices)


def allowed(component: dict[str, Any]) -> bool:
    """Whether a component is permissive, or was weighed under the licence that it still has."""
    found = licence(component)
    return permissive(found) or WEIGHED.get(component["name"]) == found


def compiled_in(component: dict[str, Any]) -> list[dict[str, Any]]:
    """The parts that a wheel's own bill of materials names, but for packages of the system that it was built on: these are
    in it as shared libraries."""
    parts = component.get("components", [])
    return [part for part in parts if part["type"] != "file" and not part["purl"].startswith("pkg:rpm/")]


def libraries(component: dict[str, Any]) -> list[str]:
    """The shared libraries in a wheel, without its digest of each and their versions."""
    files = [part["name"] for part in component.get("components", []) if part["type"] == "file"]
    return sorted({re.split(r"-[0-9a-f]{8}\.|\.so", name)[0] for name in files})


def tables(document: dict[str, Any]) -> dict[str, list[str]]:
    """The lines of each table by the title that it stands under."""
    return {
        "Packages": ["| package | version | | licence |", "| --- | --- | --- | --- |", *_packages(document)],
        "Inside of wheels": ["| in | what | whose | licence |", "| --- | --- | --- | --- |", *_inside(document)],
    }


def _packages(document: dict[str, Any]) -> Iterator[str]:
    for component in document["components"]:
        comes = "with an extra" if component["scope"] == "optional" else "always"
        if component["purl"].startswith("pkg:npm/"):
            comes = "vendored with the pages"
        yield f"| {component['name']} | {component['version']} | {comes} | {licence(component)} |"


def _inside(document: dict[str, Any]) -> Iterator[str]:
    for component in document["components"]:
        if component["purl"].startswith("pkg:npm/"):
            continue
        by_licence: dict[str, list[str]] = {}
        for part in compiled_in(component):
            by_licence.setdefault(licence(part), []).append(part["name"])
        for expression, names in sorted(by_licence.items()):
            what = f"{len(names)} parts, such as {names[0]}" if len(names) > 1 else names[0]
            yield f"| {component['name']} | {what} | | {expression} |"
        for name in libraries(component):
            owner, expression = LIBRARIES[name]
            yield f"| {component['name']} | {name} | {owner} | {expression} |"


def page(text: str, document: dict[str, Any]) -> str:
    """The page with its tables as they have to be."""
    for title, lines in tables(document).items():
        found = re.findall(rf"^## {re.escape(title)}\n.*?\n((?:^\|[^\n]*\n)+)", text, re.MULTILINE | re.DOTALL)
        assert len(found) == 1, f"there is one section {title!r}"
        text = text.replace(found[0], "".join(f"{line}\n" for line in lines))
    return text


def main() -> int:
    try:
        document = bill()
    except NotInstalled as reason:
        print(reason, file=sys.stderr)
        return 1
    PAGE.write_text(page(PAGE.read_text("utf-8"), document), "utf-8")
    others = [f"{component['name']}: {licence(component)}" for component in document["components"] if not allowed(component)]
    print("\n".join(others) or f"{Path(PAGE).relative_to(ROOT)}: all permissive, or weighed")
    return 1 if others else 0


if __name__ == "__main__":
    sys.exit(main())
