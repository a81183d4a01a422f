"""The shapes of answers, for the API's description. Loaded only to describe: what is sent comes from the ledger as it is, and
tests hold the two together."""

from __future__ import annotations

from datetime import date
from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from proxy.periods import Period
from proxy.prices import Basis, Operation

Instant = AwareDatetime
MicroUsd = Annotated[int, Field(description="millionths of a US dollar")]
State = Literal["reserved", "forwarded", "settled", "released", "review"]
Source = Literal["image.generation", "image.edit"]


def _unless_absent() -> Any:
    """A field that is only there where it has something to say."""
    return Field(default=None, json_schema_extra=_without_default)


def _without_default(schema: dict[str, Any]) -> None:
    del schema["default"]


class Shape(BaseModel):
    """Fields that are always there, and no others."""

    model_config = ConfigDict(extra="forbid")


class _Page(Shape):
    has_more: bool
    next_cursor: str | None = Field(description="the 'cursor' of the next page, null on the last")


# Of the admin API


class Team(Shape):
    """A team."""

    name: str
    created_at: Instant
    archived_at: Instant | None


class Key(Shape):
    """A key, without its secret."""

    id: str
    team: str
    name: str
    last_four: str
    created_at: Instant
    expires_at: Instant | None
    revoked_at: Instant | None


class NewKey(Shape):
    """A key just made. ``key`` is the secret, and shown this once."""

    id: str
    team: str
    name: str
    key: str
    expires_at: Instant | None


class OwnBudget(Shape):
    """A budget in its current period."""

    scope: Literal["team", "key"]
    period: Period
    soft: bool
    limit_micro_usd: MicroUsd
    settled_micro_usd: MicroUsd
    held_micro_usd: MicroUsd
    remaining_micro_usd: MicroUsd
    resets_at: Instant | None


class Budget(OwnBudget):
    """A budget in its current period, of a team or of a key."""

    team: str
    key_id: str | None


class Limit(Shape):
    """Requests in any 60 seconds, and at a time; null is any number."""

    team: str
    key_id: str | None
    rpm: int | None
    concurrency: int | None


class TeamWithAll(Team):
    """A team with its keys and budgets."""

    keys: list[Key]
    budgets: list[Budget]


class Charge(Shape):
    """A request that was sent, and what became of its hold."""

    id: str
    request_id: str
    team: str
    key_id: str
    operation: Operation
    model: str
    size: str
    quality: str
    asked_size: str
    asked_quality: str
    stream: bool
    images_requested: int
    images_delivered: int
    state: State
    hold_micro_usd: MicroUsd
    reserved_micro_usd: MicroUsd
    settled_micro_usd: MicroUsd
    basis: Basis | None
    reason: str | None
    upstream_status: int | None
    upstream_cost_micro_usd: MicroUsd | None
    upstream_request_id: str | None
    input_tokens: int | None
    output_tokens: int | None
    price_card: str
    created_at: Instant
    finished_at: Instant | None


class Decided(Shape):
    """A charge that was in review, as it is now."""

    id: str
    state: State
    basis: Basis | None
    images_delivered: int
    settled_micro_usd: MicroUsd
    reserved_micro_usd: MicroUsd
    finished_at: Instant | None


class Sum(Shape):
    """What the charges of a group come to. The columns that were asked for are there, and no others."""

    team: str = _unless_absent()
    key: str = _unless_absent()
    model: str = _unless_absent()
    operation: Operation = _unless_absent()
    size: str = _unless_absent()
    quality: str = _unless_absent()
    day: date = _unless_absent()
    week: date = _unless_absent()
    month: date = _unless_absent()
    requests: int
    images: int
    settled_micro_usd: MicroUsd
    reserved_micro_usd: MicroUsd


class AuditRow(Shape):
    """A change: who made it, and what was there before and after, as JSON in a string."""

    at: Instant
    actor: str
    action: str
    subject: str
    before: str | None
    after: str | None


