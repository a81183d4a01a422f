"""The gateway that the tests of a file share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.live import LiveGateway, ScriptedUpstream, live_gateway


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LiveGateway, ScriptedUpstream]]:
    """One gateway for the whole table: each row has a team of its own."""
    directory = tmp_path_factory.mktemp("stage")
    with live_gateway(f"sqlite:///{directory / 'beanmeter.db'}", directory) as parts:
        yield parts
