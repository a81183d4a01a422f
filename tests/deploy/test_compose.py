"""The compose file and its presets: read as an engine reads them, held against the program and the tree; and each command of
ours run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml

import proxy
from proxy import settings
from proxy.ledger import accounts
from proxy.ledger.engine import Database
from proxy.settings import CONFIG, PREFIX, SECRETS, Settings
from proxy.supervisor import MARGIN_SECONDS
from tests.deploy.programs import DEPLOY, ROOT
from tests.deploy.test_image import IMAGE
from tests.live import ORDER, PATIENCE_SECONDS, now, wait_for
from tests.ports import free_port

COMPOSE = ROOT / "docker-compose.yml"
PRESETS = DEPLOY / "compose"
STATE = "/var/lib/beanmeter"
SECRETS_DIR = "/run/secrets"

PROFILES = {
    "": {"gateway"},
    "postgres": {"migrate", "postgres"},
    "demo": {"simulator"},
    "observability": {"prometheus", "alertmanager", "grafana"},
}

_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")

Service = dict[str, Any]


def preset(name: str) -> dict[str, str]:
    """The variables of a preset, as ``.env`` would set them."""
    lines = (PRESETS / f"{name}.env").read_text("utf-8").splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def read(variables: Mapping[str, str]) -> dict[str, Any]:
    """The compose file with these variables, and its defaults for all others."""
    text = _VARIABLE.sub(lambda found: variables.get(found[1]) or found[2], COMPOSE.read_text("utf-8"))
    document: dict[str, Any] = yaml.safe_load(text)
    return document


DEFAULT = read({})
SERVICES: dict[str, Service] = DEFAULT["services"]
OURS = sorted(name for name, service in SERVICES.items() if service["image"].startswith("beanmeter"))


def started(profiles: str) -> set[str]:
    """The services that come up with these profiles."""
    wanted = set(profiles.split(","))
    return {name for name, service in SERVICES.items() if not service.get("profiles") or wanted & set(service["profiles"])}


def seconds(value: str) -> int:
    assert value.endswith("s")
    return int(value.removesuffix("s"))


# As it is written


def test_each_profile_brings_what_it_is_for() -> None:
    for profile, services in PROFILES.items():
        assert started(profile) == PROFILES[""] | services
    assert set().union(*PROFILES.values()) == SERVICES.keys()


def test_there_is_one_gateway_whatever_is_chosen() -> None:
    # One name to scrape, to call and to work in; which database it has is decided beside it.
    assert [name for name in OURS if SERVICES[name]["command"][0] == "serve"] == ["gateway"]


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_a_service_is_shut_in_and_pinned(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "cap_add", "devices", "pid", "ipc"} & service.keys()
    assert re.search(r":v?\d+\.\d+(\.\d+)?$", service["image"])
    assert service.get("network_mode") in (None, "service:gateway")
    # To this machine alone: what speaks plain HTTP is not for others.
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))


def test_our_image_is_this_release_built_from_our_recipe() -> None:
    for name in OURS:
        assert SERVICES[name]["image"] == f"beanmeter:{proxy.__version__}"
        assert (ROOT / SERVICES[name]["build"]["context"] / SERVICES[name]["build"]["dockerfile"]).is_file()


@pytest.mark.parametrize("name", OURS)
def test_every_setting_is_the_program_s_own(name: str) -> None:
    known = {f"{PREFIX}{field.upper()}" for field in Settings.model_fields} | {CONFIG}
    known |= {f"{PREFIX}{field.upper()}_FILE" for field in SECRETS}
    names = {key for key in SERVICES[name].get("environment", {}) if key.startswith(PREFIX)}
    assert names <= known
    # A secret in the environment is seen by whoever may inspect a container.
    assert not names & {f"{PREFIX}{field.upper()}" for field in SECRETS}


def test_an_identity_provider_is_added_with_every_setting_it_has() -> None:
    added = yaml.safe_load((PRESETS / "oidc.yml").read_text("utf-8"))
    ours = {f"{PREFIX}{field.upper()}" for field in Settings.model_fields if field.startswith("oidc_")}
    (gateway,) = added["services"].values()
    secret = f"{PREFIX}OIDC_CLIENT_SECRET"
    assert gateway["environment"].keys() == ours - {secret} | {f"{secret}_FILE"}
    assert added["services"].keys() == {"gateway"}
    assert gateway["environment"][f"{secret}_FILE"] == f"{SECRETS_DIR}/{gateway['secrets'][0]}"
    assert added["secrets"] == {name: {"file": f"./secrets/{name}"} for name in gateway["secrets"]}
    # Beside those of the file that it is added to, and in place of none.
    assert not gateway["environment"].keys() & SERVICES["gateway"]["environment"].keys()
    assert not added["secrets"].keys() & DEFAULT["secrets"].keys()


def test_traces_are_added_with_what_the_manual_names() -> None:
    added = yaml.safe_load((PRESETS / "traces.yml").read_text("utf-8"))
    assert added.keys() == {"services"}
    assert added["services"].keys() == {"gateway"}
    given = added["services"]["gateway"]["environment"]
    manual = (ROOT / "docs" / "observability.md").read_text("utf-8")
    assert given.keys() == {f"{PREFIX}TRACES", *re.findall(r"`(OTEL_[A-Z_]+)`", manual)}
    assert given[f"{PREFIX}TRACES"] == "true"
    # Without a receiver it does not start; the rest has no value but what `.env` gives it.
    assert given["OTEL_EXPORTER_OTLP_ENDPOINT"].startswith("${OTEL_EXPORTER_OTLP_ENDPOINT:?")
    assert {name for name, value in given.items() if value is not None} == {f"{PREFIX}TRACES", "OTEL_EXPORTER_OTLP_ENDPOINT"}
    assert not given.keys() & SERVICES["gateway"]["environment"].keys()


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_every_secret_is_a_file_that_the_service_has(name: str) -> None:
    service = SERVICES[name]
    files = {value for key, value in service.get("environment", {}).items() if key.endswith("_FILE")}
    assert files == {f"{SECRETS_DIR}/{secret}" for secret in service.get("secrets", ())}
    assert set(service.get("secrets", ())) <= DEFAULT["secrets"].keys()


@pytest.mark.parametrize("variables", [{}, preset("postgres"), preset("demo")], ids=["sqlite", "postgres", "demo"])
def test_a_secret_s_file_is_in_the_tree_or_is_the_operator_s(variables: dict[str, str]) -> None:
    for name, secret in read(variables)["secrets"].items():
        path = ROOT / secret["file"]
        assert path.is_file() or path == ROOT / "secrets" / name


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_what_is_mounted_is_there(name: str) -> None:
    for volume in SERVICES[name].get("volumes", ()):
        source, _, rest = volume.partition(":")
        if source.startswith("."):
            assert (ROOT / source).exists(), source
            assert rest.endswith(":ro")
        else:
            assert source in DEFAULT["volumes"]
    # Where something is mounted into a read-only root, the directory has to be there: a volume's is the image's own.
    assert name not in OURS or [volume for volume in SERVICES[name].get("volumes", ()) if not volume.endswith(STATE)] == []


def test_a_preset_sets_what_the_file_reads() -> None:
    names = {found[1] for found in _VARIABLE.finditer(COMPOSE.read_text("utf-8"))}
    for path in PRESETS.glob("*.env"):
        chosen = preset(path.stem)
        assert chosen.keys() <= names | {"COMPOSE_PROFILES", "COMPOSE_PROJECT_NAME"}
        assert set(chosen["COMPOSE_PROFILES"].split(",")) <= PROFILES.keys()
    # What it made up must not get into real books.
    assert preset("demo")["COMPOSE_PROJECT_NAME"] != DEFAULT["name"]


def test_the_gateway_s_port_and_health_check_are_the_program_s() -> None:
    gateway = SERVICES["gateway"]
    (port,) = gateway["ports"]
    assert port.endswith(f":{IMAGE.one('EXPOSE')}")
    assert gateway["healthcheck"]["test"] == ["CMD", "beanmeter", "ping"]
    # The image's own check would ask a server that these don't have.
    assert all(SERVICES[name]["healthcheck"] == {"disable": True} for name in OURS if name != "gateway")


def test_what_is_being_made_is_waited_for() -> None:
    gateway = SERVICES["gateway"]
    longest, drain = (float(gateway["environment"][f"{PREFIX}{name}_SECONDS"]) for name in ("UPSTREAM_TIMEOUT", "DRAIN"))
    assert longest < drain
    assert drain + MARGIN_SECONDS < seconds(gateway["stop_grace_period"])


def test_what_waits_for_what_can_be_waited_for() -> None:
    assert SERVICES["gateway"]["depends_on"] == {"migrate": {"condition": "service_completed_successfully", "required": False}}
    assert SERVICES["migrate"]["depends_on"] == {"postgres": {"condition": "service_healthy"}}
    assert SERVICES["migrate"]["profiles"] == SERVICES["postgres"]["profiles"]
    assert "test" in SERVICES["postgres"]["healthcheck"]


def test_those_who_watch_find_whom_they_watch() -> None:
    watching = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text("utf-8"))
    jobs = {job["job_name"]: job for job in watching["scrape_configs"]}
    targets = [target for entry in jobs["beanmeter"]["static_configs"] for target in entry["targets"]]
    assert targets == [f"gateway:{IMAGE.one('EXPOSE')}"]
    (told,) = watching["alerting"]["alertmanagers"]
    (alertmanager,) = told["static_configs"][0]["targets"]
    assert SERVICES["alertmanager"]["ports"] == [f"127.0.0.1:{alertmanager.partition(':')[2]}:9093"]
    # Each file is where the program is told to look for it.
    for name in ("prometheus", "alertmanager"):
        (option,) = [word for word in SERVICES[name]["command"] if word.startswith("--config.file=")]
        assert f"./deploy/prometheus/{name}.yml:{option.partition('=')[2]}:ro" in SERVICES[name]["volumes"]
    rules = {
        f"./deploy/prometheus/{Path(pattern).parent}:/etc/prometheus/{Path(pattern).parent}:ro"
        for pattern in watching["rule_files"]
    }
    assert rules <= set(SERVICES["prometheus"]["volumes"])


def test_grafana_finds_its_dashboards_and_its_source() -> None:
    provisioning = DEPLOY / "grafana" / "provisioning"
    (places,) = [yaml.safe_load(path.read_text("utf-8"))["providers"] for path in (provisioning / "dashboards").glob("*.y*ml")]
    mounted = {volume.split(":")[1]: volume.split(":")[0] for volume in SERVICES["grafana"]["volumes"]}
    for place in places:
        assert list((ROOT / mounted[place["options"]["path"]]).glob("*.json"))
    (sources,) = [
        yaml.safe_load(path.read_text("utf-8"))["datasources"] for path in (provisioning / "datasources").glob("*.y*ml")
    ]
    for source in sources:
        host, port = source["url"].removeprefix("http://").split(":")
        assert SERVICES[host]["ports"] == [f"127.0.0.1:{port}:{port}"]


# As it works


class Place:
    """Where the commands of services run here: their paths under a directory, their ports free ones of this machine."""

    def __init__(self, directory: Path, variables: Mapping[str, str]) -> None:
        self.directory = directory
        self.document = read(variables)
        (directory / "state").mkdir()
        (directory / "secrets").mkdir()

    def secret(self, name: str, text: str | None = None) -> None:
        """A secret's file as the service sees it: the one in the tree, or what its operator wrote."""
        text = (ROOT / self.document["secrets"][name]["file"]).read_text("utf-8") if text is None else text
        (self.directory / "secrets" / name).write_text(text.replace(STATE, str(self.directory / "state")))

    def environment(self, name: str, **more: str) -> dict[str, str]:
        given = {**IMAGE.environment, **self.document["services"][name].get("environment", {}), **more}
        own = {key: value for key, value in given.items() if key.startswith(PREFIX)}
        inside = {key: value.replace(SECRETS_DIR, str(self.directory / "secrets")) for key, value in own.items()}
        inside = {key: value.replace(STATE, str(self.directory / "state")) for key, value in inside.items()}
        return {**os.environ, "PYTHONPATH": str(ROOT), **inside}

    def command(self, name: str, **replaced: str) -> list[str]:
        words = [replaced.get(f"_{word}", word) for word in self.document["services"][name]["command"]]
        return [sys.executable, "-m", "proxy.cli", *words]

    @contextmanager
    def running(self, name: str, **more: str) -> Iterator[subprocess.Popen[bytes]]:
        with (self.directory / f"{name}.log").open("wb") as log:
            command = self.command(name, **more)
            process = subprocess.Popen(command, cwd=self.directory / "state", env=self.environment(name, **more), stderr=log)
        try:
            yield process
        finally:
            process.terminate()
            assert process.wait(PATIENCE_SECONDS) == 0, (self.directory / f"{name}.log").read_text()

    def run(self, name: str, command: list[str] | None = None, **more: str) -> subprocess.CompletedProcess[str]:
        words = self.command(name) if command is None else [sys.executable, "-m", "proxy.cli", *command]
        return subprocess.run(
            words,
            cwd=self.directory,
            env=self.environment(name, **more),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def healthy(self, **more: str) -> bool:
        _, program, *words = self.document["services"]["gateway"]["healthcheck"]["test"]
        assert program == "beanmeter"
        return self.run("gateway", words, **more).returncode == 0


def test_the_demo_makes_an_image(tmp_path: Path) -> None:
    place = Place(tmp_path, preset("demo"))
    for name in SERVICES["gateway"]["secrets"]:
        place.secret(name)
    # What the two agree on in the file, with another number here.
    agreed = SERVICES["simulator"]["command"][-1]
    upstream = place.document["services"]["gateway"]["environment"]["BEANMETER_UPSTREAM_URL"]
    assert upstream == f"http://127.0.0.1:{agreed}/v1"
    simulator, gateway = str(free_port()), str(free_port())
    own = {
        "BEANMETER_UPSTREAM_URL": upstream.replace(agreed, simulator),
        "BEANMETER_HOST": "127.0.0.1",
        "BEANMETER_PORT": gateway,
    }
    with place.running("simulator", **{f"_{agreed}": simulator}), place.running("gateway", **own) as process:

        def healthy() -> bool | None:
            assert process.poll() is None, (tmp_path / "gateway.log").read_text()
            return place.healthy(**own) or None

        wait_for(healthy)
        database = Database(f"sqlite:///{tmp_path / 'state' / 'beanmeter.db'}")
        with database.writing() as connection:
            accounts.add_team(connection, "design", now=now(), actor="test")
            key = accounts.add_key(connection, "design", now=now(), actor="test").key
        database.close()
        with httpx2.Client(headers={"authorization": f"Bearer {key}"}, timeout=PATIENCE_SECONDS, trust_env=False) as client:
            answer = client.post(f"http://127.0.0.1:{gateway}/v1/images/generations", json=ORDER)
        assert answer.status_code == 200
    assert not place.healthy(**own)


@pytest.mark.postgres
def test_postgresql_is_migrated_before_the_gateway_starts(postgres_database: str, tmp_path: Path) -> None:
    place = Place(tmp_path, preset("postgres"))
    place.secret("database-url", postgres_database)
    for found in ("was brought to", "is already at"):
        ran = place.run("migrate")
        assert (ran.returncode, found in ran.stderr) == (0, True), ran.stderr


def test_the_profile_without_the_url_starts_nothing(tmp_path: Path) -> None:
    # The migration has no volume, so the directory that SQLite would write to is not there for it.
    assert "volumes" not in SERVICES["migrate"]
    place = Place(tmp_path, {"COMPOSE_PROFILES": "postgres"})
    place.secret("database-url")
    (tmp_path / "state").rmdir()
    ran = place.run("migrate")
    assert ran.returncode == 1
    assert "the database can't be used" in ran.stderr


@pytest.mark.parametrize("variables", [{}, preset("postgres"), preset("demo")], ids=["sqlite", "postgres", "demo"])
def test_the_gateway_s_settings_can_be_read(variables: dict[str, str], tmp_path: Path) -> None:
    place = Place(tmp_path, variables)
    operators = {
        "upstream-key": "sk-beans-x",
        "admin-token": "x",
        "database-url": "postgresql://beanmeter:x@postgres/beanmeter",
    }
    for name in SERVICES["gateway"]["secrets"]:
        in_tree = (ROOT / place.document["secrets"][name]["file"]).is_file()
        place.secret(name, None if in_tree else operators[name])
    found = settings.load(place.environment("gateway"), tmp_path)
    on_postgresql = found.database_url.get_secret_value().startswith("postgresql://")
    assert on_postgresql == ("postgres" in variables.get("COMPOSE_PROFILES", ""))
    assert settings.cautions(found) == ()
