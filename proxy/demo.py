"""The demo: a simulated BeansAI and the gateway in one process, on books with two teams and six weeks of sample history.

Sample data is made only here, and through the same books as real traffic, so that every sum adds up.
"""

from __future__ import annotations

import asyncio
import json
import random
import secrets
import shlex
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, time, timedelta
from pathlib import Path

from pydantic import SecretStr
from sqlalchemy import Connection

from proxy import app, pages, periods
from proxy.ledger.accounts import NewKey, add_key, add_team, holder_of, list_keys, list_teams, revoke_key, set_budget
from proxy.ledger.books import post
from proxy.ledger.decisions import Admitted, Booking, Reservation
from proxy.ledger.engine import Database
from proxy.ledger.marks import mark, set_mark
from proxy.ledger.migrate import migrate
from proxy.ledger.reports import list_budgets, spend
from proxy.money import format_usd, parse_usd
from proxy.outcomes import answered
from proxy.prices import DeliveredImage, Operation, Order, PriceCard, shipped_card
from proxy.settings import Settings
from proxy.simulator import SimulatorOptions, running_simulator
from proxy.taps import Delivery
from proxy.tokens import digest, new_id

MARK = "demo"
ACTOR = "demo"

# The key that is made at each start and printed; those of the history belong to nobody.
KEY_NAME = "demo"

UPSTREAM_KEY = "sk-beans-demo"

# For a token that is made at each start: nobody types it, and nobody guesses it.
TOKEN_BYTES = 15

# An image takes long enough to be seen coming, and not so long that a visitor wonders.
IMAGE_SECONDS = 0.5

# Nobody waits for the demo's pictures.
DRAIN_SECONDS = 5

HISTORY = timedelta(weeks=6)

# The history ends a little before now, with nothing left open.
LAST_BEFORE = timedelta(minutes=10)

TIMEOUT_SECONDS = 600.0


class BooksInUse(Exception):
    """The database is somebody's; the message tells what to do instead."""


@dataclass(frozen=True, slots=True)
class Habits:
    """How a sample team works: what its keys are for, how often somebody sits down to make images on a working day, and
    which images."""

    team: str
    keys: tuple[str, ...]
    sittings: int
    sizes: tuple[str, ...]
    qualities: tuple[str, ...]
    edits: float


DESIGN = Habits(
    team="design",
    keys=("website", "campaign"),
    sittings=2,
    sizes=("1024x1024", "2048x1152", "2048x1152", "3840x2160", "auto"),
    qualities=("low", "medium", "medium", "high", "auto"),
    edits=0.3,
)
MARKETING = Habits(
    team="marketing",
    keys=("newsletter", "social"),
    sittings=2,
    sizes=("1024x1024", "1024x1024", "2048x1152"),
    qualities=("low", "medium", "high"),
    edits=0.1,
)

# Above what the sample history of any month comes to.
DESIGN_MONTHLY_USD = "60"

# Room for an image at low or medium quality, and none for one of 1024x1024 at high.
MARKETING_LEFT_USD = "0.15"


def holds_samples(connection: Connection) -> bool:
    """Whether this database was filled by the demo."""
    return mark(connection, MARK) is not None


def run(database: Database, settings: Settings, tell: Callable[[str], None]) -> None:
    """Run the demo until SIGINT or SIGTERM. ``tell`` is given the text that greets a visitor once all is ready.

    Raises :class:`BooksInUse` for a database with teams of somebody's own, and what the gateway's start raises.
    """
    try:
        migrate(database)
        fill(database, datetime.now(UTC))
        asyncio.run(_run(database, settings, tell))
    finally:
        database.close()


async def _run(database: Database, settings: Settings, tell: Callable[[str], None]) -> None:
    told = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, told.set)
    options = SimulatorOptions(key=UPSTREAM_KEY, image_seconds=IMAGE_SECONDS, preview_seconds=IMAGE_SECONDS / 2)
    async with running_simulator(options) as simulator:
        # A token of the visitor's own is known to them, and stays off the screen.
        token = secrets.token_urlsafe(TOKEN_BYTES) if settings.admin_token is None else None
        # The simulator charges by the card that is shipped, and so does the gateway before it.
        changed: dict[str, object] = {
            "admin_token": settings.admin_token if token is None else SecretStr(token),
            "upstream_url": simulator.base_url,
            "upstream_key": SecretStr(UPSTREAM_KEY),
            "prices": None,
            "size_aliases": {},
            "drain_seconds": DRAIN_SECONDS,
        }
        async with app.running(settings.model_copy(update=changed), settings.host, settings.port) as base_url:
            # Only now: a start that finds its port taken must leave the keys of the demo that has it alone.
            greeting = await asyncio.to_thread(_greet, database, base_url, simulator.base_url, token, datetime.now(UTC))
            tell(greeting)
            await told.wait()


