"""``beanmeter doctor``: does everything that the gateway needs answer, and if not, what is to be done about it?"""

from __future__ import annotations

import asyncio
import http.client
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import typer

from proxy.cli.arguments import Json
from proxy.cli.failures import Failed, explain
from proxy.cli.opening import database, read_settings
from proxy.cli.printing import print_json, say

if TYPE_CHECKING:
    from proxy.settings import Settings

# A healthy upstream lists its models in well under a second.
UPSTREAM_SECONDS = 10


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found. ``message`` tells what is there, or what to do."""

    check: str
    ok: bool
    message: str


def doctor(as_json: Json = False) -> None:
    """Check all that the gateway needs: settings, prices, database, disk, upstream, identity provider."""
    from proxy.settings import SettingsError, cautions
    from proxy.tracing import check_tracing

    try:
        settings = read_settings()
        check_tracing(settings)
    except SettingsError as error:
        # Without settings there is nothing else to check.
        if as_json:
            print_json([asdict(Finding("settings", False, str(error)))])
        raise
    checks = {
        "price card": _examine_price_card,
        "database": _examine_database,
        "state directory": _examine_state_directory,
        "upstream": _examine_upstream,
    }
    if settings.openid is not None:
        checks["identity provider"] = _examine_provider
    findings = [Finding("settings", True, "every setting can be read")]
    findings += [_find(check, examine, settings) for check, examine in checks.items()]
    if as_json:
        print_json([asdict(finding) for finding in findings])
    else:
        for finding in findings:
            print(f"{'ok' if finding.ok else 'failed':8}{finding.check:19}{finding.message}")
    for caution in cautions(settings):
        say(caution)
    raise typer.Exit(0 if all(finding.ok for finding in findings) else 1)


def _find(check: str, examine: Callable[[Settings], str], settings: Settings) -> Finding:
    try:
        return Finding(check, True, examine(settings))
    except Exception as error:
        explained = explain(error)
        if explained is None:
            raise
        return Finding(check, False, explained[1])


def _examine_price_card(settings: Settings) -> str:
    from proxy.settings import load_card

    card = load_card(settings)
    prices = sum(len(model.micro_usd) for model in card.models.values())
    return f"version {card.version}: {prices} prices of {', '.join(card.models)}"


def _examine_database(_settings: Settings) -> str:
    from proxy.ledger.schema import REVISION

    with database() as opened:
        return f"{opened.dialect}, at schema {REVISION}"


def _examine_state_directory(settings: Settings) -> str:
    directory = settings.state_dir.absolute()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(b"x")
    except OSError as error:
        raise Failed(
            f"{directory} can't be written: {error.strerror}; give this user the right to, or set BEANMETER_STATE_DIR"
        ) from None
    return f"{directory} can be written"


def _examine_upstream(settings: Settings) -> str:
    """Asks for the upstream's models, which costs nothing."""
    if settings.upstream_key is None:
        raise Failed("no upstream key: set BEANMETER_UPSTREAM_KEY, or run 'beanmeter demo' to do without one")
    status = _get_models(settings.upstream_url, settings.upstream_key.get_secret_value())
    if status == 200:
        return f"{settings.upstream_url} answers and takes the key"
    if status in (401, 403):
        raise Failed(f"{settings.upstream_url} refuses the key (HTTP {status}): check BEANMETER_UPSTREAM_KEY")
    if status in (404, 405):
        return f"{settings.upstream_url} answers, but lists no models (HTTP {status}): the key can't be tried without cost"
    raise Failed(f"{settings.upstream_url}/models answers HTTP {status}: check BEANMETER_UPSTREAM_URL, or try again later")


def _examine_provider(settings: Settings) -> str:
    """Asks for the provider's description of itself. Whether it takes the client shows only when somebody signs in."""
    from proxy.pages.identity import ProviderError
    from proxy.pages.oidc import Provider

    assert settings.openid is not None
    try:
        asyncio.run(Provider(settings.openid).check())
    except ProviderError as error:
        raise Failed(str(error)) from None
    return f"{settings.openid.issuer} describes itself"


def _get_models(base_url: str, key: str) -> int:
    """The status of ``GET {base_url}/models``. Follows no redirect: the key goes to the configured host alone."""
    url = urlsplit(base_url)
    kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
    connection = kind(url.hostname or "", url.port, timeout=UPSTREAM_SECONDS)
    try:
        connection.request("GET", f"{url.path}/models", headers={"Authorization": f"Bearer {key}"})
        return connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        raise Failed(
            f"{base_url} can't be reached ({str(error) or type(error).__name__}): "
            "check BEANMETER_UPSTREAM_URL, the name service and the firewall"
        ) from None
    finally:
        connection.close()
