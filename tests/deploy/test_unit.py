"""The systemd unit: as systemd reads it, and held against the program."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from proxy import settings
from proxy.cli.failures import WRONG_SETTINGS
from proxy.settings import PREFIX, SECRETS, Settings
from proxy.supervisor import MARGIN_SECONDS
from tests.deploy.programs import DEPLOY, program

UNIT = DEPLOY / "systemd" / "beanmeter.service"
FILE = DEPLOY / "systemd" / "beanmeter.toml"

# What 'systemd-analyze security' calls it: 0 is shut in entirely, 10 not at all. It is measured in tenths of that.
EXPOSURE_MAX = 15


def lines_of(path: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, value in re.findall(r"^(\w+)=(.*)$", path.read_text("utf-8"), re.MULTILINE):
        found.setdefault(name, []).append(value)
    return found


def environment() -> dict[str, str]:
    return dict(line.split("=", 1) for line in lines_of(UNIT)["Environment"])


def installed(place: Path) -> Path:
    """The unit with a program that exists in place of the one that an installation brings."""
    text = UNIT.read_text("utf-8")
    assert text.count("/opt/beanmeter/bin/beanmeter") == 1
    unit = place / UNIT.name
    unit.write_text(text.replace("/opt/beanmeter/bin/beanmeter", program("true", "every system")))
    return unit


def test_systemd_reads_every_line(tmp_path: Path) -> None:
    analyze = program("systemd-analyze", "the Debian package systemd")
    unit = installed(tmp_path)
    ran = subprocess.run([analyze, "verify", "--man=no", "--generators=no", unit], capture_output=True, text=True, check=False)
    # It warns of lines that it does not know, and goes on.
    assert (ran.returncode, ran.stderr) == (0, "")


def test_it_is_shut_in(tmp_path: Path) -> None:
    analyze = program("systemd-analyze", "the Debian package systemd")
    command = [analyze, "security", "--offline=true", f"--threshold={EXPOSURE_MAX}", "--no-pager", str(installed(tmp_path))]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout


def test_every_setting_exists_and_every_secret_is_a_credential() -> None:
    names = environment()
    known = {f"{PREFIX}{field.upper()}" for field in Settings.model_fields} | {settings.CONFIG}
    files = {f"{PREFIX}{field.upper()}_FILE" for field in SECRETS}
    assert names.keys() <= known | files
    # What is in the environment everybody on the machine may see.
    assert not names.keys() & {name.removesuffix("_FILE") for name in files}
    credentials = dict(line.split(":") for line in lines_of(UNIT)["LoadCredential"])
    assert {name: value for name, value in names.items() if name.endswith("_FILE")} == {
        f"{PREFIX}{name.upper().replace('-', '_')}_FILE": f"%d/{name}" for name in credentials
    }
    assert all(Path(path).parent == Path("/etc/beanmeter") for path in credentials.values())


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_the_settings_are_those_of_the_program(database: str, tmp_path: Path) -> None:
    assert environment()[settings.CONFIG] == f"/etc/beanmeter/{FILE.name}"
    written = FILE.read_text("utf-8")
    if database == "postgresql":
        # As the file itself says: one line in place of the other.
        lines = [line for line in written.splitlines() if not line.startswith("database_url =")]
        written = "\n".join(line.removeprefix("# ") if "database_url_file" in line else line for line in lines)
    (tmp_path / FILE.name).write_text(written.replace("/etc/beanmeter", str(tmp_path)))
    (tmp_path / "database-url").write_text("postgresql://beanmeter@db/beanmeter\n")
    # The credentials where systemd would put them.
    for name in ("upstream-key", "admin-token"):
        (tmp_path / name).write_text("a-secret\n")
    places = {"%d": str(tmp_path), "%S": "/var/lib", "/etc/beanmeter": str(tmp_path)}
    environ = environment()
    for old, new in places.items():
        environ = {name: value.replace(old, new) for name, value in environ.items()}
    found = settings.load(environ, tmp_path)
    urls = {"sqlite": "sqlite:////var/lib/beanmeter/beanmeter.db", "postgresql": "postgresql://beanmeter@db/beanmeter"}
    assert found.database_url.get_secret_value() == urls[database]
    assert found.state_dir == Path("/var/lib/beanmeter/state")
    assert settings.cautions(found) == ()
    # Commands have the file alone, and have to work on the same database.
    commands = settings.load({settings.CONFIG: environ[settings.CONFIG]}, tmp_path)
    assert commands.database_url == found.database_url


def test_what_is_being_made_is_waited_for() -> None:
    written = tomllib.loads(FILE.read_text("utf-8"))
    (stop,) = lines_of(UNIT)["TimeoutStopSec"]
    assert written["upstream_timeout_seconds"] < written["drain_seconds"]
    assert written["drain_seconds"] + MARGIN_SECONDS < int(stop)
    assert lines_of(UNIT)["KillMode"] == ["mixed"]


def test_what_a_new_start_does_not_mend_is_not_started_again() -> None:
    (prevented,) = lines_of(UNIT)["RestartPreventExitStatus"]
    assert [int(status) for status in prevented.split()] == [2, WRONG_SETTINGS]