# What a visitor reads


def _greet(database: Database, base_url: str, upstream_url: str, token: str | None, now: datetime) -> str:
    with database.writing() as connection:
        keys = {habits.team: _renew_key(connection, habits.team, now) for habits in (DESIGN, MARKETING)}
        left = {status.team: status for status in list_budgets(connection, now) if status.scope == "team"}
    program = _program()
    lines = ["", "Beanmeter, before a simulated BeansAI: real PNG files, real books, no bill.", "", f"  base URL  {base_url}"]
    for team, key in keys.items():
        lines.append(f"  key       {key.key}  ({team})")
        if team in left:
            remaining, limit = format_usd(left[team].remaining_micro_usd), format_usd(left[team].limit_micro_usd)
            lines.append(f"            {team} has {remaining} of {limit} USD left this {left[team].period}")
    lines += [
        f"  dashboard {base_url.removesuffix('/v1')}{pages.PREFIX}",
        f"            sign in with {token or 'your admin token'}, or with a key",
        f"  metrics   {base_url.removesuffix('/v1')}/metrics",
        f"  bill      {upstream_url.removesuffix('/v1')}/simulator/bill",
        "            what the simulated BeansAI has billed since this start",
        "",
        "Make an image, which lands in image.png:",
        "",
        _curl(base_url, keys[DESIGN.team].key),
        "",
        "Then see what it cost:",
        "",
        f"  {program} charges --since 1d",
        f"  {program} spend --by team,day",
        "",
        f"Marketing's budget has no room for a 1024x1024 image at high quality: the key of {MARKETING.team} shows a refusal.",
    ]
    return "\n".join(lines)


def _renew_key(connection: Connection, team: str, now: datetime) -> NewKey:
    """A key to show. Secrets aren't kept, so those of earlier starts can't be shown again, and stop working."""
    for key in list_keys(connection, team):
        if key["name"] == KEY_NAME and key["revoked_at"] is None:
            revoke_key(connection, key["id"], now=now, actor=ACTOR)
    return add_key(connection, team, name=KEY_NAME, now=now, actor=ACTOR)


def _curl(base_url: str, key: str) -> str:
    """One line to paste into any shell. Python unpacks the picture, since ``base64`` takes other options on other systems."""
    body = {"model": "gpt-image-2", "prompt": "a coffee bean on a desk", "size": "1024x1024", "quality": "low"}
    unpack = (
        "import base64, json, sys; answer = json.load(sys.stdin); "
        'sys.exit(answer["error"]["message"]) if "error" in answer else '
        'open("image.png", "wb").write(base64.b64decode(answer["data"][0]["b64_json"]))'
    )
    return (
        f"curl -sS {base_url}/images/generations -H 'Authorization: Bearer {key}' -H 'Content-Type: application/json' "
        f"-d '{json.dumps(body)}' | python3 -c '{unpack}'"
    )


def _program() -> str:
    """How the visitor's shell finds this program: by its name, or in the environment that Python runs from."""
    if shutil.which("beanmeter"):
        return "beanmeter"
    program = Path(sys.executable).with_name("beanmeter")
    return shlex.quote(str(program.relative_to(Path.cwd()) if program.is_relative_to(Path.cwd()) else program))


# The sample books


