"""The first schema: teams, keys, budgets and their balances, charges, daily sums, limits, audit rows, marks, sessions."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "audit",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("action", sa.Text(), nullable=False),
        sa.Column("subject", sa.Text(), nullable=False),
        sa.Column("before", sa.Text(), nullable=True),
        sa.Column("after", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_audit")),
    )
    op.create_index("ix_audit_at", "audit", ["at"], unique=False)
    op.create_table(
        "marks",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("value", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_marks")),
    )
    op.create_table(
        "teams",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("archived_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("length(name) BETWEEN 1 AND 64", name=op.f("ck_teams_name_length")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_teams")),
        sa.UniqueConstraint("name", name=op.f("uq_teams_name")),
    )
    op.create_table(
        "keys",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("team_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("digest", sa.LargeBinary(length=32), nullable=False),
        sa.Column("last_four", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("revoked_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("successor_id", sa.Text(), nullable=True),
        sa.CheckConstraint("length(digest) = 32", name=op.f("ck_keys_digest_length")),
        sa.CheckConstraint("length(last_four) = 4", name=op.f("ck_keys_last_four_length")),
        sa.ForeignKeyConstraint(["successor_id"], ["keys.id"], name=op.f("fk_keys_successor_id")),
        sa.ForeignKeyConstraint(["team_id"], ["teams.id"], name=op.f("fk_keys_team_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_keys")),
        sa.UniqueConstraint("digest", name=op.f("uq_keys_digest")),
    )
    op.create_index(op.f("ix_keys_team_id"), "keys", ["team_id"], unique=False)
    op.create_table(
        "budgets",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("team_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("key_id", sa.Text(), nullable=True),
        sa.Column("period", sa.Text(), nullable=False),
        sa.Column("limit_micro_usd", sa.BigInteger(), nullable=False),
        sa.Column("soft", sa.Boolean(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint(
            "(period = 'day' OR period = 'week' OR period = 'month' OR period = 'total')", name=op.f("ck_budgets_period")
        ),
        sa.CheckConstraint("limit_micro_usd >= 0", name=op.f("ck_budgets_limit_not_negative")),
        sa.ForeignKeyConstraint(["key_id"], ["keys.id"], name=op.f("fk_budgets_key_id")),
        sa.ForeignKeyConstraint(["team_id"], ["teams.id"], name=op.f("fk_budgets_team_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_budgets")),
    )
    op.create_index(
        "uq_budgets_key",
        "budgets",
        ["team_id", "key_id", "period"],
        unique=True,
        postgresql_where=sa.text("key_id IS NOT NULL"),
        sqlite_where=sa.text("key_id IS NOT NULL"),
    )
    op.create_index(
        "uq_budgets_team",
        "budgets",
        ["team_id", "period"],
        unique=True,
        postgresql_where=sa.text("key_id IS NULL"),
        sqlite_where=sa.text("key_id IS NULL"),
    )
    op.create_table(
        "charges",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("request_id", sa.Text(), nullable=False),
        sa.Column("team_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("key_id", sa.Text(), nullable=False),
        sa.Column("operation", sa.Text(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("size", sa.Text(), nullable=False),
        sa.Column("quality", sa.Text(), nullable=False),
        sa.Column("asked_size", sa.Text(), nullable=False),
        sa.Column("asked_quality", sa.Text(), nullable=False),
        sa.Column("stream", sa.Boolean(), nullable=False),
        sa.Column("images_requested", sa.Integer(), nullable=False),
        sa.Column("images_delivered", sa.Integer(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("hold_micro_usd", sa.BigInteger(), nullable=False),
        sa.Column("reserved_micro_usd", sa.BigInteger(), nullable=False),
        sa.Column("settled_micro_usd", sa.BigInteger(), nullable=False),
        sa.Column("basis", sa.Text(), nullable=True),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("upstream_status", sa.Integer(), nullable=True),
        sa.Column("upstream_cost_micro_usd", sa.BigInteger(), nullable=True),
        sa.Column("upstream_request_id", sa.Text(), nullable=True),
        sa.Column("input_tokens", sa.BigInteger(), nullable=True),
        sa.Column("output_tokens", sa.BigInteger(), nullable=True),
        sa.Column("price_card", sa.Text(), nullable=False),
        sa.Column("idempotency_digest", sa.LargeBinary(length=32), nullable=True),
        sa.Column("body_digest", sa.LargeBinary(length=32), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("deadline_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint(
            "(basis = 'requested' OR basis = 'reported' OR basis = 'measured' OR basis = 'assumed' OR basis = 'operator' OR basis = 'expired')",
            name=op.f("ck_charges_basis"),
        ),
        sa.CheckConstraint("(operation = 'generation' OR operation = 'edit')", name=op.f("ck_charges_operation")),
        sa.CheckConstraint("state <> 'released' OR settled_micro_usd = 0", name=op.f("ck_charges_released_costs_nothing")),
        sa.CheckConstraint("state <> 'settled' OR basis IS NOT NULL", name=op.f("ck_charges_settled_has_basis")),
        sa.CheckConstraint(
            "state IN ('reserved', 'forwarded') OR finished_at IS NOT NULL", name=op.f("ck_charges_ended_has_time")
        ),
        sa.CheckConstraint(
            "(state = 'reserved' OR state = 'forwarded' OR state = 'settled' OR state = 'released' OR state = 'review')",
            name=op.f("ck_charges_state"),
        ),
        sa.CheckConstraint(
            "state NOT IN ('reserved', 'forwarded') OR (reserved_micro_usd = hold_micro_usd AND settled_micro_usd = 0 AND finished_at IS NULL)",
            name=op.f("ck_charges_open_holds_all"),
        ),
        sa.CheckConstraint(
            "state NOT IN ('settled', 'released') OR reserved_micro_usd = 0", name=op.f("ck_charges_ended_holds_nothing")
        ),
        sa.CheckConstraint("hold_micro_usd > 0", name=op.f("ck_charges_hold_positive")),
        sa.CheckConstraint("images_delivered >= 0", name=op.f("ck_charges_images_delivered")),
        sa.CheckConstraint("images_requested BETWEEN 1 AND 10", name=op.f("ck_charges_images_requested")),
        sa.CheckConstraint("reserved_micro_usd BETWEEN 0 AND hold_micro_usd", name=op.f("ck_charges_reserved_within_hold")),
        sa.CheckConstraint("settled_micro_usd >= 0", name=op.f("ck_charges_settled_not_negative")),
        sa.ForeignKeyConstraint(["key_id"], ["keys.id"], name=op.f("fk_charges_key_id")),
        sa.ForeignKeyConstraint(["team_id"], ["teams.id"], name=op.f("fk_charges_team_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_charges")),
        sa.UniqueConstraint("request_id", name=op.f("uq_charges_request_id")),
    )
    op.create_index("ix_charges_created_at", "charges", ["created_at"], unique=False)
    op.create_index("ix_charges_key_id_created_at", "charges", ["key_id", "created_at"], unique=False)
    op.create_index(
        "ix_charges_open",
        "charges",
        ["state", "deadline_at"],
        unique=False,
        postgresql_where=sa.text("(state = 'reserved' OR state = 'forwarded' OR state = 'review')"),
        sqlite_where=sa.text("(state = 'reserved' OR state = 'forwarded' OR state = 'review')"),
    )
    op.create_index(
        "ix_charges_released",
        "charges",
        ["state", "team_id", "created_at"],
        unique=False,
        postgresql_where=sa.text("(state = 'released')"),
        sqlite_where=sa.text("(state = 'released')"),
    )
    op.create_index("ix_charges_team_id_created_at", "charges", ["team_id", "created_at"], unique=False)
    op.create_index(
        "uq_charges_idempotency",
        "charges",
        ["team_id", "idempotency_digest"],
        unique=True,
        postgresql_where=sa.text("idempotency_digest IS NOT NULL AND state <> 'released'"),
        sqlite_where=sa.text("idempotency_digest IS NOT NULL AND state <> 'released'"),
    )
    op.create_table(
        "limits",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("team_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("key_id", sa.Text(), nullable=True),
        sa.Column("rpm", sa.Integer(), nullable=True),
        sa.Column("concurrency", sa.Integer(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint("rpm >= 0 AND concurrency >= 0", name=op.f("ck_limits_not_negative")),
        sa.CheckConstraint("rpm IS NOT NULL OR concurrency IS NOT NULL", name=op.f("ck_limits_limits_something")),
        sa.ForeignKeyConstraint(["key_id"], ["keys.id"], name=op.f("fk_limits_key_id")),
        sa.ForeignKeyConstraint(["team_id"], ["teams.id"], name=op.f("fk_limits_team_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_limits")),
    )
    op.create_index(
        "uq_limits_key",
        "limits",
        ["team_id", "key_id"],
        unique=True,
        postgresql_where=sa.text("key_id IS NOT NULL"),
        sqlite_where=sa.text("key_id IS NOT NULL"),
    )
    op.create_index(
        "uq_limits_team",
        "limits",
        ["team_id"],
        unique=True,
        postgresql_where=sa.text("key_id IS NULL"),
        sqlite_where=sa.text("key_id IS NULL"),
    )
    op.create_table(
        "rollups",
        sa.Column("day", sa.Date(), nullable=False),
        sa.Column("team_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("key_id", sa.Text(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("operation", sa.Text(), nullable=False),
        sa.Column("size", sa.Text(), nullable=False),
        sa.Column("quality", sa.Text(), nullable=False),
        sa.Column("requests", sa.BigInteger(), nullable=False),
        sa.Column("images", sa.BigInteger(), nullable=False),
        sa.Column("settled_micro_usd", sa.BigInteger(), nullable=False),
        sa.Column("reserved_micro_usd", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("requests >= 0 AND images >= 0", name=op.f("ck_rollups_counts_not_negative")),
        sa.CheckConstraint("settled_micro_usd >= 0 AND reserved_micro_usd >= 0", name=op.f("ck_rollups_amounts_not_negative")),
        sa.ForeignKeyConstraint(["key_id"], ["keys.id"], name=op.f("fk_rollups_key_id")),
        sa.ForeignKeyConstraint(["team_id"], ["teams.id"], name=op.f("fk_rollups_team_id")),
        sa.PrimaryKeyConstraint("day", "team_id", "key_id", "model", "operation", "size", "quality", name=op.f("pk_rollups")),
    )
    op.create_table(
        "team_days",
        sa.Column("day", sa.Date(), nullable=False),
        sa.Column("team_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("requests", sa.BigInteger(), nullable=False),
        sa.Column("images", sa.BigInteger(), nullable=False),
        sa.Column("settled_micro_usd", sa.BigInteger(), nullable=False),
        sa.Column("reserved_micro_usd", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("requests >= 0 AND images >= 0", name=op.f("ck_team_days_counts_not_negative")),
        sa.CheckConstraint(
            "settled_micro_usd >= 0 AND reserved_micro_usd >= 0", name=op.f("ck_team_days_amounts_not_negative")
        ),
        sa.ForeignKeyConstraint(["team_id"], ["teams.id"], name=op.f("fk_team_days_team_id")),
        sa.PrimaryKeyConstraint("day", "team_id", name=op.f("pk_team_days")),
    )
    op.create_table(
        "refusals",
        sa.Column("day", sa.Date(), nullable=False),
        sa.Column("team", sa.Text(), nullable=False),
        sa.Column("code", sa.Text(), nullable=False),
        sa.Column("times", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("times > 0", name=op.f("ck_refusals_times_positive")),
        sa.PrimaryKeyConstraint("day", "team", "code", name=op.f("pk_refusals")),
    )
    op.create_table(
        "balances",
        sa.Column("budget_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("period_start", sa.Date(), nullable=False),
        sa.Column("settled_micro_usd", sa.BigInteger(), nullable=False),
        sa.Column("held_micro_usd", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("held_micro_usd >= 0", name=op.f("ck_balances_held_not_negative")),
        sa.CheckConstraint("settled_micro_usd >= 0", name=op.f("ck_balances_settled_not_negative")),
        sa.ForeignKeyConstraint(["budget_id"], ["budgets.id"], name=op.f("fk_balances_budget_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("budget_id", "period_start", name=op.f("pk_balances")),
    )
    op.create_table(
        "sessions",
        sa.Column("digest", sa.LargeBinary(length=32), nullable=False),
        sa.Column("role", sa.Text(), nullable=False),
        sa.Column("key_id", sa.Text(), nullable=True),
        sa.Column("account", sa.Text(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("seen_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint("length(digest) = 32", name=op.f("ck_sessions_digest_length")),
        sa.CheckConstraint("(role = 'admin' OR role = 'viewer' OR role = 'member')", name=op.f("ck_sessions_role")),
        sa.CheckConstraint("key_id IS NULL OR (role = 'member' AND account IS NULL)", name=op.f("ck_sessions_key_is_a_member")),
        sa.CheckConstraint(
            "key_id IS NOT NULL OR account IS NOT NULL OR role = 'admin'", name=op.f("ck_sessions_token_is_an_admin")
        ),
        sa.ForeignKeyConstraint(["key_id"], ["keys.id"], name=op.f("fk_sessions_key_id")),
        sa.PrimaryKeyConstraint("digest", name=op.f("pk_sessions")),
    )
    op.create_table(
        "session_teams",
        sa.Column("digest", sa.LargeBinary(length=32), nullable=False),
        sa.Column("team_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.ForeignKeyConstraint(["digest"], ["sessions.digest"], name=op.f("fk_session_teams_digest"), ondelete="CASCADE"),
        sa.ForeignKeyConstraint(["team_id"], ["teams.id"], name=op.f("fk_session_teams_team_id")),
        sa.PrimaryKeyConstraint("digest", "team_id", name=op.f("pk_session_teams")),
    )
