"""What a machine adds to a request of a single client: the time through it, less the time straight to the upstream.

One client asks each in turn, a few requests at a time, on connections that stay open.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, dataclass

from bench.load import ask_in_turns, percentile_ms
from bench.machines import gateway, litellm, nginx, portkey, scratch, upstream
from bench.table import Row, run, verdict

WARM_UP = 100
TURNS = 50
REQUESTS_A_TURN = 20

OF_LITELLM_MAX = 0.1
AIM_MS = 0.7


@dataclass(frozen=True)
class Added:
    """What is added, in milliseconds, at the median and at the 99th percentile."""

    p50_ms: float
    p99_ms: float


def measure() -> list[Row]:
    with ExitStack() as stack:
        directory = stack.enter_context(scratch())
        beans = stack.enter_context(upstream(directory))
        machines = [beans, *(stack.enter_context(start(beans, directory)) for start in (nginx, gateway, portkey, litellm))]
        by_name = {machine.name: machine for machine in machines}
        seconds = ask_in_turns(by_name, turns=TURNS, requests_a_turn=REQUESTS_A_TURN, warm_up=WARM_UP)
    direct = seconds.pop("upstream")
    added = {
        name: Added(*(round(percentile_ms(through, p) - percentile_ms(direct, p), 3) for p in (50, 99)))
        for name, through in seconds.items()
    }
    figures = {name: asdict(one) for name, one in added.items()}
    ours, portkeys, litellms = added["Beanmeter"], added["Portkey"], added["LiteLLM"]
    others = {name: one for name, one in added.items() if name != "Beanmeter"}
    return [
        Row(
            "added latency at 1 client, p50",
            f"below Portkey's and {OF_LITELLM_MAX:g} x LiteLLM's; aim {AIM_MS} ms",
            f"{ours.p50_ms:.2f} ms",
            "; ".join(f"{name} {one.p50_ms:.2f} ms" for name, one in others.items()),
            verdict(ours.p50_ms < portkeys.p50_ms and ours.p50_ms < OF_LITELLM_MAX * litellms.p50_ms),
            figures,
        ),
        Row(
            "added latency at 1 client, p99",
            f"below Portkey's and {OF_LITELLM_MAX:g} x LiteLLM's",
            f"{ours.p99_ms:.2f} ms",
            "; ".join(f"{name} {one.p99_ms:.2f} ms" for name, one in others.items()),
            verdict(ours.p99_ms < portkeys.p99_ms and ours.p99_ms < OF_LITELLM_MAX * litellms.p99_ms),
            figures,
        ),
    ]


if __name__ == "__main__":
    run(measure, seconds_max=240)
