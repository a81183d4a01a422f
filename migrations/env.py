"""Runs migrations inside the transaction that ``proxy.ledger.migrate`` hands over: when, and under what lock, is its affair."""

from __future__ import annotations

from alembic import context

from proxy.ledger.schema import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    # SQLite can't alter most things in place: Alembic copies the table instead.
    render_as_batch=True,
    compare_type=True,
)
context.run_migrations()
