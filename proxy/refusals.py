"""What a caller reads when the ledger says no: which budget, which limit, which earlier request, and what to do next."""

from __future__ import annotations

from proxy.errors import (
    IdempotencyKeyInUse,
    IdempotencyKeyMismatch,
    IdempotencyKeyReused,
    InsufficientQuota,
    InvalidApiKey,
    LedgerUnavailable,
    RateLimitExceeded,
    Refusal,
)
from proxy.ledger.decisions import Decision, OverBudget, Repeated, TooFast
from proxy.money import format_usd


def refusal_of(decision: Decision | LedgerUnavailable) -> Refusal:
    """The refusal for a decision that is not :class:`Admitted`; a refusal passes as it is."""
    if isinstance(decision, Refusal):
        return decision
    if isinstance(decision, OverBudget):
        return InsufficientQuota(_over_budget(decision))
    if isinstance(decision, TooFast):
        return RateLimitExceeded(_too_fast(decision), decision.retry_after_seconds)
    if isinstance(decision, Repeated):
        return _repeated(decision)
    return InvalidApiKey()


def _over_budget(decision: OverBudget) -> str:
    """What the caller needs to know to go on: whose budget, how much, what is left, what this costs, until when."""
    period = "for all time" if decision.period == "total" else f"per {decision.period}"
    reset = "" if decision.resets_at is None else f" It resets at {decision.resets_at:%Y-%m-%dT%H:%M:%SZ}."
    return (
        f"The {decision.scope}'s budget of ${format_usd(decision.limit_micro_usd)} {period} has "
        f"${format_usd(max(0, decision.remaining_micro_usd))} left, and this request costs up to "
        f"${format_usd(decision.cost_micro_usd)}. Nothing was sent upstream.{reset} "
        "Ask for a smaller size, a lower quality or fewer images, or ask the operator for a larger budget."
    )


def _too_fast(decision: TooFast) -> str:
    if decision.rpm is not None:
        return f"The {decision.scope}'s limit of {decision.rpm} requests a minute is reached. Nothing was sent upstream."
    return f"The {decision.scope}'s limit of {decision.concurrency} requests at a time is reached. Nothing was sent upstream."


def _repeated(decision: Repeated) -> Refusal:
    earlier = decision.earlier
    if decision.other_body:
        return IdempotencyKeyMismatch(earlier.request_id)
    if earlier.state in ("reserved", "forwarded"):
        return IdempotencyKeyInUse(earlier.request_id)
    return IdempotencyKeyReused(earlier.request_id, format_usd(earlier.settled_micro_usd + earlier.reserved_micro_usd))
