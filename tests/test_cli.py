"""The command line as a shell sees it: what is on standard output, what is on standard error, and the exit status."""

from __future__ import annotations

import csv
import io
import json
import os
import pwd
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from proxy import tokens
from proxy.cli import main
from proxy.cli.printing import print_csv, print_json_array
from proxy.ledger.accounts import holder_of
from proxy.ledger.decisions import Booking, Reservation
from proxy.ledger.reports import GROUPS
from proxy.ledger.schema import audit, marks
from proxy.outcomes import answered, unanswered
from proxy.prices import DeliveredImage, Order, shipped_card
from proxy.simulator import SimulatorOptions, running_simulator
from proxy.taps import Delivery
from tests.ledger.ledgers import Account, Ledger
from tests.live import Loop

ROOT = Path(__file__).parent.parent
CARD = shipped_card()
HIGH = 210_700


@dataclass(frozen=True)
class Ran:
    """What a command left behind."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output as the one JSON value that it has to be."""
        assert self.status == 0, self.err
        return json.loads(self.out)


Run = Callable[..., Ran]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command in a directory of its own. Settings are given by their name without the prefix."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, **settings: str) -> Ran:
        with monkeypatch.context() as environment:
            for name, value in settings.items():
                environment.setenv(f"BEANMETER_{name.upper()}", value)
            with pytest.raises(SystemExit) as ended:
                main(arguments)
        out, err = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return Ran(ended.value.code, out, err)

    return run


@pytest.fixture
def books(database_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ledger]:
    """A ledger at the newest schema that commands work on, on SQLite and on PostgreSQL."""
    monkeypatch.setenv("BEANMETER_DATABASE_URL", database_url)
    found = Ledger(database_url)
    yield found
    found.close()