class Teams(_Page):
    """A page of teams."""

    data: list[Team]


class Keys(_Page):
    """A page of keys."""

    data: list[Key]


class Budgets(_Page):
    """A page of budgets."""

    data: list[Budget]


class Limits(_Page):
    """A page of limits."""

    data: list[Limit]


class Charges(_Page):
    """A page of charges."""

    data: list[Charge]


class DeclaredTerms(Shape):
    """A budget or a limit, before or after a change."""

    limit_micro_usd: MicroUsd = _unless_absent()
    soft: bool = _unless_absent()
    rpm: int | None = _unless_absent()
    concurrency: int | None = _unless_absent()


class Step(Shape):
    """One change. ``before`` and ``after`` are null where there is nothing, as for teams."""

    action: Literal["team.add", "team.archive", "budget.set", "budget.remove", "limit.set", "limit.remove"]
    team: str
    key_id: str | None
    period: Period | None
    before: DeclaredTerms | None
    after: DeclaredTerms | None


class Applied(Shape):
    """What was changed, or would be."""

    dry_run: bool
    changes: list[Step]


class Spend(_Page):
    """A page of sums."""

    data: list[Sum]


class Audit(_Page):
    """A page of changes."""

    data: list[AuditRow]


class Problem(Shape):
    """Why something was not done, as in RFC 9457. ``field`` names the part of the request at fault."""

    type: Literal["about:blank"]
    title: str
    status: int
    detail: str
    field: str = _unless_absent()


# Of what clients and tools read under /v1


class Price(Shape):
    """What an image costs."""

    model: str
    size: str
    quality: str
    price_micro_usd: MicroUsd
    price_usd: str = Field(description="the same in US dollars, with six decimals")
    megapixels: float


class Prices(Shape):
    """A price card. An alias is a size outside of the table, which its preset replaces."""

    object: Literal["list"]
    version: str
    currency: Literal["usd"]
    data: list[Price]
    size_aliases: dict[str, str]


class OwnBudgets(Shape):
    """The budgets that apply to the caller's key."""

    team: str
    key_id: str
    budgets: list[OwnBudget]


class Model(Shape):
    """A model that has prices."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class Models(Shape):
    """The models that have prices."""

    object: Literal["list"]
    data: list[Model]


class _Grouped(Shape):
    project_id: str | None = Field(description="the name of a team, where it was grouped by")
    user_id: None = Field(description="the books know no users")
    api_key_id: str | None
    model: str | None
    size: str | None
    source: Source | None
    quality: str | None


class ImagesResult(_Grouped):
    """Images of one group in one day."""

    object: Literal["organization.usage.images.result"]
    images: int
    num_model_requests: int


class Amount(Shape):
    """A cost. ``micro_usd`` is exact."""

    value: float
    currency: Literal["usd"]
    micro_usd: MicroUsd


class CostsResult(_Grouped):
    """What one group cost in one day. A line item is a model, and its quantity is in images."""

    object: Literal["organization.costs.result"]
    amount: Amount
    line_item: str | None
    quantity: int | None
    quantity_unit: Literal["images"] | None


class _Bucket(Shape):
    object: Literal["bucket"]
    start_time: int
    end_time: int


class ImagesBucket(_Bucket):
    """A UTC day of images."""

    results: list[ImagesResult]


class CostsBucket(_Bucket):
    """A UTC day of costs."""

    results: list[CostsResult]


class _DaysPage(Shape):
    object: Literal["page"]
    has_more: bool
    next_page: str | None


class ImagesPage(_DaysPage):
    """Images by day."""

    data: list[ImagesBucket]


class CostsPage(_DaysPage):
    """Costs by day."""

    data: list[CostsBucket]


class RefusalError(Shape):
    """Why a request was refused."""

    message: str
    type: str
    param: str | None
    code: str | None


class Refusal(Shape):
    """A refusal in OpenAI's envelope."""

    error: RefusalError
