"""What the operator decides, read from the environment and a TOML file. Settings may be read, checked and explained
only here."""

from __future__ import annotations

import difflib
import importlib.util
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, PrivateAttr, SecretStr, StringConstraints, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from proxy.prices import AUTO, PriceCard, parse_card, shipped_card

PREFIX = "BEANMETER_"
CONFIG = PREFIX + "CONFIG"
DEFAULT_CONFIG = "beanmeter.toml"
FILE_SUFFIX = "_file"

# Settings, secrets and price cards are written by hand; a larger file is another file, or a device that never ends.
_MAX_FILE_BYTES = 1 << 20

# Enough of a wrong value to recognise it, so that the message stays one line.
_MAX_SHOWN_CHARACTERS = 100

# A day bounds every wait: nobody looks after an exchange for longer, and a typing error shows.
_DAY_SECONDS = 86_400

# Keys, tokens and URLs become parts of a request's head: nothing in them may end a line of it.
_PRINTABLE = re.compile(r"[!-~]{1,1024}", re.ASCII)
_HOST = re.compile(r"[0-9A-Za-z._:%-]{1,255}", re.ASCII)
_DATABASE_URL = re.compile(r"sqlite:///[^\x00-\x20:?#][^\x00-\x1f?#]*|postgresql://\S+")
_USER_INFO = re.compile(r"//[^/@]*@")
_LOOPBACK = re.compile(r"localhost|127(\.[0-9]{1,3}){3}|::1", re.ASCII)
_SCOPES = re.compile(r"[!#-\[\]-~]+( [!#-\[\]-~]+)*", re.ASCII)


class SettingsError(Exception):
    """Settings that can't be used, in one line: the setting, its value, where it stands, and what was expected."""


def _whole(value: object) -> object:
    # To pydantic True is 1, and 8_0 and 80.0 are 80, but none is what anybody meant by a port.
    if isinstance(value, str):
        return value if re.fullmatch(r"[0-9]{1,15}", value, re.ASCII) else None
    return value if type(value) is int else None


def _number(value: object) -> object:
    if isinstance(value, str):
        return value if re.fullmatch(r"[0-9]{1,15}(\.[0-9]{1,9})?", value, re.ASCII) else None
    return value if type(value) in (int, float) else None


def _flag(value: object) -> object:
    # To pydantic "t", "on" and 1 are true as well; one spelling is enough, and none of them a typing error.
    return {"true": True, "false": False}.get(value) if isinstance(value, str) else value if type(value) is bool else None


def _upstream_url(url: str) -> str:
    parts = urlsplit(url)
    plain = _PRINTABLE.fullmatch(url) and "?" not in url and "#" not in url and "@" not in url
    # Reading the port is what checks it.
    if not plain or parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
        raise ValueError
    return url.rstrip("/")


def _issuer(url: str) -> str:
    # Compared with what tokens say, letter by letter: a slash at its end is a part of it.
    if not is_safe(_upstream_url(url)):
        raise ValueError
    return url


def is_safe(url: str) -> bool:
    """Whether nobody on the way can read or change what a URL is asked and answers: https, or this host itself."""
    parts = urlsplit(url)
    return bool(parts.hostname) and (parts.scheme == "https" or (parts.scheme == "http" and _is_loopback(parts.hostname)))


def _is_loopback(host: str | None) -> bool:
    return _LOOPBACK.fullmatch(host or "") is not None


def _scopes(scopes: str) -> str:
    # Without this one it would be another protocol, and without an ID token.
    if not _SCOPES.fullmatch(scopes) or len(scopes) > 1_024 or "openid" not in scopes.split(" "):
        raise ValueError
    return scopes


def _matching(pattern: re.Pattern[str]) -> AfterValidator:
    def check(value: str) -> str:
        if pattern.fullmatch(value) is None:
            raise ValueError
        return value

    return AfterValidator(check)


def _secret_matching(pattern: re.Pattern[str]) -> AfterValidator:
    def check(value: SecretStr) -> SecretStr:
        if pattern.fullmatch(value.get_secret_value()) is None:
            raise ValueError
        return value

    return AfterValidator(check)


def _path(value: object) -> object:
    if not isinstance(value, str | Path) or not str(value) or "\0" in str(value):
        raise ValueError
    return value


def _aliases(value: object) -> object:
    if not isinstance(value, str):
        return value
    pairs = [pair.partition("=") for pair in value.split(",")]
    aliases = {name.strip(): preset.strip() for name, _, preset in pairs}
    if len(aliases) != len(pairs):
        raise ValueError
    return aliases


