"""What is held and booked to the micro-dollar, and what the upstream says that it costs."""

from __future__ import annotations

import pytest

from tests.exchanges.plays import framed
from tests.exchanges.teams import HIGH, PRICES, ask, asked, assert_that_it_counts, booked, new_team, settled
from tests.live import JSON, SSE, LiveGateway, ScriptedUpstream, completed, json_answer


def test_every_price_is_held_and_booked_exactly(stage: tuple[LiveGateway, ScriptedUpstream]) -> None:
    gateway, upstream = stage
    team = new_team(gateway)
    expected = []
    for place, ((size, quality), price) in enumerate(PRICES.items()):
        n = 1 + place % 10
        upstream.script = framed("length", JSON, json_answer(n))
        view = ask(team, asked(size=size, quality=quality, n=n))
        held = view.headers["x-beanmeter-reserved-usd"].replace(".", "")
        assert int(held) == n * price
        expected.append((size, quality, n, n * price))
    charges = [(c["size"], c["quality"], c["images_delivered"], c["settled_micro_usd"]) for c in team.charges()]
    assert charges == expected
    assert team.budget() == (sum(micro_usd for *_, micro_usd in expected), 0)
    assert len(charges) == 81


def form(fields: dict[str, str]) -> tuple[bytes, str]:
    """A multipart body with its fields after an image, and its content type."""
    parts = [b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n\x89PNG\r\n']
    parts += [
        f'--x\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode() for name, value in fields.items()
    ]
    return b"".join(parts) + b"--x--\r\n", "multipart/form-data; boundary=x"


@pytest.mark.parametrize(
    ("size", "quality", "n"), [("1024x1024", "low", 1), ("3840x2160", "high", 10), ("2016x1344", "medium", 3)]
)
def test_an_edit_costs_the_same(stage: tuple[LiveGateway, ScriptedUpstream], size: str, quality: str, n: int) -> None:
    gateway, upstream = stage
    team = new_team(gateway)
    upstream.script = framed("chunked", SSE, completed("edit") * n)
    fields = {"model": "gpt-image-2", "prompt": "x", "size": size, "quality": quality, "n": str(n), "stream": "true"}
    body, content_type = form(fields)
    headers = {"authorization": f"Bearer {team.key}", "content-type": content_type}
    answer = gateway.client.post("/images/edits", content=body, headers=headers)
    assert answer.status_code == 200
    charge = team.charge()
    assert charge["operation"] == "edit"
    assert booked(charge) == settled(n, n * PRICES[size, quality])
    assert_that_it_counts(team, charge)
    assert (upstream.requests[-1].target, upstream.requests[-1].body) == ("/v1/images/edits", body)


@pytest.mark.parametrize(
    ("stated", "stored", "mismatches"),
    [
        (str(HIGH), HIGH, 0),
        (str(HIGH + 1), HIGH + 1, 1),
        ("0", 0, 1),
        ("a lot", None, 0),
        ("-1", None, 0),
        ("1e5", None, 0),
        ("9" * 30, None, 0),
    ],
)
@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_the_upstreams_own_cost_is_stored_and_a_difference_counted(
    stage: tuple[LiveGateway, ScriptedUpstream], stated: str, stored: int | None, mismatches: int, framing: str
) -> None:
    gateway, upstream = stage
    team = new_team(gateway)
    upstream.script = framed(framing, [*JSON, ("X-Request-Cost-Micro-Usd", stated)], json_answer())
    before = gateway.metric("beanmeter_upstream_cost_mismatch_total")

    view = ask(team, asked())

    assert view.headers["x-request-cost-micro-usd"] == stated
    charge = team.charge()
    assert charge["upstream_cost_micro_usd"] == stored
    assert booked(charge) == settled(1)
    assert gateway.metric("beanmeter_upstream_cost_mismatch_total") - before == mismatches
