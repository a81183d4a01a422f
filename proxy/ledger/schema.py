"""The tables. What can't be is a CHECK here, so that no program, ours or another's, can write it.

Amounts are integer micro-USD, instants are UTC, days are UTC days.
"""

from __future__ import annotations

from datetime import UTC, datetime

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Date,
    DateTime,
    Dialect,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    TypeDecorator,
    text,
)

# The newest migration, so that a start can tell an old database without loading Alembic; a test holds them together.
REVISION = "0001"

OPEN_STATES = ("reserved", "forwarded", "review")

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)


class Instant(TypeDecorator[datetime]):
    """An aware UTC ``datetime``: ``timestamptz`` on PostgreSQL, UTC text without an offset on SQLite."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None or dialect.name != "sqlite":
            return value
        return value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


# SQLite counts up only in a column declared INTEGER.
_Serial = BigInteger().with_variant(Integer, "sqlite")


def _micro_usd(name: str) -> Column[int]:
    return Column(name, BigInteger, nullable=False)


def _unique_where(name: str, *columns: str, where: str) -> Index:
    return Index(name, *columns, unique=True, postgresql_where=text(where), sqlite_where=text(where))


def _among(column: str, *values: str) -> str:
    # Each by itself: for a list of more than two SQLite makes a table of its own, at each row that is written.
    return f"({' OR '.join(f'{column} = {value!r}' for value in values)})"


# Open and released charges are few among millions, and have indexes of their own. SQLite takes one where it reads its very
# words, whatever else is asked for.
IS_OPEN, IS_RELEASED = (text(_among("state", *states)) for states in (OPEN_STATES, ("released",)))


teams = Table(
    "teams",
    metadata,
    Column("id", _Serial, primary_key=True),
    Column("name", Text, nullable=False, unique=True),
    Column("created_at", Instant, nullable=False),
    Column("archived_at", Instant),
    CheckConstraint("length(name) BETWEEN 1 AND 64", name="name_length"),
)

keys = Table(
    "keys",
    metadata,
    Column("id", Text, primary_key=True),
    Column("team_id", ForeignKey("teams.id"), nullable=False, index=True),
    Column("name", Text, nullable=False),
    Column("digest", LargeBinary(32), nullable=False, unique=True),
    Column("last_four", Text, nullable=False),
    Column("created_at", Instant, nullable=False),
    Column("expires_at", Instant),
    Column("revoked_at", Instant),
    # The key that was made in its place.
    Column("successor_id", ForeignKey("keys.id")),
    CheckConstraint("length(digest) = 32", name="digest_length"),
    CheckConstraint("length(last_four) = 4", name="last_four_length"),
)

budgets = Table(
    "budgets",
    metadata,
    Column("id", _Serial, primary_key=True),
    Column("team_id", ForeignKey("teams.id"), nullable=False),
    Column("key_id", ForeignKey("keys.id")),
    Column("period", Text, nullable=False),
    _micro_usd("limit_micro_usd"),
    Column("soft", Boolean, nullable=False),
    Column("created_at", Instant, nullable=False),
    CheckConstraint(_among("period", "day", "week", "month", "total"), name="period"),
    CheckConstraint("limit_micro_usd >= 0", name="limit_not_negative"),
    # One budget a scope and period. Two partial indexes, because NULLs never equal each other in a plain one.
    _unique_where("uq_budgets_team", "team_id", "period", where="key_id IS NULL"),
    _unique_where("uq_budgets_key", "team_id", "key_id", "period", where="key_id IS NOT NULL"),
)

# How fast and how much at once a team, or one of its keys, may ask.
limits = Table(
    "limits",
    metadata,
    Column("id", _Serial, primary_key=True),
    Column("team_id", ForeignKey("teams.id"), nullable=False),
    Column("key_id", ForeignKey("keys.id")),
    Column("rpm", Integer),
    Column("concurrency", Integer),
    Column("created_at", Instant, nullable=False),
    CheckConstraint("rpm >= 0 AND concurrency >= 0", name="not_negative"),
    CheckConstraint("rpm IS NOT NULL OR concurrency IS NOT NULL", name="limits_something"),
    _unique_where("uq_limits_team", "team_id", where="key_id IS NULL"),
    _unique_where("uq_limits_key", "team_id", "key_id", where="key_id IS NOT NULL"),
)

# What counts against a budget in one period: always the sum over the charges that were reserved in it.
balances = Table(
    "balances",
    metadata,
    Column("budget_id", ForeignKey("budgets.id", ondelete="CASCADE"), primary_key=True),
    Column("period_start", Date, primary_key=True),
    _micro_usd("settled_micro_usd"),
    _micro_usd("held_micro_usd"),
    CheckConstraint("settled_micro_usd >= 0", name="settled_not_negative"),
    CheckConstraint("held_micro_usd >= 0", name="held_not_negative"),
)

charges = Table(
    "charges",
    metadata,
    Column("id", Text, primary_key=True),
    Column("request_id", Text, nullable=False, unique=True),
    Column("team_id", ForeignKey("teams.id"), nullable=False),
    Column("key_id", ForeignKey("keys.id"), nullable=False),
    Column("operation", Text, nullable=False),
    Column("model", Text, nullable=False),
    # As asked until the charge is booked, then as delivered.
    Column("size", Text, nullable=False),
    Column("quality", Text, nullable=False),
    Column("asked_size", Text, nullable=False),
    Column("asked_quality", Text, nullable=False),
    Column("stream", Boolean, nullable=False),
    Column("images_requested", Integer, nullable=False),
    Column("images_delivered", Integer, nullable=False),
    Column("state", Text, nullable=False),
    _micro_usd("hold_micro_usd"),
    _micro_usd("reserved_micro_usd"),
    _micro_usd("settled_micro_usd"),
    Column("basis", Text),
    Column("reason", Text),
    Column("upstream_status", Integer),
    Column("upstream_cost_micro_usd", BigInteger),
    Column("upstream_request_id", Text),
    Column("input_tokens", BigInteger),
    Column("output_tokens", BigInteger),
    Column("price_card", Text, nullable=False),
    # SHA-256 of the caller's Idempotency-Key, and of the body it came with.
    Column("idempotency_digest", LargeBinary(32)),
    Column("body_digest", LargeBinary(32)),
    Column("created_at", Instant, nullable=False),
    Column("deadline_at", Instant, nullable=False),
    Column("finished_at", Instant),
    CheckConstraint(_among("operation", "generation", "edit"), name="operation"),
    CheckConstraint(_among("state", "reserved", "forwarded", "settled", "released", "review"), name="state"),
    CheckConstraint(
        _among("basis", "requested", "reported", "measured", "assumed", "operator", "expired"),
        name="basis",
    ),
    CheckConstraint("images_requested BETWEEN 1 AND 10", name="images_requested"),
    CheckConstraint("images_delivered >= 0", name="images_delivered"),
    CheckConstraint("hold_micro_usd > 0", name="hold_positive"),
    CheckConstraint("reserved_micro_usd BETWEEN 0 AND hold_micro_usd", name="reserved_within_hold"),
    CheckConstraint("settled_micro_usd >= 0", name="settled_not_negative"),
    CheckConstraint(
        "state NOT IN ('reserved', 'forwarded') OR "
        "(reserved_micro_usd = hold_micro_usd AND settled_micro_usd = 0 AND finished_at IS NULL)",
        name="open_holds_all",
    ),
    CheckConstraint("state NOT IN ('settled', 'released') OR reserved_micro_usd = 0", name="ended_holds_nothing"),
    CheckConstraint("state <> 'released' OR settled_micro_usd = 0", name="released_costs_nothing"),
    CheckConstraint("state <> 'settled' OR basis IS NOT NULL", name="settled_has_basis"),
    CheckConstraint("state IN ('reserved', 'forwarded') OR finished_at IS NOT NULL", name="ended_has_time"),
    Index("ix_charges_team_id_created_at", "team_id", "created_at"),
    Index("ix_charges_created_at", "created_at"),
    Index("ix_charges_key_id_created_at", "key_id", "created_at"),
    # One upstream call an idempotency key; what was released may be tried again.
    _unique_where(
        "uq_charges_idempotency",
        "team_id",
        "idempotency_digest",
        where="idempotency_digest IS NOT NULL AND state <> 'released'",
    ),
    # Open charges are few among millions.
    Index(
        "ix_charges_open",
        "state",
        "deadline_at",
        postgresql_where=IS_OPEN,
        sqlite_where=IS_OPEN,
    ),
    # So are those that came to nothing, which people look for.
    Index(
        "ix_charges_released",
        # One value throughout: with it in front, SQLite takes this index and not the larger one of the rest.
        "state",
        "team_id",
        "created_at",
        postgresql_where=IS_RELEASED,
        sqlite_where=IS_RELEASED,
    ),
)

# Sums over charges by the day of their reservation, written in the transaction that writes the charge.
rollups = Table(
    "rollups",
    metadata,
    Column("day", Date, primary_key=True),
    Column("team_id", ForeignKey("teams.id"), primary_key=True),
    Column("key_id", ForeignKey("keys.id"), primary_key=True),
    Column("model", Text, primary_key=True),
    Column("operation", Text, primary_key=True),
    Column("size", Text, primary_key=True),
    Column("quality", Text, primary_key=True),
    Column("requests", BigInteger, nullable=False),
    Column("images", BigInteger, nullable=False),
    _micro_usd("settled_micro_usd"),
    _micro_usd("reserved_micro_usd"),
    CheckConstraint("requests >= 0 AND images >= 0", name="counts_not_negative"),
    CheckConstraint("settled_micro_usd >= 0 AND reserved_micro_usd >= 0", name="amounts_not_negative"),
)

# Sums over those sums by day and team alone, written beside them: what pages show of all teams must not read them all.
team_days = Table(
    "team_days",
    metadata,
    Column("day", Date, primary_key=True),
    Column("team_id", ForeignKey("teams.id"), primary_key=True),
    Column("requests", BigInteger, nullable=False),
    Column("images", BigInteger, nullable=False),
    _micro_usd("settled_micro_usd"),
    _micro_usd("reserved_micro_usd"),
    CheckConstraint("requests >= 0 AND images >= 0", name="counts_not_negative"),
    CheckConstraint("settled_micro_usd >= 0 AND reserved_micro_usd >= 0", name="amounts_not_negative"),
)

# How often requests were refused, by the day: every process adds to it now and then. It is no money.
refusals = Table(
    "refusals",
    metadata,
    Column("day", Date, primary_key=True),
    # A team's name; empty where no valid key was shown.
    Column("team", Text, primary_key=True),
    Column("code", Text, primary_key=True),
    Column("times", BigInteger, nullable=False),
    CheckConstraint("times > 0", name="times_positive"),
)

# Who changed what. Rows are only ever added.
audit = Table(
    "audit",
    metadata,
    Column("id", _Serial, primary_key=True),
    Column("at", Instant, nullable=False),
    Column("actor", Text, nullable=False),
    Column("action", Text, nullable=False),
    Column("subject", Text, nullable=False),
    Column("before", Text),
    Column("after", Text),
    Index("ix_audit_at", "at"),
)

# Facts about the database itself, such as that it holds sample data.
marks = Table(
    "marks",
    metadata,
    Column("name", Text, primary_key=True),
    Column("value", Text, nullable=False),
)

# Who is signed in to the pages.
sessions = Table(
    "sessions",
    metadata,
    # Of the random token in the visitor's cookie, made with the admin token: with another one it is no longer found.
    Column("digest", LargeBinary(32), primary_key=True),
    Column("role", Text, nullable=False),
    # The key that was signed in with, or what an identity provider calls this person; neither for the admin token.
    Column("key_id", ForeignKey("keys.id")),
    Column("account", Text),
    Column("created_at", Instant, nullable=False),
    Column("seen_at", Instant, nullable=False),
    Column("expires_at", Instant, nullable=False),
    CheckConstraint("length(digest) = 32", name="digest_length"),
    CheckConstraint(_among("role", "admin", "viewer", "member"), name="role"),
    CheckConstraint("key_id IS NULL OR (role = 'member' AND account IS NULL)", name="key_is_a_member"),
    CheckConstraint("key_id IS NOT NULL OR account IS NOT NULL OR role = 'admin'", name="token_is_an_admin"),
)

# The teams of a member who signed in without a key.
session_teams = Table(
    "session_teams",
    metadata,
    Column("digest", ForeignKey("sessions.digest", ondelete="CASCADE"), primary_key=True),
    Column("team_id", ForeignKey("teams.id"), primary_key=True),
)
