"""A gateway that the tests of a file share, and one of a test's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.live import LiveGateway, ScriptedUpstream, live_gateway
from tests.refusals.checks import MAX_BODY_BYTES


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LiveGateway, ScriptedUpstream]]:
    directory = tmp_path_factory.mktemp("refusals")
    settings = {"BEANMETER_MAX_BODY_BYTES": str(MAX_BODY_BYTES)}
    with live_gateway(f"sqlite:///{directory}/beanmeter.db", directory, settings) as parts:
        yield parts


@pytest.fixture
def key(live: tuple[LiveGateway, ScriptedUpstream]) -> str:
    return live[0].key


@pytest.fixture
def own(database_url: str, tmp_path: Path) -> Iterator[tuple[LiveGateway, ScriptedUpstream]]:
    """A gateway of the test's own, on each kind of database."""
    with live_gateway(database_url, tmp_path) as parts:
        yield parts
