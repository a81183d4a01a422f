"""A gateway killed at every step of an exchange, of a replay and of a sweep: the next process ends what it left."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

from tests.chaos import runner
from tests.chaos.crew import LATER, Crew, crew
from tests.chaos.sizes import size
from tests.outage import database_away

ROUNDS = size(1, 20)

# The step at which a gateway dies, and what becomes of the charge; ``None`` where there is none.
KILLS = {
    runner.BEFORE_RESERVE_COMMIT: None,
    runner.AFTER_RESERVE_COMMIT: "review",
    runner.BEFORE_SEND: "review",
    runner.IN_SEND: "review",
    runner.AFTER_SEND: "review",
    runner.AFTER_HEAD: "review",
    runner.AFTER_FIRST_BYTE: "review",
    runner.AFTER_LAST_BYTE: "review",
    # By then the outcome is noted, and the client has the end of its answer.
    runner.BEFORE_BOOK_COMMIT: "settled",
    runner.AFTER_BOOK_COMMIT: "settled",
}

# The same with a database that is away when the outcome is known.
KILLS_WITHOUT_DATABASE = {runner.BEFORE_JOURNAL: "settled", runner.AFTER_JOURNAL: "settled"}

EXCHANGES = 6

NEVER_SECONDS = 3600.0

# What a process is killed at that takes over from the dead: the step, the visit, and whether it sees all as overdue.
KILLS_IN_TAKING_OVER = (
    (runner.BEFORE_BOOK_COMMIT, 1, False),
    (runner.AFTER_BOOK_COMMIT, 1, False),
    (runner.BEFORE_BOOK_COMMIT, 2, False),
    (runner.AFTER_BOOK_COMMIT, 2, False),
    (runner.IN_SWEEP, 1, True),
    (runner.IN_SWEEP, 3, True),
    (runner.BEFORE_BOOK_COMMIT, 1, True),
    (runner.AFTER_BOOK_COMMIT, 1, True),
)


def test_killed_at_every_step(database_url: str, tmp_path: Path) -> None:
    with crew(database_url, tmp_path) as team:
        team.set_budget(10**12)
        for number in range(1, ROUNDS + 1):
            die_at_every_step(team)
            die_without_a_database(team)
            leave_a_journal(team)
            die_while_taking_over(team)
            team.recover()
            ends = Counter(row["state"] for row in team.audit().values())
            expected = Counter(state for state in (*KILLS.values(), *KILLS_WITHOUT_DATABASE.values()) if state)
            expected["settled"] += EXCHANGES
            assert ends == {state: number * count for state, count in expected.items()}


def die_at_every_step(team: Crew) -> None:
    """A gateway for each step, and an order for each gateway."""
    # They leave alone what the others leave: to book that is to die of it, before their own order has come.
    plan = replace(team.plan(), sweep_seconds=NEVER_SECONDS)
    doomed = [(step, state, team.start(replace(plan, die_at=step))) for step, state in KILLS.items()]
    for step, state, process in doomed:
        before = team.charges().keys()
        answered = team.order(process.base_url, stream=True)
        assert answered == (200 if state == "settled" else None), "nobody has an end of which nothing is known afterwards"
        process.wait_until_killed()
        new = [row["state"] for request_id, row in team.charges().items() if request_id not in before]
        # Whether it was sent, and what came of it, nobody is left to say, but for what was noted or booked.
        booked = "settled" if step == runner.AFTER_BOOK_COMMIT else "forwarded"
        assert new == ([] if state is None else [booked])


def die_without_a_database(team: Crew) -> None:
    doomed = [team.start(replace(team.plan(), die_at=step)) for step in KILLS_WITHOUT_DATABASE]
    with team.orders_under_way([process.base_url for process in doomed]), database_away(team.database_url):
        for process in doomed:
            process.wait_until_killed()


def leave_a_journal(team: Crew) -> None:
    """Exchanges that end while the database is away, in a gateway that is killed before it is back."""
    process = team.start(team.plan())
    with team.orders_under_way([process.base_url] * EXCHANGES) as answers, database_away(team.database_url):
        # Their clients have the whole answer, for what came of them is safe.
        assert [answer.result() for answer in answers] == [200] * EXCHANGES
        process.kill()


def die_while_taking_over(team: Crew) -> None:
    for step, visit, later in KILLS_IN_TAKING_OVER:
        plan = replace(team.plan(), die_at=step, visit=visit, batch_jobs_max=2)
        if later:
            plan = replace(plan, clock_ahead=LATER, settled_in_seconds=0.0)
        team.start(plan).wait_until_killed()