def _listed(value: object) -> object:
    return [name.strip() for name in value.split(",")] if isinstance(value, str) else value


Whole = BeforeValidator(_whole)
Number = BeforeValidator(_number)
Flag = BeforeValidator(_flag)
Token = Annotated[SecretStr, _secret_matching(_PRINTABLE)]
AnyPath = Annotated[Path, BeforeValidator(_path)]
AliasName = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f]{1,64}$")]
Preset = Annotated[str, StringConstraints(pattern=r"^[1-9][0-9]{0,4}x[1-9][0-9]{0,4}$")]
# Names of groups are what an organisation makes of them, whole LDAP paths with commas included.
ClaimText = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f]{1,256}$")]
ClaimValues = Annotated[tuple[ClaimText, ...], BeforeValidator(_listed)]


@dataclass(frozen=True, slots=True)
class OpenID:
    """Signing in with an OpenID provider: how it is asked, and what its claims mean. ``client_secret`` is ``None`` for a
    public client."""

    issuer: str
    client_id: str
    client_secret: SecretStr | None
    scopes: str
    role_claim: str
    admin_values: frozenset[str]
    viewer_values: frozenset[str]
    team_claim: str | None
    session_hours: float


class Settings(BaseSettings):
    """Every setting, checked. A description says what its value has to be; error messages quote it."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    upstream_url: Annotated[str, AfterValidator(_upstream_url)] = Field(
        "https://api.beansai.dev/v1",
        description="an http or https URL with a host and no query, fragment or credentials, "
        "such as https://api.beansai.dev/v1",
    )
    upstream_key: Token | None = Field(None, description="a key of 1 to 1024 printable ASCII characters without spaces")
    database_url: Annotated[SecretStr, _secret_matching(_DATABASE_URL)] = Field(
        SecretStr("sqlite:///beanmeter.db"),
        description="sqlite:///path (a file) or postgresql://user:password@host/database",
    )
    admin_token: Token | None = Field(None, description="a token of 1 to 1024 printable ASCII characters without spaces")
    host: Annotated[str, _matching(_HOST)] = Field(
        "127.0.0.1", description="an address or host name to listen on, such as 127.0.0.1 or 0.0.0.0"
    )
    # Port 0 lets the system choose, so that two gateways on one host can't collide.
    port: Annotated[int, Whole] = Field(8080, ge=0, le=65_535, description="a port from 1 to 65535, or 0 for any that is free")
    # Each process holds its own database connections, and PostgreSQL takes a hundred by default.
    workers: Annotated[int, Whole] = Field(1, ge=1, le=64, description="a whole number from 1 to 64")
    prices: AnyPath | None = Field(None, description="the path of a price card in TOML")
    size_aliases: Annotated[Mapping[AliasName, Preset], BeforeValidator(_aliases)] = Field(
        default_factory=dict,
        # A request's size is looked up in this table, and an operator reads it: more is a generated list gone wrong.
        max_length=256,
        description="SIZE=PRESET pairs with commas between them and each SIZE once, such as 1536x1024=2016x1344",
    )
    state_dir: AnyPath = Field(Path("var"), description="the path of a directory on local disk")
    # A gibibyte is three times the largest body that the API takes; beyond it disks fill.
    max_body_bytes: Annotated[int, Whole] = Field(
        64 << 20, ge=1, le=1 << 30, description="a whole number of bytes from 1 to 1073741824"
    )
    upstream_timeout_seconds: Annotated[float, Number] = Field(
        600, gt=0, le=_DAY_SECONDS, description="a number of seconds above 0 and at most 86400"
    )
    # A year: by then the upstream's own bill has long been closed.
    review_hours: Annotated[float, Number] = Field(72, gt=0, le=8_784, description="a number of hours above 0 and at most 8784")
    # What a process may not notice for an hour is no longer a limit.
    revocation_seconds: Annotated[float, Number] = Field(
        5, gt=0, le=3_600, description="a number of seconds above 0 and at most 3600"
    )
    drain_seconds: Annotated[float, Number] = Field(
        600, ge=0, le=_DAY_SECONDS, description="a number of seconds from 0 to 86400"
    )
    traces: Annotated[bool, Flag] = Field(False, description="true or false")
    oidc_issuer: Annotated[str, AfterValidator(_issuer)] | None = Field(
        None,
        description="the provider's issuer as its tokens name it, an https URL (http on loopback alone) with no query, "
        "fragment or credentials, such as https://login.example.com/realms/staff",
    )
    oidc_client_id: Annotated[str, _matching(_PRINTABLE)] | None = Field(
        None, description="the client's id at the provider, of 1 to 1024 printable ASCII characters without spaces"
    )
    oidc_client_secret: Token | None = Field(
        None, description="the client's secret, of 1 to 1024 printable ASCII characters without spaces"
    )
    oidc_scopes: Annotated[str, AfterValidator(_scopes)] = Field(
        "openid email", description="scopes with one space between them, openid among them, such as 'openid email groups'"
    )
    oidc_role_claim: ClaimText = Field(
        "groups", description="the name of a claim of the ID token, such as groups or realm_access.roles"
    )
    oidc_admin_values: ClaimValues | None = Field(
        None, min_length=1, max_length=256, description="values with commas between them, such as platform-admins"
    )
    oidc_viewer_values: ClaimValues | None = Field(
        None, min_length=1, max_length=256, description="values with commas between them, such as finance,controlling"
    )
    oidc_team_claim: ClaimText | None = Field(
        None, description="the name of a claim of the ID token whose values are names of teams, such as image_teams"
    )
    # A role that was taken away at the provider lasts as long as a session: more than a day is not meant.
    oidc_session_hours: Annotated[float, Number] = Field(
        12, gt=0, le=24, description="a number of hours above 0 and at most 24"
    )

    # How a field was given, for errors that show only against the price card.
    _shown: dict[str, str] = PrivateAttr(default_factory=dict)

    @classmethod
    def settings_customise_sources(cls, *_: Any, **sources: Any) -> tuple[PydanticBaseSettingsSource, ...]:
        """Takes what :func:`load` gathered and nothing else: the process's environment would be a hidden argument."""
        return (sources["init_settings"],)

    @property
    def openid(self) -> OpenID | None:
        """Signing in with an OpenID provider, ``None`` where none is named."""
        if self.oidc_issuer is None or self.oidc_client_id is None:
            return None
        return OpenID(
            issuer=self.oidc_issuer,
            client_id=self.oidc_client_id,
            client_secret=self.oidc_client_secret,
            scopes=self.oidc_scopes,
            role_claim=self.oidc_role_claim,
            admin_values=frozenset(self.oidc_admin_values or ()),
            viewer_values=frozenset(self.oidc_viewer_values or ()),
            team_claim=self.oidc_team_claim,
            session_hours=self.oidc_session_hours,
        )


