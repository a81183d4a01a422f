"""From the start of the process to ``/readyz``, and the memory that it has at rest, beside its peers."""

from __future__ import annotations

import statistics
import time

from bench.machines import gateway, litellm, portkey, scratch, upstream
from bench.table import Row, run, verdict

ROUNDS = 3

# LiteLLM takes half a minute; its start says enough when it is seen twice.
ROUNDS_OF_LITELLM = 2

REST_SECONDS = 3

START_SECONDS_MAX = 2.0
REST_BYTES_MAX = 90 * 1_000_000


def measure() -> list[Row]:
    seconds: dict[str, list[float]] = {}
    pss_bytes: dict[str, list[int]] = {}
    with scratch() as directory, upstream(directory) as beans:
        for number in range(ROUNDS):
            for start in (gateway, portkey, litellm) if number < ROUNDS_OF_LITELLM else (gateway, portkey):
                with start(beans, directory) as machine:
                    time.sleep(REST_SECONDS)
                    seconds.setdefault(machine.name, []).append(round(machine.start_seconds, 2))
                    pss_bytes.setdefault(machine.name, []).append(machine.pss_bytes())
    taken = {name: statistics.median(rounds) for name, rounds in seconds.items()}
    rest = {name: statistics.median(rounds) for name, rounds in pss_bytes.items()}
    peers = [name for name in taken if name != "Beanmeter"]
    return [
        Row(
            "start to /readyz",
            f"under {START_SECONDS_MAX:g} s",
            f"{taken['Beanmeter']:.2f} s",
            "; ".join(f"{name} {taken[name]:.1f} s" for name in peers),
            verdict(taken["Beanmeter"] < START_SECONDS_MAX),
            {"rounds_seconds": seconds},
        ),
        Row(
            "memory at rest",
            f"under {REST_BYTES_MAX // 1_000_000} MB",
            f"{rest['Beanmeter'] / 1e6:.0f} MB",
            "; ".join(f"{name} {rest[name] / 1e6:.0f} MB" for name in peers),
            verdict(rest["Beanmeter"] < REST_BYTES_MAX),
            {"rounds_pss_bytes": pss_bytes},
        ),
    ]


if __name__ == "__main__":
    run(measure, seconds_max=300)
