"""Settings from environment and file, and what is said of wrong ones."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import SecretStr, ValidationError

from proxy.settings import Settings, SettingsError, cautions, load, load_card

UPSTREAM_KEY = "sk-beans-0123456789"


def env(**settings: str) -> dict[str, str]:
    return {f"BEANMETER_{name}": value for name, value in settings.items()} | {"PATH": "/bin", "PORT": "1"}


def complaint(tmp_path: Path, environ: dict[str, str], **overrides: object) -> str:
    with pytest.raises(SettingsError) as caught:
        load_card(load(environ, tmp_path, overrides))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults(tmp_path: Path) -> None:
    assert load({}, tmp_path).model_dump() == {
        "upstream_url": "https://api.beansai.dev/v1",
        "upstream_key": None,
        "database_url": SecretStr("sqlite:///beanmeter.db"),
        "admin_token": None,
        "host": "127.0.0.1",
        "port": 8080,
        "workers": 1,
        "prices": None,
        "size_aliases": {},
        "state_dir": Path("var"),
        "max_body_bytes": 67_108_864,
        "upstream_timeout_seconds": 600,
        "review_hours": 72,
        "revocation_seconds": 5,
        "drain_seconds": 600,
        "oidc_issuer": None,
        "oidc_client_id": None,
        "oidc_client_secret": None,
        "oidc_scopes": "openid email",
        "oidc_role_claim": "groups",
        "oidc_admin_values": None,
        "oidc_viewer_values": None,
        "oidc_team_claim": None,
        "oidc_session_hours": 12,
        "traces": False,
    }


def test_nothing_but_the_arguments_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BEANMETER_PORT", "1")
    monkeypatch.setenv("PORT", "2")
    assert load({}, tmp_path).port == 8080


def test_the_command_line_wins_over_the_environment_and_that_over_the_file(tmp_path: Path) -> None:
    write(tmp_path / "beanmeter.toml", 'host = "10.0.0.1"\nport = 1\nworkers = 3\n')
    settings = load(env(PORT="2", HOST="10.0.0.2"), tmp_path, {"host": "10.0.0.3", "port": None})
    assert (settings.host, settings.port, settings.workers) == ("10.0.0.3", 2, 3)


def test_the_file_can_be_named(tmp_path: Path) -> None:
    write(tmp_path / "beanmeter.toml", "port = 1\n")
    other = write(tmp_path / "other.toml", "port = 2\n")
    assert load(env(CONFIG="other.toml"), tmp_path).port == 2
    assert load(env(CONFIG=str(other)), tmp_path / "elsewhere").port == 2


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("UPSTREAM_URL", "http://127.0.0.1:9000/v1/", "http://127.0.0.1:9000/v1"),
        ("UPSTREAM_URL", "https://[::1]:9000", "https://[::1]:9000"),
        ("DATABASE_URL", "sqlite:////srv/my beans.db", SecretStr("sqlite:////srv/my beans.db")),
        ("DATABASE_URL", "postgresql://app:pw@db:5432/beans?sslmode=require", SecretStr("postgresql://app:pw@db:5432/beans?sslmode=require")),
        ("DATABASE_URL", "postgresql:///beans?host=/run/postgresql", SecretStr("postgresql:///beans?host=/run/postgresql")),
        ("HOST", "::", "::"),
        ("PORT", "0", 0),
        ("PORT", "65535", 65_535),
        ("WORKERS", "64", 64),
        ("MAX_BODY_BYTES", "1073741824", 1 << 30),
        ("UPSTREAM_TIMEOUT_SECONDS", "0.5", 0.5),
        ("DRAIN_SECONDS", "0", 0),
        ("STATE_DIR", "/srv/beans", Path("/srv/beans")),
        ("SIZE_ALIASES", "1536x1024=2016x1344, 1024x1536 = 1344x2016", {"1536x1024": "2016x1344", "1024x1536": "1344x2016"}),
        ("SIZE_ALIASES", "large square=2048x2048", {"large square": "2048x2048"}),
    ],
)  # fmt: skip
def test_values(tmp_path: Path, name: str, text: str, value: object) -> None:
    assert getattr(load(env(**{name: text}), tmp_path), name.lower()) == value


PORT = "expected a port from 1 to 65535, or 0 for any that is free"
URL = "expected an http or https URL with a host and no query, fragment or credentials, such as https://api.beansai.dev/v1"
ALIASES = "expected SIZE=PRESET pairs with commas between them and each SIZE once, such as 1536x1024=2016x1344"


@pytest.mark.parametrize(
    ("name", "text", "shown", "expected"),
    [
        ("PORT", "eighty", "'eighty'", PORT),
        ("PORT", "-1", "'-1'", PORT),
        ("PORT", "65536", "'65536'", PORT),
        ("PORT", "8_080", "'8_080'", PORT),
        ("PORT", " 80", "' 80'", PORT),
        ("PORT", "80.0", "'80.0'", PORT),
        ("PORT", "8\n0", r"'8\n0'", PORT),
        # What Kubernetes and old Docker links put there for a service named beanmeter.
        ("PORT", "tcp://10.0.0.1:8080", "'tcp://10.0.0.1:8080'", PORT),
        ("WORKERS", "0", "'0'", "expected a whole number from 1 to 64"),
        ("WORKERS", "65", "'65'", "expected a whole number from 1 to 64"),
        ("MAX_BODY_BYTES", "64MB", "'64MB'", "expected a whole number of bytes from 1 to 1073741824"),
        ("MAX_BODY_BYTES", "0", "'0'", "expected a whole number of bytes from 1 to 1073741824"),
        ("UPSTREAM_TIMEOUT_SECONDS", "0", "'0'", "expected a number of seconds above 0 and at most 86400"),
        ("UPSTREAM_TIMEOUT_SECONDS", "inf", "'inf'", "expected a number of seconds above 0 and at most 86400"),
        ("UPSTREAM_TIMEOUT_SECONDS", "1e3", "'1e3'", "expected a number of seconds above 0 and at most 86400"),
        ("REVIEW_HOURS", "nan", "'nan'", "expected a number of hours above 0 and at most 8784"),
        ("REVOCATION_SECONDS", "3601", "'3601'", "expected a number of seconds above 0 and at most 3600"),
        ("DRAIN_SECONDS", "-1", "'-1'", "expected a number of seconds from 0 to 86400"),
        ("HOST", "http://here", "'http://here'", "expected an address or host name to listen on, such as 127.0.0.1 or 0.0.0.0"),
        ("UPSTREAM_URL", "api.beansai.dev/v1", "'api.beansai.dev/v1'", URL),
        ("UPSTREAM_URL", "ftp://api.beansai.dev", "'ftp://api.beansai.dev'", URL),
        ("UPSTREAM_URL", "https:///v1", "'https:///v1'", URL),
        ("UPSTREAM_URL", "https://h/v1?a=b", "'https://h/v1?a=b'", URL),
        ("UPSTREAM_URL", "https://h/v1#a", "'https://h/v1#a'", URL),
        ("UPSTREAM_URL", "https://h:99999/v1", "'https://h:99999/v1'", URL),
        ("UPSTREAM_URL", "https://h:port/v1", "'https://h:port/v1'", URL),
        ("UPSTREAM_URL", "https://h/v1\r\nx: y", r"'https://h/v1\r\nx: y'", URL),
        ("UPSTREAM_URL", "https://me:hunter2@h/v1", "'https://***@h/v1'", URL),
        ("SIZE_ALIASES", "1536x1024", "'1536x1024'", ALIASES),
        ("SIZE_ALIASES", "a=1024x1024,a=2048x2048", "'a=1024x1024,a=2048x2048'", ALIASES),
        ("SIZE_ALIASES", "a=1024x1024,", "'a=1024x1024,'", ALIASES),
        ("SIZE_ALIASES", "=1024x1024", "'=1024x1024'", ALIASES),
        ("SIZE_ALIASES", "a\x00=1024x1024", r"'a\x00=1024x1024'", ALIASES),
        ("SIZE_ALIASES", "a=huge", "'a=huge'", ALIASES),
        ("STATE_DIR", "a\x00b", r"'a\x00b'", "expected the path of a directory on local disk"),
        ("PORT", "", "''", "it is empty: give it a value, or unset it for the default"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_told_with_its_setting_and_what_was_expected(
    tmp_path: Path, name: str, text: str, shown: str, expected: str
) -> None:
    assert complaint(tmp_path, env(**{name: text})) == f"BEANMETER_{name} = {shown}: {expected}"


def test_a_long_value_is_shown_in_part(tmp_path: Path) -> None:
    assert len(complaint(tmp_path, env(HOST="h" * 10_000))) < 300


def test_the_command_line_is_named_as_such(tmp_path: Path) -> None:
    assert complaint(tmp_path, env(PORT="80"), port="http") == f"--port = 'http': {PORT}"


@pytest.mark.parametrize(
    ("text", "shown", "line", "expected"),
    [
        ('# the front door\nhost = "::1"\nport = 99999\n', "port = 99999", 3, PORT),
        ("port = true", "port = True", 1, PORT),
        ("port = 80.0", "port = 80.0", 1, PORT),
        ('\n\n"port" = "eighty"', "port = 'eighty'", 3, PORT),
        # A line inside of another value is not the setting's own.
        ('state_dir = """\nport = 1\n"""\nport = 99999\n', "port = 99999", 4, PORT),
        ("port = 80\r\nworkers = 0\r\n", "workers = 0", 2, "expected a whole number from 1 to 64"),
        ('port = 80\n[size_aliases]\n1536x1024 = "big"\n', "size_aliases = {'1536x1024': 'big'}", 2, ALIASES),
    ],
)
def test_a_wrong_value_in_a_file_is_told_with_its_line(tmp_path: Path, text: str, shown: str, line: int, expected: str) -> None:
    path = tmp_path / "beanmeter.toml"
    path.write_bytes(text.encode())
    assert complaint(tmp_path, {}) == f"{shown} ({path}, line {line}): {expected}"


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("BEANMETER_PROT", "BEANMETER_PORT"),
        ("BEANMETER_port", "BEANMETER_PORT"),
        ("BEANMETER_CONFG", "BEANMETER_CONFIG"),
        ("BEANMETER_UPSTREAM_TIMEOUT", "BEANMETER_UPSTREAM_TIMEOUT_SECONDS"),
        ("BEANMETER_DATABASE", "BEANMETER_DATABASE_URL"),
        ("BEANMETER_ADMIN_TOKN_FILE", "BEANMETER_ADMIN_TOKEN_FILE"),
    ],
)
def test_an_unknown_setting_suggests_the_nearest(tmp_path: Path, name: str, nearest: str) -> None:
    # The value may be a secret under a misspelled name.
    assert complaint(tmp_path, {name: UPSTREAM_KEY}) == f"{name}: there is no such setting; did you mean {nearest}?"


@pytest.mark.parametrize("name", ["prot", "PORT", "BEANMETER_PORT"])
def test_an_unknown_setting_in_a_file_suggests_the_nearest(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "beanmeter.toml", f"\n{name} = 80\n")
    assert complaint(tmp_path, {}) == f"{name} ({path}, line 2): there is no such setting; did you mean port?"


@pytest.mark.parametrize("name", ["HOST_FILE", "CONFIG_FILE", "PRICES_FILE"])
def test_only_secrets_can_come_from_a_file(tmp_path: Path, name: str) -> None:
    assert "there is no such setting" in complaint(tmp_path, env(**{name: "x"}))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("port = eighty\n", "Invalid value (at line 1, column 8)"),
        ("port = 80\nport = 81", "Cannot overwrite a value (at line 2, column 10)"),
    ],
)
def test_a_file_that_is_not_toml_is_told_with_the_line(tmp_path: Path, text: str, expected: str) -> None:
    path = write(tmp_path / "beanmeter.toml", text)
    assert complaint(tmp_path, {}) == f"{path}: expected settings in TOML, one 'name = value' a line: {expected}"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "No such file or directory"),
        (b"port = 80 # \xff", "the file is not UTF-8"),
        (b"#" * (1 << 21), "the file is larger"),
    ],
)
def test_a_named_file_that_cannot_be_read_is_an_error(tmp_path: Path, content: bytes | None, reason: str) -> None:
    if content is not None:
        (tmp_path / "named.toml").write_bytes(content)
    said = complaint(tmp_path, env(CONFIG="named.toml"))
    assert said.startswith("BEANMETER_CONFIG = 'named.toml': expected a file with settings in TOML: ")
    assert reason in said


SECRET_SETTINGS = [
    ("UPSTREAM_KEY", UPSTREAM_KEY),
    ("ADMIN_TOKEN", "open-sesame"),
    ("DATABASE_URL", "postgresql://app:hunter2@db/beans"),
]


@pytest.mark.parametrize(("name", "secret"), SECRET_SETTINGS)
def test_a_secret_can_come_from_a_file(tmp_path: Path, name: str, secret: str) -> None:
    path = write(tmp_path / "secret", f"{secret}\n")
    field = name.lower()
    from_environment = load(env(**{f"{name}_FILE": str(path)}), tmp_path)
    write(tmp_path / "beanmeter.toml", f'{field}_file = "secret"\n')
    from_file = load({}, tmp_path)
    for settings in (from_environment, from_file):
        assert getattr(settings, field).get_secret_value() == secret
        assert secret not in repr(settings) + str(settings) + settings.model_dump_json()


@pytest.mark.parametrize(("name", "secret"), SECRET_SETTINGS)
def test_a_secret_is_never_shown_when_it_is_wrong(tmp_path: Path, name: str, secret: str) -> None:
    wrong = secret.replace("postgresql", "mysql") + " \n"
    path = write(tmp_path / "secret", "two words " + wrong)
    for environ in (env(**{name: wrong}), env(**{f"{name}_FILE": secret})):
        said = complaint(tmp_path, environ)
        assert "(value not shown): expected " in said
        assert secret.split("://")[-1] not in said
    assert wrong.strip() not in complaint(tmp_path, env(**{f"{name}_FILE": str(path)}))


@pytest.mark.parametrize(
    "url",
    [
        "mysql://db/beans",
        "postgres://db/beans",
        "sqlite://",
        "sqlite:///",
        "sqlite:///:memory:",
        "sqlite:///a?mode=ro",
        "beans.db",
    ],
)
def test_a_database_is_a_file_or_postgresql(tmp_path: Path, url: str) -> None:
    expected = "expected sqlite:///path (a file) or postgresql://user:password@host/database"
    assert complaint(tmp_path, env(DATABASE_URL=url)) == f"BEANMETER_DATABASE_URL (value not shown): {expected}"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "No such file or directory"),
        (b"", "the file is empty"),
        (b" \n", "the file is empty"),
        (b"\xff\xfe", "the file is not UTF-8"),
    ],
)
def test_a_secret_file_without_a_secret_is_an_error(tmp_path: Path, content: bytes | None, reason: str) -> None:
    path = tmp_path / "secret"
    if content is not None:
        path.write_bytes(content)
    expected = "expected the path of a readable file with the secret in it"
    assert (
        complaint(tmp_path, env(UPSTREAM_KEY_FILE=str(path))) == f"BEANMETER_UPSTREAM_KEY_FILE = '{path}': {expected}: {reason}"
    )


def test_a_secret_and_its_file_are_one_too_many(tmp_path: Path) -> None:
    path = write(tmp_path / "secret", UPSTREAM_KEY)
    said = complaint(tmp_path, env(UPSTREAM_KEY=UPSTREAM_KEY, UPSTREAM_KEY_FILE=str(path)))
    assert said == f"BEANMETER_UPSTREAM_KEY_FILE = '{path}': BEANMETER_UPSTREAM_KEY is set too: keep one of the two"
    # Not so across layers: the environment wins over the file, whichever way either gives the secret.
    write(tmp_path / "beanmeter.toml", 'upstream_key_file = "secret"\n')
    assert load(env(UPSTREAM_KEY="sk-other"), tmp_path).upstream_key == SecretStr("sk-other")


def test_settings_do_not_change(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        load({}, tmp_path).port = 1


CARD = """
version = "mine-1"
[models.tiny]
qualities = ["low"]
usd_per_image = { 64x32 = { low = "0.001" } }
"""


def test_the_price_card_is_the_shipped_one_or_the_one_that_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "card.toml", CARD)
    assert "gpt-image-2" in load_card(load({}, tmp_path)).models
    assert load_card(load(env(PRICES=str(path), SIZE_ALIASES="1x1=64x32"), tmp_path)).version == "mine-1"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "No such file or directory"),
        (CARD.replace("0.001", "0"), "[models.tiny.usd_per_image] 64x32 low: the price must be above zero"),
    ],
)
def test_a_price_card_that_cannot_be_used_is_told_with_its_path(tmp_path: Path, content: str | None, expected: str) -> None:
    path = tmp_path / "card.toml"
    if content is not None:
        write(path, content)
    assert complaint(tmp_path, env(PRICES=str(path))) == f"BEANMETER_PRICES = '{path}': {expected}"
    write(tmp_path / "beanmeter.toml", f"\nprices = '{path}'\n")
    assert complaint(tmp_path, {}) == f"prices = '{path}' ({tmp_path / 'beanmeter.toml'}, line 2): {expected}"


@pytest.mark.parametrize(
    ("aliases", "expected"),
    [
        ("1536x1024=1x1", "1536x1024=1x1: expected a size of the price card after '=', and 1x1 is not one"),
        ("a=1024x1024,1024x768=1024x1024", "1024x768=1024x1024: 1024x768 is itself a size of the price card"),
        ("auto=1024x1024", "auto=1024x1024: 'auto' has a meaning of its own"),
    ],
)
def test_aliases_have_to_fit_the_price_card(tmp_path: Path, aliases: str, expected: str) -> None:
    assert complaint(tmp_path, env(SIZE_ALIASES=aliases)).startswith(f"BEANMETER_SIZE_ALIASES = '{aliases}': {expected}")
    write(tmp_path / "beanmeter.toml", f'size_aliases = "{aliases}"\n')
    assert complaint(tmp_path, {}).startswith(f"size_aliases = '{aliases}' ({tmp_path / 'beanmeter.toml'}, line 1): {expected}")


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        (env(ADMIN_TOKEN="t"), []),
        (env(), ["BEANMETER_ADMIN_TOKEN"]),
        (env(ADMIN_TOKEN="t", UPSTREAM_URL="http://localhost:9000/v1"), []),
        (env(ADMIN_TOKEN="t", UPSTREAM_URL="http://127.0.0.1:9000/v1"), []),
        (env(ADMIN_TOKEN="t", UPSTREAM_URL="http://[::1]:9000/v1"), []),
        (env(ADMIN_TOKEN="t", UPSTREAM_URL="http://127.0.0.1.example/v1"), ["BEANMETER_UPSTREAM_URL"]),
        (env(UPSTREAM_URL="http://simulator:9000/v1"), ["BEANMETER_UPSTREAM_URL", "BEANMETER_ADMIN_TOKEN"]),
    ],
)
def test_cautions(tmp_path: Path, environ: dict[str, str], named: list[str]) -> None:
    assert [caution.split()[0] for caution in cautions(load(environ, tmp_path))] == named


def test_every_setting_says_what_it_expects() -> None:
    assert all(field.description for field in Settings.model_fields.values())


# An identity provider


def oidc(**values: str) -> dict[str, str]:
    """A provider's settings that are right, and those that a test wants otherwise; an empty text takes one out."""
    ours = {"ISSUER": "https://login.example.com/", "CLIENT_ID": "beanmeter", "ADMIN_VALUES": "admins, owners", **values}
    return env(**{f"OIDC_{name}": value for name, value in ours.items() if value})


