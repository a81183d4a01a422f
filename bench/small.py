"""Small JSON generations of 32 clients at once: one worker on SQLite, with a team and its budget, beside its peers."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict

from bench import books
from bench.load import Median, Wrk, take_turns
from bench.machines import gateway, litellm, nginx, portkey, scratch, upstream
from bench.table import Row, run, verdict

CLIENTS = 32
ROUNDS = 3
ROUND_SECONDS = 5

TIMES_PORTKEY_MIN = 2.0
TIMES_LITELLM_MIN = 25.0
TIMES_PORTKEY_AIM = 3.0


def rate(name: str, median: Median) -> str:
    return (
        f"{name} {median.requests_a_second:,.0f}/s, p50 {median.p50_ms:.1f} ms, p99 {median.p99_ms:.1f} ms, "
        f"{median.cpu_ms_a_request:.2f} ms CPU a request"
    )


def measure() -> list[Row]:
    with ExitStack() as stack:
        directory = stack.enter_context(scratch())
        beans = stack.enter_context(upstream(directory))
        machines = [stack.enter_context(start(beans, directory)) for start in (nginx, gateway, portkey, litellm)]
        medians = take_turns(Wrk(directory, CLIENTS), machines, rounds=ROUNDS, seconds=ROUND_SECONDS)
        books.check(machines[1].database_url, medians["Beanmeter"].requests)
    ours = medians["Beanmeter"]
    times_portkey = ours.requests_a_second / medians["Portkey"].requests_a_second
    times_litellm = ours.requests_a_second / medians["LiteLLM"].requests_a_second
    return [
        Row(
            f"small JSON generations, {CLIENTS} clients",
            f"{TIMES_PORTKEY_MIN:g} x Portkey and {TIMES_LITELLM_MIN:g} x LiteLLM; aim {TIMES_PORTKEY_AIM:g} x Portkey",
            f"{rate('', ours).strip()}: {times_portkey:.2f} x Portkey, {times_litellm:.1f} x LiteLLM",
            "; ".join(rate(name, medians[name]) for name in ("nginx", "Portkey", "LiteLLM")),
            verdict(times_portkey >= TIMES_PORTKEY_MIN and times_litellm >= TIMES_LITELLM_MIN),
            {name: asdict(median) for name, median in medians.items()},
        )
    ]


if __name__ == "__main__":
    run(measure, seconds_max=240)
