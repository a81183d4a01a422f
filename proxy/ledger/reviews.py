"""Charges whose cost nobody knows yet: settling or releasing them by an operator's word, or when their time is up."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Row, select

from proxy.ledger.accounts import AccountError, record
from proxy.ledger.books import lock_teams, post
from proxy.ledger.decisions import Booking
from proxy.ledger.schema import charges
from proxy.outcomes import Outcome


def settle(connection: Connection, charge_id: str, micro_usd: int, *, now: datetime, actor: str) -> dict[str, Any]:
    """Settle a review at what the upstream's bill says, in all. Raises :class:`AccountError` for what is not in review."""
    row = _locked(connection, charge_id)
    outcome = Outcome("settled", micro_usd, 0, row.images_delivered, row.size, row.quality, "operator", "operator")
    return _end(connection, row, outcome, "review.settle", now, actor, reason="")


def release(connection: Connection, charge_id: str, reason: str, *, now: datetime, actor: str) -> dict[str, Any]:
    """Release a review: it cost nothing, for the reason given."""
    if not reason.strip() or len(reason) > 500:
        raise AccountError("say in 1 to 500 characters why this charge cost nothing")
    row = _locked(connection, charge_id)
    outcome = Outcome("released", 0, 0, 0, row.size, row.quality, None, "operator")
    return _end(connection, row, outcome, "review.release", now, actor, reason=reason)


def expire(connection: Connection, charge_id: str, *, now: datetime, actor: str) -> bool:
    """Settle a review that nobody resolved at all that it holds; whether it was still in review."""
    row = _lock(connection, charge_id)
    if row is None or row.state != "review":
        return False
    amount = row.settled_micro_usd + row.reserved_micro_usd
    outcome = Outcome("settled", amount, 0, row.images_delivered, row.size, row.quality, "expired", "review_expired")
    _end(connection, row, outcome, "review.expire", now, actor, reason="")
    return True


def _locked(connection: Connection, charge_id: str) -> Row[Any]:
    row = _lock(connection, charge_id)
    if row is None:
        raise AccountError(f"there is no charge {charge_id!r}", "list_reviews")
    if row.state != "review":
        raise AccountError(f"charge {charge_id} is {row.state}, not in review; what has ended stays as it is")
    return row


def _lock(connection: Connection, charge_id: str) -> Row[Any] | None:
    """The charge as it is once its team is locked, and nobody else can change it."""
    query = select(charges).where(charges.c.id == charge_id)
    row = connection.execute(query).one_or_none()
    if row is not None:
        lock_teams(connection, [row.team_id])
        row = connection.execute(query).one()
    return row


def _end(
    connection: Connection, row: Row[Any], outcome: Outcome, action: str, now: datetime, actor: str, *, reason: str
) -> dict[str, Any]:
    post(connection, [], [Booking(row.id, row.team_id, outcome)], now)
    before = _terms(row)
    after = _terms(connection.execute(select(charges).where(charges.c.id == row.id)).one())
    record(connection, action, row.id, before, after | ({"reason": reason} if reason else {}), now, actor)
    return after


def _terms(row: Row[Any]) -> dict[str, Any]:
    names = ("id", "state", "basis", "images_delivered", "settled_micro_usd", "reserved_micro_usd", "finished_at")
    return {name: getattr(row, name) for name in names}