def spawn(*arguments: str, cwd: Path, **settings: str) -> subprocess.Popen[str]:
    """The command as a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **{f"BEANMETER_{name.upper()}": v for name, v in settings.items()}}
    return subprocess.Popen(
        [sys.executable, "-m", "proxy.cli", *arguments],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


# The command itself


def test_version_and_help_load_nothing_that_takes_long() -> None:
    slow = {"alembic", "httpx2", "pydantic", "rich", "sqlalchemy", "starlette", "uvicorn"}
    program = f"import sys, proxy.cli; print(*({slow!r} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True).stdout == "\n"


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["team", "-h"], ["budget", "set", "--help"]])
def test_help_is_on_standard_output(run: Run, arguments: list[str]) -> None:
    ran = run(*arguments)
    assert (ran.status, ran.err) == (0, "")
    assert ran.out.startswith(("beanmeter 0.", "Usage: beanmeter "))


@pytest.mark.parametrize(
    ("arguments", "settings", "status", "words"),
    [
        # Wrong usage.
        (["nonsense"], {}, 2, "No such command"),
        (["team", "add"], {}, 2, "Missing argument"),
        (["budget", "set", "red", "5"], {}, 2, "--per"),
        (["budget", "set", "red", "5", "--per", "year"], {}, 2, "--per"),
        (["budget", "set", "red", "5.0000001", "--per", "day"], {}, 2, "at most six decimals"),
        (["budget", "set", "red/", "5", "--per", "day"], {}, 2, "TEAM/KEY_ID"),
        (["key", "add", "red", "--expires", "tomorrow"], {}, 2, "90d"),
        (["key", "add", "red", "--expires", "0d"], {}, 2, "expired already"),
        (["key", "rotate", "key_1", "--overlap", "-1h"], {}, 2, "not a duration"),
        (["spend", "--by", "team,sise"], {}, 2, "did you mean 'size'?"),
        (["spend", "--by", ""], {}, 2, "team,key,"),
        (["spend", "--format", "jsonl"], {}, 2, "--format"),
        (["spend", "--since", "2026-02-30"], {}, 2, "calendar"),
        (["charges", "--state", "lost"], {}, 2, "settled"),
        (["charges", "--until", "soon"], {}, 2, "2026-11-22"),
        (["prices", "-n", "11"], {}, 2, "10"),
        (["serve", "--port", "99999"], {}, 2, "--port = 99999"),
        (["serve", "--workers", "0"], {}, 2, "--workers = 0"),
        # Wrong settings.
        (["team", "list"], {"port": "eighty"}, 3, "BEANMETER_PORT = 'eighty'"),
        (["team", "list"], {"databse_url": "x"}, 3, "BEANMETER_DATABASE_URL"),
        (["team", "list"], {"database_url": "postgresql://u:hunter2@host:port/x"}, 3, "BEANMETER_DATABASE_URL"),
        (["prices"], {"prices": "missing.toml"}, 3, "missing.toml"),
        (["serve"], {}, 3, "beanmeter demo"),
        (["doctor", "--json"], {"port": "eighty"}, 3, "BEANMETER_PORT"),
        # Failed.
        (["team", "show", "red"], {}, 1, "no team named 'red'"),
        (["team", "show", "\udcff"], {}, 1, "UTF-8"),
        (["team", "add", "=1+1"], {}, 1, "can't be a team's name"),
        (["key", "list", "red"], {}, 1, "no team named 'red'"),
        (["charges", "--team", "red"], {}, 1, "no team named 'red'"),
        (["budget", "list", "red"], {}, 1, "no team named 'red'"),
        (["key", "revoke", "key_1"], {}, 1, "no key 'key_1'"),
        (["prices", "--size", "1000x1000"], {}, 1, "nearest preset is 1024x1024"),
        (["prices", "--size", "big"], {}, 1, "write WxH"),
        (["prices", "--quality", "hd"], {}, 1, "low, medium, high"),
        (["team", "list"], {"database_url": "sqlite:////no/such/directory/x.db"}, 1, "database"),
        (["team", "list"], {"database_url": "postgresql://u:hunter2@127.0.0.1:1/x"}, 1, "database"),
    ],
)
def test_what_goes_wrong_is_told_on_standard_error(
    run: Run, arguments: list[str], settings: dict[str, str], status: int, words: str
) -> None:
    ran = run(*arguments, **settings)
    assert ran.status == status
    assert words in ran.err
    assert "hunter2" not in ran.err
    if status != 2:
        assert len(ran.err.splitlines()) == 1
    if "--json" not in arguments:
        assert ran.out == ""


def test_a_process_of_its_own_says_the_same(tmp_path: Path) -> None:
    process = spawn("team", "list", "--json", cwd=tmp_path, port="eighty")
    out, err = process.communicate()
    assert (process.returncode, out) == (3, "")
    assert err.startswith("beanmeter: BEANMETER_PORT = 'eighty'")


def test_a_reader_that_leaves_early_gets_no_traceback(tmp_path: Path) -> None:
    process = spawn("prices", "--json", cwd=tmp_path)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == ""
    assert process.wait() in (0, 1)
    process.stderr.close()


# Teams, keys, budgets


def test_an_account_from_its_first_day_to_its_last(run: Run, books: Ledger) -> None:
    team = run("team", "add", "red", "--json").json
    assert team.keys() == {"name", "created_at", "archived_at"}
    assert team["name"] == "red"
    assert datetime.fromisoformat(team["created_at"]).utcoffset() == timedelta(0)
    assert team["created_at"].endswith("Z")

    key = run("key", "add", "red", "--name", "site", "--expires", "90d", "--json").json
    assert key.keys() == {"id", "team", "name", "key", "expires_at"}
    assert (key["team"], key["name"]) == ("red", "site")
    with books.database.reading() as connection:
        holder = holder_of(connection, tokens.digest(key["key"]))
    assert holder is not None
    assert holder.key_id == key["id"]
    assert holder.expires_at is not None
    assert timedelta(days=89) < holder.expires_at - datetime.now(UTC) <= timedelta(days=90)

    row = run("budget", "set", "red", "25.5", "--per", "month", "--json").json
    assert row | {"resets_at": None} == {
        "team": "red",
        "key_id": None,
        "scope": "team",
        "period": "month",
        "soft": False,
        "limit_micro_usd": 25_500_000,
        "settled_micro_usd": 0,
        "held_micro_usd": 0,
        "remaining_micro_usd": 25_500_000,
        "resets_at": None,
    }
    assert row["resets_at"].endswith("-01T00:00:00Z")
    own = run("budget", "set", f"red/{key['id']}", "1", "--per", "total", "--soft", "--json").json
    assert (own["scope"], own["key_id"], own["soft"], own["resets_at"]) == ("key", key["id"], True, None)
    assert run("budget", "list", "--json").json == [row, own]
    assert run("budget", "list", "red", "--json").json == [row, own]
    assert run("budget", "set", "red", "30", "--per", "month", "--json").json["limit_micro_usd"] == 30_000_000

    shown = run("team", "show", "red", "--json").json
    assert [found["id"] for found in shown["keys"]] == [key["id"]]
    assert len(shown["budgets"]) == 2

    assert run("budget", "remove", "red", "--per", "month", "--json").json["limit_micro_usd"] == 30_000_000
    assert run("budget", "remove", "red", "--per", "month").status == 1
    assert run("budget", "list", "--json").json == [own]

    new = run("key", "rotate", key["id"], "--overlap", "1h", "--json").json
    assert new.keys() == key.keys()
    assert new["key"] != key["key"]
    listed = {found["id"]: found for found in run("key", "list", "red", "--json").json}
    assert listed[key["id"]]["expires_at"] < key["expires_at"]
    assert listed[new["id"]]["last_four"] == new["key"][-4:]
    assert all(secret["key"] not in json.dumps(listed) for secret in (key, new))

    assert run("key", "revoke", new["id"], "--json").json["revoked_at"] is not None
    assert run("team", "archive", "red", "--json").json["archived_at"] is not None
    assert run("key", "add", "red").status == 1
    assert [found["name"] for found in run("team", "list", "--json").json] == ["red"]

    with books.database.reading() as connection:
        rows = connection.execute(select(audit.c.actor, audit.c.action).order_by(audit.c.id)).all()
    assert {row.actor for row in rows} == {f"cli:{pwd.getpwuid(os.getuid()).pw_name}"}
    assert [row.action for row in rows] == [
        "team.add",
        "key.add",
        *["budget.set"] * 3,
        "budget.remove",
        "key.add",
        "budget.set",
        "key.rotate",
        "key.revoke",
        "team.archive",
    ]


def test_for_people_the_key_stands_alone_on_standard_output(run: Run) -> None:
    run("team", "add", "red")
    ran = run("key", "add", "red")
    assert tokens.is_well_formed(ran.out.removesuffix("\n"))
    assert "not shown again" in ran.err
    assert ran.out.strip() not in ran.err


def test_names_are_text_and_not_markup(run: Run) -> None:
    run("team", "add", "red")
    run("key", "add", "red", "--name", "[bold]:smile:[/bold] [/]")
    assert "[bold]:smile:[/bold] [/]" in run("key", "list").out


def test_every_change_speaks_on_standard_error_only(run: Run) -> None:
    for arguments in (["team", "add", "red"], ["budget", "set", "red", "5", "--per", "day"], ["team", "archive", "red"]):
        ran = run(*arguments)
        assert (ran.status, ran.out) == (0, "")
        assert "red" in ran.err


# The schema


def test_a_missing_sqlite_file_is_made(run: Run, tmp_path: Path) -> None:
    assert run("charges", "--json").json == []
    assert (tmp_path / "beanmeter.db").exists()
    assert run("migrate", "--json").json["migrated"] is False


@pytest.mark.postgres
def test_postgresql_is_migrated_only_when_asked(run: Run, postgres_database: str) -> None:
    refused = run("team", "list", database_url=postgres_database)
    assert (refused.status, refused.out) == (1, "")
    assert "beanmeter migrate" in refused.err
    assert run("migrate", "--json", database_url=postgres_database).json["migrated"] is True
    assert run("migrate", "--json", database_url=postgres_database).json["migrated"] is False
    assert run("team", "list", "--json", database_url=postgres_database).json == []


# Prices


def test_the_whole_card_is_listed(run: Run) -> None:
    rows = run("prices", "--json").json
    prices = CARD.models["gpt-image-2"].micro_usd
    assert {(row["size"], row["quality"]): row["price_micro_usd"] for row in rows} == prices
    table = run("prices").out
    assert all(size in table for size, _ in prices)
    assert "0.210700" in table


@pytest.mark.parametrize(
    ("arguments", "words", "total"),
    [
        (["--size", "1024x1024", "--quality", "high", "-n", "2"], "2 x 0.210700 = 0.421400 USD", 421_400),
        (["--size", "1024x1024", "--quality", "low", "-n", "1"], "1 x 0.005900 = 0.005900 USD", 5_900),
        # What is left open is held at the dearest that fits.
        (["--size", "1024x1024", "--quality", "auto", "-n", "3"], "3 x 0.210700", 632_100),
        (["--size", "1536x1024", "--quality", "low", "-n", "10"], "2016x1344 low: 10 x", 62_000),
    ],
)
def test_a_quote(run: Run, arguments: list[str], words: str, total: int) -> None:
    settings = {"size_aliases": "1536x1024=2016x1344"}
    assert words in run("prices", *arguments, **settings).out
    assert [row["total_micro_usd"] for row in run("prices", *arguments, "--json", **settings).json] == [total]


def test_the_card_of_the_settings_is_quoted(run: Run, tmp_path: Path) -> None:
    (tmp_path / "card.toml").write_text(
        'version = "ours"\n[models.one]\nqualities = ["plain"]\n[models.one.usd_per_image]\n64x64 = { plain = "0.5" }\n'
        '[models.two]\nqualities = ["high"]\n[models.two.usd_per_image]\n128x128 = { high = "2" }\n'
    )
    assert len(run("prices", "--json", prices="card.toml").json) == 2
    assert "2.000000" in run("prices", "--quality", "high", prices="card.toml").out
    assert "nearest preset is 128x128" in run("prices", "--size", "99x99", "--quality", "high", prices="card.toml").err


# Spend and charges

NIGHT = datetime(2026, 11, 20, 23, 30, tzinfo=UTC)
MORNING = datetime(2026, 11, 21, 6, 0, tzinfo=UTC)

SMALL = Order("generation", "gpt-image-2", "1024x1024", "high", 2, False)
WIDE = Order("edit", "gpt-image-2", "2048x1152", "low", 1, True)


def charge(books: Ledger, account: Account, order: Order, at: datetime, delivered: int | None) -> str:
    """One request at ``at`` and what came of it, ``None`` being nothing that anybody knows; its id."""
    at_ms = int(at.timestamp() * 1000)
    hold = CARD.hold(order)
    job = Reservation(
        charge_id=tokens.new_id("chg", at_ms),
        request_id=tokens.new_id("req", at_ms),
        team_id=account.team_id,
        key_id=account.key_id,
        order=order,
        hold_micro_usd=hold,
        price_card=CARD.version,
        timeout_seconds=60,
    )
    delivery = Delivery((DeliveredImage(),) * (delivered or 0), complete=True, understood=True)
    outcome = unanswered(order, hold) if delivered is None else answered(CARD, order, hold, 200, delivery)
    books.post([job], now=at)
    books.post(bookings=[Booking(job.charge_id, account.team_id, outcome)], now=at + timedelta(seconds=20))
    return job.charge_id


@pytest.fixture
def history(books: Ledger) -> list[str]:
    """Four charges of two teams on two days, one of them in review; their ids, oldest first."""
    red, blue = books.account("red"), books.account("blue")
    return [
        charge(books, red, SMALL, NIGHT, 2),
        charge(books, blue, WIDE, NIGHT + timedelta(minutes=1), 0),
        charge(books, red, SMALL, MORNING, 1),
        charge(books, blue, WIDE, MORNING + timedelta(minutes=1), None),
    ]


def test_charges_are_every_row_oldest_first(run: Run, history: list[str]) -> None:
    rows = run("charges", "--json").json
    assert [row["id"] for row in rows] == history
    wanted = (
        "id request_id team key_id operation model size quality images_requested images_delivered state reserved_micro_usd "
        "settled_micro_usd basis upstream_status upstream_cost_micro_usd price_card created_at finished_at"
    )
    assert all(row.keys() >= set(wanted.split()) for row in rows)
    assert [row["state"] for row in rows] == ["settled", "released", "settled", "review"]
    assert [row["settled_micro_usd"] for row in rows] == [2 * HIGH, 0, HIGH, 0]
    assert [row["reserved_micro_usd"] for row in rows] == [0, 0, 0, 4_700]
    assert rows[0]["created_at"] == "2026-11-20T23:30:00Z"
    assert rows[0]["finished_at"] == "2026-11-20T23:30:20Z"
    assert [json.loads(line) for line in run("charges", "--format", "jsonl").out.splitlines()] == rows
    assert run("charges", "--format", "json").json == rows

    sheet = list(csv.DictReader(io.StringIO(run("charges", "--format", "csv").out, newline="")))
    assert [set(line) for line in sheet] == [set(row) for row in rows]
    assert [line["settled_micro_usd"] for line in sheet] == ["421400", "0", "210700", "0"]
    assert [line["basis"] for line in sheet] == ["requested", "", "requested", ""]
    table = run("charges").out
    assert all(words in table for words in ("0.421400", "0.004700", "review", *history))


@pytest.mark.parametrize(
    ("arguments", "places"),
    [
        (["--team", "red"], [0, 2]),
        (["--state", "settled"], [0, 2]),
        (["--state", "forwarded"], []),
        (["--since", "2026-11-21"], [2, 3]),
        (["--until", "2026-11-20"], [0, 1]),
        (["--since", "2026-11-21T06:00:30Z"], [3]),
        (["--since", "2026-11-20T23:31:00Z", "--until", "2026-11-21T06:01:00Z"], [1, 2]),
        (["--team", "blue", "--state", "review", "--since", "2026-11-20", "--until", "2026-11-21"], [3]),
    ],
)
def test_charges_can_be_chosen(run: Run, history: list[str], arguments: list[str], places: list[int]) -> None:
    assert [row["id"] for row in run("charges", *arguments, "--json").json] == [history[place] for place in places]


def test_spend_is_the_sum_of_the_charges_however_it_is_grouped(run: Run, history: list[str]) -> None:
    sums = ("requests", "images", "settled_micro_usd", "reserved_micro_usd")
    for by in (*GROUPS, "team,day", "key,size,quality", ",".join(GROUPS)):
        rows = run("spend", "--by", by, "--json").json
        assert all(list(row) == [*by.split(","), *sums] for row in rows)
        assert [sum(row[name] for row in rows) for name in sums] == [4, 3, 3 * HIGH, 4_700]
    assert [row["team"] for row in run("spend", "--json").json] == ["blue", "red"]
    by_day = run("spend", "--by", "day", "--since", "2026-11-21", "--format", "json").json
    assert by_day == [{"day": "2026-11-21", "requests": 2, "images": 1, "settled_micro_usd": HIGH, "reserved_micro_usd": 4_700}]

    sheet = list(csv.DictReader(io.StringIO(run("spend", "--by", "team", "--format", "csv").out)))
    assert sheet[1] == {"team": "red", "requests": "2", "images": "3", "settled_micro_usd": "632100", "reserved_micro_usd": "0"}
    last = run("spend", "--by", "team,month").out.splitlines()[-1].split()
    assert last == ["total", "4", "3", "0.632100", "0.004700"]


def test_nothing_spent_is_an_empty_list(run: Run) -> None:
    assert run("spend", "--json").json == []
    assert run("spend", "--format", "csv").out.splitlines() == ["team,requests,images,settled_micro_usd,reserved_micro_usd"]
    assert run("charges", "--format", "jsonl").out == ""
    assert len(run("charges", "--format", "csv").out.splitlines()) == 1


@pytest.mark.parametrize(
    ("value", "field"),
    [
        ("=1+1", "'=1+1"),
        ("+1", "'+1"),
        ("-1", "'-1"),
        ("@SUM(A1)", "'@SUM(A1)"),
        ("\t=1", "'\t=1"),
        ("\r=1", "'\r=1"),
        ('=HYPERLINK("x","y")', '\'=HYPERLINK("x","y")'),
        ('a "quoted", word', 'a "quoted", word'),
        ("two\nlines", "two\nlines"),
        # A number is no text: a spreadsheet should add it up.
        (-5, "-5"),
        (True, "true"),
        (None, ""),
    ],
)
def test_a_spreadsheet_takes_no_field_for_a_formula(capsys: pytest.CaptureFixture[str], value: object, field: str) -> None:
    print_csv(("name", "end"), [{"name": value, "end": "x"}])
    assert list(csv.reader(io.StringIO(capsys.readouterr().out, newline=""))) == [["name", "end"], [field, "x"]]


def test_an_array_is_written_row_by_row(capsys: pytest.CaptureFixture[str]) -> None:
    written = []

    def rows() -> Iterator[dict[str, int]]:
        for number in range(3):
            yield {"number": number}
            written.append(capsys.readouterr().out)

    print_json_array(rows())
    assert [json.loads(text[1:]) for text in written] == [{"number": 0}, {"number": 1}, {"number": 2}]
    assert capsys.readouterr().out == "\n]\n"


# Doctor


@pytest.fixture
def simulator() -> Iterator[str]:
    """The base URL of a simulated BeansAI that takes one key."""
    loop = Loop()
    running = running_simulator(SimulatorOptions(key="sk-beans-right"))
    yield loop.run(running.__aenter__()).base_url
    loop.run(running.__aexit__(None, None, None))
    loop.close()


def test_a_healthy_set_up(run: Run, books: Ledger, simulator: str) -> None:
    settings = {"upstream_url": simulator, "upstream_key": "sk-beans-right"}
    findings = run("doctor", "--json", **settings).json
    assert [finding["check"] for finding in findings] == ["settings", "price card", "database", "state directory", "upstream"]
    assert all(finding["ok"] for finding in findings)
    assert [line.split()[0] for line in run("doctor", **settings).out.splitlines()] == ["ok"] * 5


@pytest.mark.parametrize(
    ("settings", "check", "words"),
    [
        ({"prices": "missing.toml"}, "price card", "missing.toml"),
        ({"database_url": "sqlite:////no/such/directory/x.db"}, "database", "BEANMETER_DATABASE_URL"),
        ({"state_dir": "/dev/null/var"}, "state directory", "BEANMETER_STATE_DIR"),
        ({"upstream_key": "sk-beans-wrong"}, "upstream", "BEANMETER_UPSTREAM_KEY"),
        ({"upstream_url": "http://127.0.0.1:1/v1"}, "upstream", "BEANMETER_UPSTREAM_URL"),
    ],
)
def test_what_ails_is_named(run: Run, simulator: str, settings: dict[str, str], check: str, words: str) -> None:
    ran = run("doctor", "--json", **{"upstream_url": simulator, "upstream_key": "sk-beans-right", **settings})
    assert ran.status == 1
    failed = [finding for finding in json.loads(ran.out) if not finding["ok"]]
    assert [finding["check"] for finding in failed] == [check]
    assert words in failed[0]["message"]


def test_an_upstream_without_a_list_of_models_can_still_be_reached(run: Run, simulator: str) -> None:
    assert run("doctor", "--json", upstream_url=f"{simulator}/other", upstream_key="sk-beans-right").json[-1]["ok"] is True


# What runs


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serve_says_where_it_listens_and_stops_when_told(tmp_path: Path, number: signal.Signals) -> None:
    process = spawn("serve", "--port", "0", cwd=tmp_path, upstream_key="sk-beans-any")
    assert process.stdout is not None
    assert process.stderr is not None
    first = process.stderr.readline()
    base_url = next(word for word in first.split() if word.startswith("http")).rstrip(",")
    assert base_url.endswith("/v1")
    with urllib.request.urlopen(base_url.removesuffix("/v1") + "/livez") as answer:
        assert answer.status == 200
    process.send_signal(number)
    with process:
        err, out = process.stderr.read(), process.stdout.read()
    assert (process.returncode, out) == (0, "")
    assert "BEANMETER_ADMIN_TOKEN is not set" in err
    assert "beanmeter team add NAME" in err


def test_serve_keeps_away_from_sample_books(run: Run, books: Ledger) -> None:
    with books.database.writing() as connection:
        connection.execute(marks.insert().values(name="demo", value="yes"))
    ran = run("serve", upstream_key="sk-beans-any")
    assert (ran.status, ran.out) == (1, "")
    assert "BEANMETER_DATABASE_URL" in ran.err


def test_the_simulator_runs_alone(tmp_path: Path) -> None:
    with spawn("simulator", "--port", "0", cwd=tmp_path) as process:
        assert process.stderr is not None
        assert "http://127.0.0.1:" in process.stderr.readline()
        process.send_signal(signal.SIGTERM)
    assert process.returncode == 0