SECRETS = ("upstream_key", "admin_token", "database_url", "oidc_client_secret")


@dataclass(frozen=True, slots=True)
class _Given:
    """A value as somebody gave it: under which name, and in which file, if any."""

    name: str
    value: object
    file: _ConfigFile | None = None
    secret: bool = False

    def shown(self) -> str:
        """The name, the value unless it is a secret, and the file with its line."""
        # Who mistakes NAME_FILE for NAME gives the secret itself: only what starts like a path is shown.
        hidden = self.secret and not (_is_file_name(self.name) and str(self.value).startswith(("/", "./", "../")))
        # An upstream URL with a password in it is wrong, and still no reason to print the password.
        value = " (value not shown)" if hidden else f" = {_shortened(_USER_INFO.sub('//***@', repr(self.value)))}"
        return self.name + value + self.place()

    def place(self) -> str:
        return f" ({self.file.path}, line {self.file.line_of(self.name)})" if self.file else ""


@dataclass(frozen=True, slots=True)
class _ConfigFile:
    path: Path
    text: str

    def line_of(self, name: str) -> int:
        """The line on which a top-level name starts: the first after all that is whole TOML without it."""
        lines = self.text.split("\n")
        line = 1
        for count in range(1, len(lines) + 1):
            try:
                data = tomllib.loads("\n".join([*lines[:count], ""]))
            except tomllib.TOMLDecodeError:
                continue
            if name in data:
                break
            line = count + 1
        return line


