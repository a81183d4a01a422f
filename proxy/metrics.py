"""Every metric, and the page that shows them. Labels come from closed sets: names of teams, and of what is priced.

Counters are this program's own, in memory or, with several workers, in files that all of them share. Money gauges are
not counted here: they are read from the ledger at each scrape.
"""

from __future__ import annotations

import functools
import os
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar, get_args

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, values
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.mmap_dict import MmapedDict
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.values import MultiProcessValue

from proxy import __version__
from proxy.ledger.refused import Refused
from proxy.ledger.reports import BudgetStatus, Figures
from proxy.ledger.teller import Step
from proxy.money import MICRO_PER_USD
from proxy.periods import Period
from proxy.prices import Operation

# An image takes from a second to some minutes; an own step takes from a tenth of a millisecond to some seconds.
_EXCHANGE_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 45, 60, 90, 120, 180, 300, 600)
_STEP_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)

_IMAGE = ["team", "model", "operation", "size", "quality"]

# A refusal that was made before a valid key was seen belongs to no team.
NO_TEAM = ""

MULTIPROCESS_DIR = "PROMETHEUS_MULTIPROC_DIR"

# The time of a series' birth, as a series of its own, doubles the page and tells nothing here.
disable_created_metrics()  # type: ignore[no-untyped-call]


def share(directory: Path, number: int) -> None:
    """Count in files of ``directory``, as one of several processes. To be called before the first :class:`Metrics`.

    A process that takes a dead one's number counts on where that one stopped, so there are never more files than numbers.
    """
    os.environ[MULTIPROCESS_DIR] = str(directory)
    values.ValueClass = MultiProcessValue(lambda: number)  # type: ignore[no-untyped-call]


def forget_gauges(directory: Path, number: int) -> None:
    """Let go of what a process said of itself that is true only of a living one."""
    mark_process_dead(number, directory)  # type: ignore[no-untyped-call]


_Instrument = TypeVar("_Instrument", Counter, Histogram, Gauge)


class Metrics:
    """The gateway's instruments. One object a process: the names are registered once."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return _remembering(Counter(name, text, labels, registry=registry))

        def histogram(name: str, text: str, buckets: Iterable[float], *labels: str) -> Histogram:
            return _remembering(Histogram(name, text, labels, buckets=tuple(buckets), registry=registry))

        self.registry = registry
        self.requests = counter(
            "beanmeter_requests_total", "Exchanges, by the state of their charge at the end.", "team", "operation", "outcome"
        )
        self.refusals = counter("beanmeter_refusals_total", "Requests that the gateway refused.", "team", "code")
        # The same, on its way into the books.
        self.refused_lately = Refused()
        self.images = counter("beanmeter_images_total", "Images delivered.", *_IMAGE)
        self.spend = counter("beanmeter_spend_usd_total", "Settled spend in USD.", *_IMAGE)
        self.duration = histogram(
            "beanmeter_request_duration_seconds",
            "From a request's arrival to the end of its exchange.",
            _EXCHANGE_SECONDS,
            "operation",
            "outcome",
        )
        self.first_byte = histogram(
            "beanmeter_first_byte_seconds",
            "From the hold to the first byte of the answer's body.",
            _EXCHANGE_SECONDS,
            "operation",
        )
        self.overhead = histogram(
            "beanmeter_overhead_seconds", "What the gateway itself adds to a request.", _STEP_SECONDS, "stage"
        )
        self.inflight = _remembering(
            Gauge(
                "beanmeter_inflight_requests",
                "Exchanges going on now.",
                ["operation"],
                registry=registry,
                multiprocess_mode="livesum",
            )
        )
        self.upstream_responses = counter(
            "beanmeter_upstream_responses_total", "Answers of the upstream.", "operation", "status_class"
        )
        self.upstream_rate_limited = counter(
            "beanmeter_upstream_rate_limited_total",
            "Answers of the upstream with status 429, which are among the 4xx.",
            "operation",
        )
        self.internal_errors = counter(
            "beanmeter_internal_errors_total", "Errors of the gateway's own that nobody foresaw.", "where"
        )
        # What may never happen is there from the start: of a series that is not there, nobody knows that it is zero.
        for operation in get_args(Operation):
            self.upstream_rate_limited.labels(operation)
        for where in ("request", "exchange", "answer", "endpoint"):
            self.internal_errors.labels(where)
        self.response_bytes = counter("beanmeter_response_bytes_total", "Bytes of answers' bodies.", "operation")
        self.ledger_commit = histogram(
            "beanmeter_ledger_commit_seconds", "A ledger transaction, from its beginning to its commit.", _STEP_SECONDS, "step"
        )
        self.ledger_failures = counter("beanmeter_ledger_failures_total", "Ledger transactions that failed.", "step")
        self.journal_entries = Gauge(
            "beanmeter_journal_entries",
            "Outcomes that wait to be booked because the database was away.",
            registry=registry,
            multiprocess_mode="livesum",
        )
        self.overrun = counter(
            "beanmeter_overrun_total", "Charges above what was held, because the answer reported dearer images."
        )
        self.cost_mismatch = counter(
            "beanmeter_upstream_cost_mismatch_total", "Charges that differ from the cost which the upstream stated."
        )

    def refused(self, team: str, code: str) -> None:
        """A request was refused."""
        self.refusals.labels(team, code).inc()
        self.refused_lately.count(team, code)

    def committed(self, step: Step, seconds: float) -> None:
        """A ledger transaction went well."""
        self.ledger_commit.labels(step).observe(seconds)

    def failed(self, step: Step) -> None:
        """A ledger transaction failed."""
        self.ledger_failures.labels(step).inc()

    def page(self, accept: str, price_card: str, figures: Figures | None) -> tuple[bytes, str]:
        """The page in the format that ``accept`` asks for, and its content type.

        ``figures`` is ``None`` while the ledger can't be read: its gauges are absent then, not zero.
        """
        registry = self.registry
        if MULTIPROCESS_DIR in os.environ:
            registry = CollectorRegistry()
            _Shared(registry)  # type: ignore[no-untyped-call]
        encode, content_type = choose_encoder(accept)
        return encode(_Page(registry, price_card, figures)), content_type


def _remembering(instrument: _Instrument) -> _Instrument:
    """Looks each set of labels up once: the library checks, copies and locks at every look, a dozen times a request."""
    instrument.labels = functools.cache(instrument.labels)  # type: ignore[method-assign]
    return instrument


class _Shared(MultiProcessCollector):
    """The files of all processes together."""

    def collect(self) -> Any:
        # A process that is starting, or was killed while it did, has a file with nothing in it. The others' count all the same.
        files = [str(path) for path in Path(self._path).glob("*.db") if _is_readable(path)]
        return self.merge(files)  # type: ignore[no-untyped-call]


def _is_readable(path: Path) -> bool:
    try:
        for _ in MmapedDict.read_all_values_from_file(path):  # type: ignore[no-untyped-call]
            pass
    except (OSError, RuntimeError, ValueError, struct.error):
        return False
    return True


class _Page:
    """A registry's metrics, and what is read at the scrape, as an encoder takes them."""

    def __init__(self, registry: CollectorRegistry, price_card: str, figures: Figures | None) -> None:
        self._registry = registry
        self._price_card = price_card
        self._figures = figures

    def collect(self) -> Iterator[Metric]:
        yield from self._registry.collect()
        yield _info("beanmeter_price_card_info", "The price card in force.", self._price_card)
        yield _info("beanmeter_build_info", "The release that runs.", __version__)
        if self._figures is not None:
            yield from _ledger(self._figures)


