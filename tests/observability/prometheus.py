"""A Prometheus of a test's own, on loopback, and what its HTTP API says."""

from __future__ import annotations

import json
import math
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import httpx2

from tests.observability.programs import PATIENCE_SECONDS, program
from tests.ports import free_port

# How often it is asked whether something has come: often enough for the test, and no load.
_LOOK_SECONDS = 0.25


class Prometheus:
    """A running Prometheus. ``options`` are those of its command line; its data and its log are kept in ``place``."""

    def __init__(self, configuration: Path, place: Path, *options: str) -> None:
        place.mkdir()
        self.port = free_port()
        self._log = place / "log"
        self._command = [
            program("prometheus"),
            f"--config.file={configuration}",
            f"--storage.tsdb.path={place / 'data'}",
            f"--web.listen-address=127.0.0.1:{self.port}",
            *options,
        ]

    def __enter__(self) -> Self:
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log)
        self._client = httpx2.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=PATIENCE_SECONDS, trust_env=False)
        assert until(self._is_ready), self._log.read_text()
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()
        self._process.terminate()
        try:
            self._process.wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _is_ready(self) -> bool:
        assert self._process.poll() is None, self._log.read_text()
        try:
            return self._client.get("/-/ready").status_code == 200
        except httpx2.TransportError:
            return False

    def groups(self) -> list[dict[str, Any]]:
        """The groups of rules as it has read them, with what came of their last evaluation."""
        groups: list[dict[str, Any]] = self._get("rules")["groups"]
        return groups

    def rules(self) -> list[dict[str, Any]]:
        return [rule for group in self.groups() for rule in group["rules"]]

    def now(self, expression: str) -> dict[tuple[tuple[str, str], ...], float]:
        """What an expression is now: a value for each set of labels. None of them is NaN, which is no value."""
        result = self._get("query", query=expression)["result"]
        values = {tuple(sorted(row["metric"].items())): float(row["value"][1]) for row in result}
        return {labels: value for labels, value in values.items() if not math.isnan(value)}

    def shows(self, expression: str) -> bool:
        """Whether an expression has a value now."""
        return bool(self.now(expression))

    def lately(self, expression: str, seconds: int) -> int:
        """How many values an expression has had at the last so many seconds."""
        end = time.time()
        rows = self._get("query_range", query=expression, start=end - seconds, end=end, step=1)["result"]
        return sum(not math.isnan(float(value)) for row in rows for _, value in row["values"])

    def _get(self, path: str, **query: Any) -> dict[str, Any]:
        response = self._client.request("POST" if query else "GET", f"/api/v1/{path}", data=query)
        found = response.json()
        assert found["status"] == "success", f"{query}: {found}"
        data: dict[str, Any] = found["data"]
        return data


def until(look: Callable[[], bool]) -> bool:
    """Look until there is something to see; whether it came in time."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not look():
        if time.monotonic() > deadline:
            return False
        time.sleep(_LOOK_SECONDS)
    return True


@dataclass(frozen=True)
class Fast:
    """The settings of a Prometheus for which time runs faster. A scrape has a second: the machine may have other work."""

    targets: list[str]
    groups: list[dict[str, Any]]

    def write(self, place: Path) -> Path:
        """Write it down; the path of the main file. Prometheus reads YAML, of which JSON is a part."""
        rules = place / "rules.json"
        rules.write_text(json.dumps({"groups": self.groups}))
        main = place / "prometheus.json"
        jobs = [{"job_name": "beanmeter", "static_configs": [{"targets": self.targets}]}]
        every = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
        main.write_text(json.dumps({"global": every, "rule_files": [str(rules)], "scrape_configs": jobs}))
        return main