def load(environ: Mapping[str, str], cwd: Path, overrides: Mapping[str, object] = MappingProxyType({})) -> Settings:
    """The settings from ``environ``, over the TOML file that it names, over the defaults.

    ``overrides`` come from the command line, by field, and win; ``None`` there means not given. Reads the TOML file and
    the files that secrets are kept in, relative to ``cwd``. Raises :class:`SettingsError` for the first thing wrong.
    """
    given = _from_file(environ, cwd) | _from_environment(environ, cwd)
    for field, value in overrides.items():
        if value is not None:
            given[field] = _Given("--" + field.replace("_", "-"), value, secret=field in SECRETS)
    try:
        settings = Settings.model_validate({field: entry.value for field, entry in given.items()})
    except ValidationError as error:
        field = str(error.errors(include_url=False, include_input=False, include_context=False)[0]["loc"][0])
        raise _wrong(given[field], f"expected {_expected(field)}") from None
    _check_openid(settings, given)
    _check_traces(settings, given)
    settings._shown.update({field: given[field].shown() for field in ("prices", "size_aliases") if field in given})
    return settings


def _check_openid(settings: Settings, given: Mapping[str, _Given]) -> None:
    """The settings of a provider only make sense together."""
    ours = [field for field in given if field.startswith("oidc_")]
    if not ours:
        return
    for field in ("oidc_issuer", "oidc_client_id"):
        if field not in given:
            raise _wrong(given[ours[0]], f"{PREFIX}{field.upper()} has to be set too: it is {_expected(field)}")
    roles = ("oidc_admin_values", "oidc_viewer_values", "oidc_team_claim")
    if not any(field in given for field in roles):
        names = " or ".join(PREFIX + field.upper() for field in roles)
        raise _wrong(given["oidc_issuer"], f"nobody could sign in with it: say who may, with {names}")
    twice = {*(settings.oidc_admin_values or ())} & {*(settings.oidc_viewer_values or ())}
    if twice:
        raise _wrong(given["oidc_viewer_values"], f"{sorted(twice)[0]!r} is among {PREFIX}OIDC_ADMIN_VALUES too: keep one")
    if importlib.util.find_spec("authlib") is None:
        raise _wrong(given["oidc_issuer"], f"signing in {_EXTRA_MISSING}")


# No name of an index to install it from: nobody but this project may say what is installed by that name.
_EXTRA_MISSING = "needs more packages: pip install --require-hashes -r requirements-full.txt, from this release"


def _check_traces(settings: Settings, given: Mapping[str, _Given]) -> None:
    if not settings.traces:
        return
    try:
        missing = importlib.util.find_spec("opentelemetry.exporter.otlp.proto.http") is None
    except ModuleNotFoundError:  # Not even what it would be in.
        missing = True
    if missing:
        raise _wrong(given["traces"], f"telling traces {_EXTRA_MISSING}")


def load_card(settings: Settings) -> PriceCard:
    """The price card in force: the file that the settings name, or the one shipped.

    Raises :class:`SettingsError` where it can't be used, or where a size alias doesn't fit it.
    """
    card = shipped_card()
    if settings.prices is not None:
        shown = settings._shown.get("prices", f"{PREFIX}PRICES = {str(settings.prices)!r}")
        try:
            card = parse_card(_read(settings.prices))
        except (OSError, ValueError) as error:
            raise SettingsError(f"{shown}: {_reason(error)}") from None
    for name, preset in settings.size_aliases.items():
        if (problem := _alias_problem(card, name, preset)) is not None:
            shown = settings._shown.get("size_aliases", f"{PREFIX}SIZE_ALIASES")
            raise SettingsError(f"{shown}: {name}={preset}: {problem} (price card {settings.prices or 'shipped'})")
    return card


def cautions(settings: Settings) -> tuple[str, ...]:
    """What the start says aloud about settings that are allowed, and that the operator may not have meant."""
    found = []
    parts = urlsplit(settings.upstream_url)
    if parts.scheme == "http" and not _is_loopback(parts.hostname):
        found.append(f"{PREFIX}UPSTREAM_URL is plain http to another host: the upstream key can be read on the way. Use https.")
    if settings.admin_token is None:
        found.append(f"{PREFIX}ADMIN_TOKEN is not set: the admin API and the dashboard are closed. Set it to open them.")
        if settings.openid is not None:
            found.append(f"{PREFIX}OIDC_ISSUER does nothing until {PREFIX}ADMIN_TOKEN is set: sessions are sealed with that.")
    return tuple(found)


def _from_environment(environ: Mapping[str, str], cwd: Path) -> dict[str, _Given]:
    given = {}
    for name, value in environ.items():
        if not name.startswith(PREFIX) or name == CONFIG:
            continue
        field = name.removeprefix(PREFIX).lower()
        if not _is_known(field) or name != PREFIX + field.upper():
            raise _unknown(name, "", PREFIX + _nearest(field, "config").upper())
        given[field] = _Given(name, value, secret=_is_secret(field))
        if not value:
            # Taken as unset, an empty database URL would book on another database without a word.
            raise _wrong(given[field], "it is empty: give it a value, or unset it for the default")
    return _with_secrets_read(given, cwd)


