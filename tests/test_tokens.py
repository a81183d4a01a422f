"""Team keys and ids: spelling, checksum, order."""

from __future__ import annotations

import hashlib
import os
import re
import string
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from proxy.tokens import digest, is_well_formed, last_four, new_id, new_key


def test_a_new_key_is_well_formed_and_never_the_same() -> None:
    keys = {new_key() for _ in range(1000)}
    assert len(keys) == 1000
    assert all(re.fullmatch(r"sk-bm-[a-z2-7]{39}", key) and is_well_formed(key) for key in keys)


def test_every_single_slip_is_noticed() -> None:
    key = new_key()
    slips = {
        key[:place] + other + key[place + 1 :]
        for place in range(len(key))
        for other in string.ascii_lowercase + string.digits + "-_ "
    } - {key}
    assert not any(is_well_formed(slip) for slip in slips)


def test_two_neighbours_swapped_are_noticed() -> None:
    key = new_key()
    swapped = {key[:i] + key[i + 1] + key[i] + key[i + 2 :] for i in range(len(key) - 1)} - {key}
    assert swapped
    assert not any(is_well_formed(slip) for slip in swapped)


@pytest.mark.parametrize(
    "damage",
    [
        lambda key: "",
        lambda key: key[:-1],
        lambda key: key[1:],
        lambda key: key + "a",
        lambda key: key + "\n",
        lambda key: key.upper(),
        lambda key: key.removeprefix("sk-bm-"),
        lambda key: key.replace("sk-bm-", "sk-beans-"),
        lambda key: key[:-1] + "é",
        lambda key: key * 100_000,
    ],
)
def test_what_is_not_a_key_is_refused(damage: Callable[[str], str]) -> None:
    assert not is_well_formed(damage(new_key()))


def test_a_key_is_kept_as_its_sha256_and_shown_by_its_last_four() -> None:
    key = new_key()
    assert digest(key) == hashlib.sha256(key.encode()).digest()
    assert key.endswith(last_four(key))
    assert len(last_four(key)) == 4


def test_ids_sort_by_their_time() -> None:
    times = [0, 1, 31, 32, 1023, 1024, 1_763_800_000_000, 1_763_800_000_001, (1 << 48) - 1]
    ids = [new_id("chg", now_ms) for now_ms in times]
    assert ids == sorted(ids)
    assert all(re.fullmatch(r"chg_[0-7][0-9A-HJKMNP-TV-Z]{25}", one) for one in ids)


def test_an_id_begins_with_its_time_in_crockfords_base_32() -> None:
    # 1469918176385 is 01ARYZ6S41 in the ULID specification's own example.
    assert new_id("req", 1_469_918_176_385)[:14] == "req_01ARYZ6S41"


def test_ids_of_one_millisecond_differ() -> None:
    assert len({new_id("req", 1_763_800_000_000) for _ in range(10_000)}) == 10_000


def test_ids_of_several_threads_and_of_a_forked_process_differ() -> None:
    new_id("req", 0)  # others are drawn with it
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(writing, " ".join(new_id("req", 0) for _ in range(100)).encode("ascii"))
        os._exit(0)
    os.waitpid(pid, 0)
    others = os.read(reading, 65_536).decode("ascii").split()
    os.close(reading)
    os.close(writing)
    with ThreadPoolExecutor(4) as threads:
        ours = list(threads.map(lambda _: new_id("req", 0), range(10_000)))
    assert len(others) == 100
    assert len({*others, *ours}) == 10_100


@pytest.mark.parametrize("now_ms", [-1, 1 << 48])
def test_a_time_that_an_id_cannot_hold_is_refused(now_ms: int) -> None:
    with pytest.raises(ValueError, match=r"can hold"):
        new_id("chg", now_ms)