def fill(database: Database, now: datetime) -> None:
    """Teams, budgets and history, unless they are there: all of it in one transaction, so there is never a part of it.

    Raises :class:`BooksInUse` for a database with teams of somebody's own.
    """
    with database.writing() as connection:
        if holds_samples(connection):
            return
        if list_teams(connection):
            raise BooksInUse(
                "this database has teams of its own, and the demo would mix sample history into their books: "
                "set BEANMETER_DATABASE_URL to another, or run the demo in another directory"
            )
        set_mark(connection, MARK, now.isoformat())
        begin = now - HISTORY
        for habits in (DESIGN, MARKETING):
            add_team(connection, habits.team, now=begin, actor=ACTOR)
        _set_monthly(connection, DESIGN.team, parse_usd(DESIGN_MONTHLY_USD), begin)
        # The same six weeks at every first start on a day: a picture in the manual shows what the reader sees.
        dice = random.Random(11)  # noqa: S311  # it makes samples, not secrets
        for habits in (DESIGN, MARKETING):
            _work(connection, habits, dice, begin, now - LAST_BEFORE)
        month = datetime.combine(periods.start("month", now), time(), UTC)
        spent = {row["team"]: row["settled_micro_usd"] for row in spend(connection, ("team",), since=month)}
        limit = spent.get(MARKETING.team, 0) + parse_usd(MARKETING_LEFT_USD)
        _set_monthly(connection, MARKETING.team, limit, now)


def _set_monthly(connection: Connection, team: str, limit_micro_usd: int, now: datetime) -> None:
    set_budget(connection, team, None, "month", limit_micro_usd, soft=False, now=now, actor=ACTOR)


def _work(connection: Connection, habits: Habits, dice: random.Random, begin: datetime, end: datetime) -> None:
    """A team's requests from ``begin`` to ``end``, each posted at the time at which it is said to have happened."""
    card = shipped_card()
    keys = [add_key(connection, habits.team, name=name, now=begin, actor=ACTOR) for name in habits.keys]
    team_id = _team_id(connection, keys[0])
    day = datetime.combine(begin.date(), time(), UTC)
    while day <= end:
        sittings = habits.sittings if day.weekday() < 5 else dice.randrange(2)
        for minute in sorted(dice.randrange(8 * 60, 19 * 60) for _ in range(sittings)):
            at = day + timedelta(minutes=minute, seconds=dice.randrange(60))
            orders = [_order(habits, dice) for _ in range(dice.randint(1, 5))]
            key = dice.choice(keys)
            if begin <= at <= end:
                _make(connection, card, dice, team_id, key.id, orders, at)
        day += timedelta(days=1)


def _make(
    connection: Connection,
    card: PriceCard,
    dice: random.Random,
    team_id: int,
    key_id: str,
    orders: list[Order],
    at: datetime,
) -> None:
    """Requests that somebody sent at once, and what came of them."""
    at_ms = int(at.timestamp() * 1000)
    reservations = [
        Reservation(
            charge_id=new_id("chg", at_ms),
            request_id=new_id("req", at_ms),
            team_id=team_id,
            key_id=key_id,
            order=order,
            hold_micro_usd=card.hold(order),
            price_card=card.version,
            timeout_seconds=TIMEOUT_SECONDS,
        )
        for order in orders
    ]
    decisions = post(connection, reservations, [], at)
    assert all(isinstance(decision, Admitted) for decision in decisions), "the sample budgets have room for the history"
    bookings = [_booking(card, job, dice) for job in reservations]
    post(connection, [], bookings, at + timedelta(seconds=dice.randint(9, 70)))


def _order(habits: Habits, dice: random.Random) -> Order:
    operation: Operation = "edit" if dice.random() < habits.edits else "generation"
    n = dice.choice((1, 1, 1, 1, 2, 4))
    return Order(operation, "gpt-image-2", dice.choice(habits.sizes), dice.choice(habits.qualities), n, n == 1)


def _booking(card: PriceCard, job: Reservation, dice: random.Random) -> Booking:
    """Most requests are delivered; some prompts are refused, and now and then the service fails or delivers fewer."""
    luck = dice.random()
    status = 400 if luck < 0.04 else 500 if luck < 0.06 else 200
    delivered = job.order.n if status == 200 else 0
    if 0.06 <= luck < 0.09:
        delivered -= 1
    size = "1024x1024" if job.order.size == "auto" else job.order.size
    quality = "medium" if job.order.quality == "auto" else job.order.quality
    images = (DeliveredImage(size=size, quality=quality),) * delivered
    delivery = Delivery(images, complete=True, error=status != 200, understood=True)
    outcome = answered(card, job.order, job.hold_micro_usd, status, delivery)
    return Booking(job.charge_id, job.team_id, outcome, upstream_status=status)


def _team_id(connection: Connection, key: NewKey) -> int:
    holder = holder_of(connection, digest(key.key))
    assert holder is not None
    return holder.team_id
