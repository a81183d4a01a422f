"""How the databases go about what is asked of them again and again: what they read, and what they make for it."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import Connection, event

from proxy.ledger.books import post
from proxy.ledger.engine import driver_of
from proxy.ledger.reports import read_figures
from proxy.ledger.sweep import find_expired, find_overdue
from tests.ledger.ledgers import NOON, Account, Ledger, reservation, settled

# Every few seconds, by every process, however long the history is.
ASKED_ALL_THE_TIME: dict[str, Callable[[Connection], object]] = {
    "figures": lambda connection: read_figures(connection, NOON),
    "overdue": lambda connection: find_overdue(connection, NOON),
    "expired": lambda connection: find_expired(connection, NOON, timedelta(hours=1)),
}


@pytest.mark.parametrize("name", ASKED_ALL_THE_TIME)
def test_what_is_asked_all_the_time_reads_open_charges_alone(ledger: Ledger, account: Account, name: str) -> None:
    ledger.post([reservation(account)])
    asked: list[tuple[str, object]] = []

    def see(_connection: object, _cursor: object, statement: str, values: object, *_: object) -> None:
        if "FROM charges" in statement:
            asked.append((statement, values))

    with ledger.database.writing() as connection:
        event.listen(connection, "before_cursor_execute", see)
        try:
            ASKED_ALL_THE_TIME[name](connection)
        finally:
            event.remove(connection, "before_cursor_execute", see)
        ((statement, values),) = asked
        with driver_of(connection) as driver:
            if ledger.database.dialect == "postgresql":
                # So few charges are read quickest one by one.
                driver.execute("SET LOCAL enable_seqscan = off")
                plan = [row[0] for row in driver.execute(f"EXPLAIN {statement}", values).fetchall()]
            else:
                plan = [row[3] for row in driver.execute(f"EXPLAIN QUERY PLAN {statement}", values).fetchall()]
    assert "ix_charges_open" in "\n".join(plan), plan


# An UPDATE of many rows has a table for them, and one for the rows that it finds.
@pytest.mark.parametrize(("size", "tables"), [(1, 0), (20, 2)])
def test_no_row_that_sqlite_writes_needs_a_table_of_its_own(tmp_path: Path, size: int, tables: int) -> None:
    ledger = Ledger(f"sqlite:///{tmp_path / 'beanmeter.db'}")
    account = ledger.account()
    ledger.set_budget(10**12)
    first = [reservation(account) for _ in range(size)]
    ledger.post(first)
    written: list[str] = []
    with ledger.database.posting() as connection, driver_of(connection) as driver:
        assert isinstance(driver, sqlite3.Connection)
        driver.set_trace_callback(written.append)
        post(connection, [reservation(account) for _ in range(size)], [settled(job) for job in first], NOON)
        driver.set_trace_callback(None)
        written = [sql for sql in written if sql.startswith(("INSERT", "UPDATE"))]
        steps = [row[1] for sql in written for row in driver.execute(f"EXPLAIN {sql}").fetchall()]
    assert len(written) == 5
    assert steps.count("OpenWrite") > 5
    assert steps.count("OpenEphemeral") == tables
    ledger.close()
