"""Refusals as the official SDK takes them."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from proxy import tokens
from tests.live import ORDER, LiveGateway, ScriptedUpstream
from tests.refusals.checks import MAX_BODY_BYTES, nothing_heard, sdk


def test_the_sdk_takes_over_budget_as_a_rate_limit_and_asks_once(live: tuple[LiveGateway, ScriptedUpstream]) -> None:
    gateway, _ = live
    _, caller = gateway.add_team("sdk")
    gateway.set_budget(0, team="sdk")
    with nothing_heard(live), sdk(gateway, caller) as client, pytest.raises(openai.RateLimitError) as raised:
        client.images.generate(model="gpt-image-2", prompt="a bean", size="1024x1024", quality="high")
    assert (raised.value.code, raised.value.type) == ("insufficient_quota", "insufficient_quota")
    assert "budget of $0.000000" in str(raised.value)
    assert gateway.metric('beanmeter_refusals_total{code="insufficient_quota",team="sdk"}') == 1


@pytest.mark.parametrize(
    ("changes", "error", "code"),
    [
        ({"size": "1000x1000"}, openai.BadRequestError, "invalid_value"),
        ({"n": 11}, openai.BadRequestError, "invalid_value"),
        ({"model": "dall-e-3"}, openai.NotFoundError, "model_not_found"),
        ({"prompt": "x" * MAX_BODY_BYTES}, openai.APIStatusError, "request_too_large"),
    ],
)
def test_the_sdk_takes_refusals_for_what_they_are(
    live: tuple[LiveGateway, ScriptedUpstream], key: str, changes: dict[str, Any], error: type[openai.APIStatusError], code: str
) -> None:
    with nothing_heard(live), sdk(live[0], key) as client, pytest.raises(error) as raised:
        client.images.generate(**{**ORDER, **changes})
    assert raised.value.code == code
    assert str(raised.value.request_id).startswith("req_")


def test_the_sdk_takes_a_wrong_key_for_what_it_is(live: tuple[LiveGateway, ScriptedUpstream]) -> None:
    with nothing_heard(live), sdk(live[0], tokens.new_key()) as client, pytest.raises(openai.AuthenticationError) as raised:
        client.images.generate(model="gpt-image-2", prompt="a bean")
    assert raised.value.code == "invalid_api_key"
