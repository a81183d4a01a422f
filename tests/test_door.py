"""The operator's door, by the tick of a clock that the test holds."""

from __future__ import annotations

import pytest

from proxy.door import ADDRESSES_MAX, FAILURES_MAX, WINDOW_SECONDS, Closed, Door, Throttled, Wrong

TOKEN = "an-admin-token-of-some-length"


def fail(door: Door, address: str, now: float) -> None:
    with pytest.raises(Wrong):
        door.enter("wrong", address, now)


def test_the_right_token_opens() -> None:
    Door(TOKEN).enter(TOKEN, "10.0.0.1", 0.0)


@pytest.mark.parametrize("token", [None, "", "an", TOKEN[:-1], TOKEN + "x", TOKEN.upper(), "\udcff"])
def test_anything_else_does_not(token: str | None) -> None:
    with pytest.raises(Wrong):
        Door(TOKEN).enter(token, "10.0.0.1", 0.0)


@pytest.mark.parametrize("token", [None, "", TOKEN])
def test_without_a_token_of_its_own_it_stays_closed(token: str | None) -> None:
    with pytest.raises(Closed):
        Door(None).enter(token, "10.0.0.1", 0.0)


def test_failures_are_throttled_by_address_and_forgotten_after_the_window() -> None:
    door = Door(TOKEN)
    for second in range(FAILURES_MAX):
        fail(door, "10.0.0.1", float(second))
    with pytest.raises(Throttled) as throttled:
        door.enter(TOKEN, "10.0.0.1", 10.0)
    assert throttled.value.retry_after_seconds == WINDOW_SECONDS - 10
    door.enter(TOKEN, "10.0.0.2", 10.0)
    door.enter(TOKEN, "10.0.0.1", WINDOW_SECONDS + 0.5)


def test_coming_in_clears_earlier_slips() -> None:
    door = Door(TOKEN)
    for round_ in range(3):
        for _ in range(FAILURES_MAX - 1):
            fail(door, "10.0.0.1", float(round_))
        door.enter(TOKEN, "10.0.0.1", float(round_))


def test_a_flood_of_addresses_is_remembered_only_so_far() -> None:
    door = Door(TOKEN)
    for number in range(ADDRESSES_MAX + 500):
        fail(door, f"address {number}", 0.0)
    assert len(door._failures) == ADDRESSES_MAX
