"""Paths, targets and methods that there are not."""

from __future__ import annotations

import pytest

from tests.bare import EDITS, GENERATIONS, JSON_TYPE, ask, order, post, request
from tests.live import LiveGateway, ScriptedUpstream
from tests.refusals.checks import NO_PATH, Refused, check, nothing_heard, refused

PATHS = [
    "/v1/images/generations/", "/v1/images/edits/", "/v1//images/generations", "//v1/images/generations", "/v1/images//edits",
    "/V1/images/generations", "/v1/Images/generations", "/v1/images/GENERATIONS", "/v1/images/generation%73",
    "/v1/images%2Fgenerations", "/v1%2fimages/edits", "/v1/images/./generations", "/v1/images/x/../generations",
    "/v1/images/%2e%2e/images/edits", "/v1/images/generations%20", "/v1/images/generations%00", "/v1/images/generations;a=b",
    "/v1/images/generations/..", "/v1/images/generations\\", "/images/generations", "/v1/v1/images/generations",
    "/openai/v1/images/generations", "/v1/images/variations", "/v1/images", "/v1/images/", "/v1", "/v1/", "/",
    "/v1/chat/completions", "/v1/responses", "/v1/embeddings", "/v1/files", "/v1/audio/speech", "/v1/videos",
    "/v1/organization",
    "/v1/models/", "/v1/budget/", "/v1/Models", "/v1/%6dodels", "/v1/models/gpt-image-2/x", "/v1/models/gpt%2Dimage-2",
]  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_other_paths_and_other_spellings(live: tuple[LiveGateway, ScriptedUpstream], key: str, path: str) -> None:
    refused(live, post(key, order(), path), NO_PATH)
    refused(live, request("GET", path, key=key), NO_PATH)
    # What there is not, there is not for anybody.
    refused(live, request("GET", path), NO_PATH)
    assert ask(live[0], request("HEAD", path)).status == 404


@pytest.mark.parametrize(
    "target",
    [f"http://gateway.test{GENERATIONS}", f"HTTP://gateway.test{GENERATIONS}", "*", f"{GENERATIONS}#x", f"?x{GENERATIONS}"],
)
def test_a_target_in_another_form(live: tuple[LiveGateway, ScriptedUpstream], key: str, target: str) -> None:
    with nothing_heard(live):
        assert 400 <= ask(live[0], post(key, order(), target)).status < 500


def test_a_query_is_no_part_of_the_path_and_goes_upstream_as_it_is(
    live: tuple[LiveGateway, ScriptedUpstream], key: str
) -> None:
    gateway, upstream = live
    assert ask(gateway, post(key, order(), GENERATIONS + "?a=%2F&b=/../&a=?")).status == 200
    assert upstream.requests[-1].target == GENERATIONS + "?a=%2F&b=/../&a=?"


@pytest.mark.parametrize("path", [GENERATIONS, EDITS])
@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND"])
def test_other_methods_on_priced_paths(live: tuple[LiveGateway, ScriptedUpstream], key: str, path: str, method: str) -> None:
    for caller in (key, None):
        with nothing_heard(live):
            reply = ask(live[0], request(method, path, [JSON_TYPE], key=caller))
            assert (reply.status, reply.values("allow")) == (405, ["POST"])
            if method == "HEAD":
                assert reply.body == b""
            else:
                check(reply, Refused(405, "method_not_allowed", headers={"allow": "POST"}))


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/gpt-image-2", "/v1/budget", "/livez", "/readyz", "/metrics"])
@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
def test_other_methods_on_what_is_read(live: tuple[LiveGateway, ScriptedUpstream], key: str, path: str, method: str) -> None:
    reply = refused(live, request(method, path, key=key), Refused(405, "method_not_allowed", headers={"allow": "GET, HEAD"}))
    assert "GET, HEAD" in reply.error["message"]
    assert ask(live[0], request("HEAD", path, key=key)).status == 200