def test_a_provider_is_off_unless_it_is_named(tmp_path: Path) -> None:
    assert load(env(), tmp_path).openid is None


def test_what_a_provider_is_asked_and_what_its_claims_mean(tmp_path: Path) -> None:
    found = load(oidc(CLIENT_SECRET="a-secret", TEAM_CLAIM="teams", SESSION_HOURS="0.5"), tmp_path).openid
    assert found is not None
    assert (found.issuer, found.client_id) == ("https://login.example.com/", "beanmeter")
    assert (found.scopes, found.role_claim, found.team_claim) == ("openid email", "groups", "teams")
    assert (found.admin_values, found.viewer_values) == (frozenset({"admins", "owners"}), frozenset())
    assert found.session_hours == 0.5
    assert "a-secret" not in repr(found)


def test_values_may_be_a_list_in_a_file(tmp_path: Path) -> None:
    groups = ["CN=admins,OU=staff,DC=example", "owners"]
    lines = ['oidc_issuer = "http://127.0.0.1:9000"', 'oidc_client_id = "x"', f"oidc_admin_values = {groups}"]
    write(tmp_path / "beanmeter.toml", "\n".join(lines))
    found = load({}, tmp_path).openid
    assert found is not None
    assert found.admin_values == set(groups)


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        (
            oidc(ISSUER="http://login.example.com"),
            "BEANMETER_OIDC_ISSUER = 'http://login.example.com': expected the",
        ),
        (oidc(ISSUER="https://u:pw@login.example.com"), "BEANMETER_OIDC_ISSUER = 'https://***@login.example.com': expected"),
        (oidc(ISSUER="https://login.example.com/?a=b"), "BEANMETER_OIDC_ISSUER = "),
        (oidc(ISSUER="login.example.com"), "BEANMETER_OIDC_ISSUER = 'login.example.com': expected"),
        (
            oidc(ISSUER=""),
            "BEANMETER_OIDC_CLIENT_ID = 'beanmeter': BEANMETER_OIDC_ISSUER has to be set too: it is",
        ),
        (oidc(CLIENT_ID=""), "BEANMETER_OIDC_ISSUER = 'https://login.example.com/': BEANMETER_OIDC_CLIENT_ID has to be set"),
        (oidc(CLIENT_ID="a b"), "BEANMETER_OIDC_CLIENT_ID = 'a b': expected the client's id"),
        (oidc(CLIENT_SECRET="a b"), "BEANMETER_OIDC_CLIENT_SECRET (value not shown): expected the client's secret"),
        (env(OIDC_CLIENT_SECRET="s"), "BEANMETER_OIDC_CLIENT_SECRET (value not shown): BEANMETER_OIDC_ISSUER has to be set"),
        (oidc(ADMIN_VALUES=""), "BEANMETER_OIDC_ISSUER = 'https://login.example.com/': nobody could sign in with it: say who"),
        (oidc(ADMIN_VALUES="admins,"), "BEANMETER_OIDC_ADMIN_VALUES = 'admins,': expected values with commas"),
        (
            oidc(VIEWER_VALUES="owners"),
            "BEANMETER_OIDC_VIEWER_VALUES = 'owners': 'owners' is among BEANMETER_OIDC_ADMIN_VAL",
        ),
        (oidc(SCOPES="email"), "BEANMETER_OIDC_SCOPES = 'email': expected scopes with one space between them, openid among"),
        (oidc(SCOPES="openid  email"), "BEANMETER_OIDC_SCOPES = 'openid  email': expected"),
        (oidc(SESSION_HOURS="0"), "BEANMETER_OIDC_SESSION_HOURS = '0': expected a number of hours above 0 and at most 24"),
        (oidc(SESSION_HOURS="25"), "BEANMETER_OIDC_SESSION_HOURS = '25': expected"),
        (oidc(ROLE_CLAIM="a\nb"), "BEANMETER_OIDC_ROLE_CLAIM = "),
        (oidc(TEAM_CLAIM="x" * 257), "BEANMETER_OIDC_TEAM_CLAIM = "),
    ],
)
def test_a_provider_that_could_not_be_used(tmp_path: Path, environ: dict[str, str], expected: str) -> None:
    assert complaint(tmp_path, environ).startswith(expected)


def test_a_provider_without_its_extra_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As it is where the package was never installed.
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "-r requirements-full.txt" in complaint(tmp_path, oidc())
    assert load(env(), tmp_path).openid is None


def test_a_provider_does_nothing_without_an_admin_token(tmp_path: Path) -> None:
    found = cautions(load(oidc(), tmp_path))
    assert [caution.split()[0] for caution in found] == ["BEANMETER_ADMIN_TOKEN", "BEANMETER_OIDC_ISSUER"]
    assert cautions(load({**oidc(), **env(ADMIN_TOKEN="t")}, tmp_path)) == ()