def _from_file(environ: Mapping[str, str], cwd: Path) -> dict[str, _Given]:
    path = cwd / environ.get(CONFIG, DEFAULT_CONFIG)
    if CONFIG not in environ and not path.exists():
        return {}
    try:
        file = _ConfigFile(path, _read(path))
        # An error on a last line without its end would be told as one "at end of document".
        data: dict[str, Any] = tomllib.loads(file.text + "\n")
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"{path}: expected settings in TOML, one 'name = value' a line: {error}") from None
    except (OSError, ValueError) as error:
        name = f"{CONFIG} = {environ[CONFIG]!r}" if CONFIG in environ else str(path)
        raise SettingsError(f"{name}: expected a file with settings in TOML: {_reason(error)}") from None
    given = {}
    for name, value in data.items():
        given[name] = _Given(name, value, file, secret=_is_secret(name))
        if not _is_known(name):
            raise _unknown(name, given[name].place(), _nearest(name.lower().removeprefix(PREFIX.lower())))
    return _with_secrets_read(given, cwd)


def _with_secrets_read(given: dict[str, _Given], cwd: Path) -> dict[str, _Given]:
    """The same values, with each ``NAME_FILE`` replaced by ``NAME`` and what its file holds."""
    for field in SECRETS:
        pointer = given.pop(field + FILE_SUFFIX, None)
        if pointer is None:
            continue
        if field in given:
            raise _wrong(pointer, f"{given[field].name} is set too: keep one of the two")
        try:
            if not isinstance(pointer.value, str):
                raise ValueError("it is not a path")
            secret = _read(cwd / pointer.value).strip()
            if not secret:
                raise ValueError("the file is empty")
        except (OSError, ValueError) as error:
            raise _wrong(pointer, f"expected the path of a readable file with the secret in it: {_reason(error)}") from None
        given[field] = _Given(pointer.name, secret, pointer.file, secret=True)
    return given


def _read(path: Path) -> str:
    with path.open("rb") as file:
        data = file.read(_MAX_FILE_BYTES + 1)
    if len(data) > _MAX_FILE_BYTES:
        raise ValueError(f"the file is larger than {_MAX_FILE_BYTES} bytes")
    return data.decode("utf-8")


def _alias_problem(card: PriceCard, name: str, preset: str) -> str | None:
    """What is wrong with an alias, ``None`` if nothing is: it has to mean a new name for a preset of one model at least."""
    if name == AUTO:
        return f"'{AUTO}' has a meaning of its own and can't be an alias"
    having = [model for model in card.models.values() if preset in model.sizes]
    if not having:
        return f"expected a size of the price card after '=', and {preset} is not one"
    if any(name in model.sizes for model in having):
        return f"{name} is itself a size of the price card, with a price of its own: remove the alias"
    return None


def _is_known(field: str) -> bool:
    return field in Settings.model_fields or (_is_secret(field) and _is_file_name(field))


def _is_secret(field: str) -> bool:
    return field.removesuffix(FILE_SUFFIX) in SECRETS


def _is_file_name(name: str) -> bool:
    return name.lower().endswith(FILE_SUFFIX)


def _nearest(field: str, *more: str) -> str:
    known = [*Settings.model_fields, *(secret + FILE_SUFFIX for secret in SECRETS), *more]
    return difflib.get_close_matches(field, known, n=1, cutoff=0)[0]


def _unknown(name: str, place: str, nearest: str) -> SettingsError:
    # The value stays out: a misspelled secret is a secret.
    return SettingsError(f"{_shortened(repr(name)[1:-1])}{place}: there is no such setting; did you mean {nearest}?")


def _expected(field: str) -> str | None:
    return Settings.model_fields[field].description


def _wrong(given: _Given, problem: str) -> SettingsError:
    return SettingsError(f"{given.shown()}: {problem}")


def _reason(error: OSError | ValueError) -> str:
    """Why a file can't be used, without its contents."""
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    if isinstance(error, UnicodeDecodeError):
        return "the file is not UTF-8"
    return str(error)


def _shortened(text: str) -> str:
    return text if len(text) <= _MAX_SHOWN_CHARACTERS else text[:_MAX_SHOWN_CHARACTERS] + "..."
