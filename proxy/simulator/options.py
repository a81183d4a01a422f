"""How a simulated BeansAI is set up, and its limits. Every setting of the simulator is here."""

from __future__ import annotations

from dataclasses import dataclass, field

from proxy.prices import PriceCard, shipped_card


@dataclass(frozen=True, slots=True)
class SimulatorOptions:
    """The simulator's settings; the defaults are a fast, honest BeansAI."""

    #: The one key that is accepted; ``None`` accepts any ``sk-beans-...``.
    key: str | None = None
    card: PriceCard = field(default_factory=shipped_card)
    #: What ``auto`` and an absent value come to.
    auto_size: str = "1024x1024"
    auto_quality: str = "medium"
    #: Whether answers carry ``X-Request-Cost-Micro-Usd``.
    cost_header: bool = True
    #: Time that each image and each preview takes.
    image_seconds: float = 0.0
    preview_seconds: float = 0.0
    #: How long silence lasts before the connection is closed: above any client's own deadline, but not for ever.
    silent_seconds: float = 900.0
    #: An idle connection is closed after this; clients let theirs go much earlier.
    idle_seconds: float = 300.0
    #: Larger bodies get 413. Bodies are parsed in memory.
    body_bytes_max: int = 128 * 1024 * 1024
    #: Requests and bill entries that are kept; a load test fits, and a hundred megabytes hold them.
    log_max: int = 100_000
