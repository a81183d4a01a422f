"""What the admin API takes: queries and bodies. They check what arrives, and the API's description is made from them."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, ConfigDict, Field

from proxy.inputs import NAME_CHARACTERS_MAX, Body, Cursor, Duration, Lifetime, Name, Query, Whole
from proxy.ledger.accounts import LIMIT_MAX
from proxy.ledger.reports import GROUPS

# Rows in one answer: a thousand charges are half a megabyte.
ROWS_MAX = 1_000
ROWS = 100

# What 'beanmeter' takes: less than a trillion dollars.
MICRO_USD_MAX = 10**18 - 1

REASON_CHARACTERS_MAX = 500

# Some five hundred teams; a larger declaration is for the command line, which reads files.
TOML_CHARACTERS_MAX = 30_000

Order = Literal["oldest", "newest"]
State = Literal["reserved", "forwarded", "settled", "released", "review"]
When = Annotated[str, Field(max_length=NAME_CHARACTERS_MAX, examples=["2026-11-22", "7d"])]
MicroUsd = Annotated[int, Field(ge=0, le=MICRO_USD_MAX)]

_WHEN = "a day (2026-11-22), a time with its offset (2026-11-22T15:00:00Z) or how long ago (7d)"
_COLUMNS = ",".join(GROUPS)


def _groups(text: str) -> str:
    if not set(text.split(",")) <= set(GROUPS):
        raise ValueError("other columns")
    return text


class Nothing(Query):
    """No parameters."""


class PageQuery(Query):
    """Which page of a listing."""

    limit: Whole = Field(ROWS, ge=1, le=ROWS_MAX, description=f"a whole number of rows from 1 to {ROWS_MAX}")
    cursor: Cursor | None = Field(None, description="the 'next_cursor' of the page before")


class TeamPageQuery(PageQuery):
    """A listing of one team or of all."""

    team: Name | None = Field(None, description="the name of a team")


class SpanPageQuery(PageQuery):
    """A listing in the order of time."""

    since: When | None = Field(None, description=f"from then on: {_WHEN}")
    until: When | None = Field(None, description=f"up to then, a day whole: {_WHEN}")
    order: Order = Field("oldest", description="'oldest' or 'newest' first")


class ChargesQuery(SpanPageQuery):
    """Which charges."""

    team: Name | None = Field(None, description="the name of a team")
    key_id: Name | None = Field(None, description="the id of a key")
    state: State | None = Field(None, description=", ".join(get_args(State)[:-1]) + " or review")


class SpendQuery(PageQuery):
    """What to sum up, and how."""

    by: Annotated[str, Field(pattern="^[a-z,]{1,100}$"), AfterValidator(_groups)] = Field(
        "team", description=f"one or more of {_COLUMNS}, with commas", examples=["team,day"]
    )
    since: When | None = Field(None, description=f"from then on: {_WHEN}")
    until: When | None = Field(None, description=f"up to then, a day whole: {_WHEN}")


class NewTeam(Body):
    """A team to make."""

    name: Name = Field(
        description="up to 64 letters, digits, spaces and . _ @ + & -, a letter or digit first", examples=["design"]
    )


class KeyToMake(Body):
    """A key to make."""

    name: Annotated[str, Field(max_length=NAME_CHARACTERS_MAX)] = Field(
        "", description="at most 64 printable characters: what the key is for", examples=["website"]
    )
    expires: Lifetime | None = Field(None, description="how long it works, such as 90d, or null for ever")


class Rotation(Body):
    """How a key is replaced."""

    overlap: Duration = Field("24h", description="how long the old key goes on working, such as 24h")


class BudgetTerms(Body):
    """What may be spent in a period."""

    limit_micro_usd: MicroUsd = Field(description="millionths of a US dollar, as a whole number", examples=[60_000_000])
    soft: bool = Field(False, description="true for a budget that counts and never refuses")


class LimitTerms(Body):
    """How fast, and how much at once; at least one of the two."""

    model_config = ConfigDict(
        json_schema_extra={
            "anyOf": [{"properties": {name: {"type": "integer"}}, "required": [name]} for name in ("rpm", "concurrency")]
        }
    )

    rpm: Annotated[int, Field(ge=0, le=LIMIT_MAX)] | None = Field(
        None, description=f"requests in any 60 seconds, from 0 to {LIMIT_MAX}, or null", examples=[60]
    )
    concurrency: Annotated[int, Field(ge=0, le=LIMIT_MAX)] | None = Field(
        None, description=f"requests at a time, from 0 to {LIMIT_MAX}, or null", examples=[8]
    )


class Settlement(Body):
    """What a charge in review cost in all."""

    settled_micro_usd: MicroUsd = Field(description="millionths of a US dollar, as a whole number", examples=[210_700])


class Release(Body):
    """Why a charge in review cost nothing."""

    reason: Annotated[str, Field(min_length=1, max_length=REASON_CHARACTERS_MAX, pattern=r"\S")] = Field(
        description=f"1 to {REASON_CHARACTERS_MAX} characters: why it cost nothing"
    )


class Declaration(Body):
    """Teams, budgets and limits as they should be, in the words of 'beanmeter apply'."""

    toml: Annotated[str, Field(max_length=TOML_CHARACTERS_MAX)] = Field(
        description=f"TOML of at most {TOML_CHARACTERS_MAX} characters, as in a file for 'beanmeter apply'",
        examples=["[teams.design.budgets]\nmonth = 60"],
    )
    dry_run: bool = Field(False, description="true to see what would change, and change nothing")
    prune: bool = Field(False, description="true to remove budgets and limits that are not declared, and archive such teams")