def _info(name: str, text: str, version: str) -> Metric:
    metric = GaugeMetricFamily(name, text, labels=["version"])
    metric.add_metric([version], 1)
    return metric


def _ledger(figures: Figures) -> Iterator[Metric]:
    gauges: dict[str, Any] = {
        amount: GaugeMetricFamily(f"beanmeter_budget_{amount}_usd", text, labels=["team", "period"])
        for amount, text in (
            ("limit", "A team's budget in USD."),
            ("settled", "What is settled against a team's budget in its current period, in USD."),
            ("held", "What is held against a team's budget in its current period, in USD."),
        )
    }
    fullest: dict[tuple[str, Period], float] = {}
    for budget in figures.budgets:
        if budget.scope == "key":
            place = (budget.team, budget.period)
            fullest[place] = max(fullest.get(place, 0.0), _used(budget))
        else:
            labels = [budget.team, budget.period]
            gauges["limit"].add_metric(labels, budget.limit_micro_usd / MICRO_PER_USD)
            gauges["settled"].add_metric(labels, budget.settled_micro_usd / MICRO_PER_USD)
            gauges["held"].add_metric(labels, budget.held_micro_usd / MICRO_PER_USD)
    yield from gauges.values()
    # A key is no label: there can be any number of them, and they come and go.
    keys = GaugeMetricFamily(
        "beanmeter_key_budget_used_ratio",
        "Of the budgets of a team's single keys, the fullest: settled and held, by its limit.",
        labels=["team", "period"],
    )
    for place, used in fullest.items():
        keys.add_metric(place, used)
    yield keys
    charges = GaugeMetricFamily("beanmeter_charges_open", "Charges that hold money, by state.", labels=["state"])
    for state, count in figures.open_charges.items():
        charges.add_metric([state], count)
    yield charges
    yield GaugeMetricFamily(
        "beanmeter_oldest_review_hours",
        "How long the oldest open review has been waiting, in hours; 0 where there is none.",
        value=figures.oldest_review_hours,
    )


def _used(budget: BudgetStatus) -> float:
    """The part of a budget that is used; a budget of nothing is full."""
    used = budget.settled_micro_usd + budget.held_micro_usd
    return used / budget.limit_micro_usd if budget.limit_micro_usd else 1.0
