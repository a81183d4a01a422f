"""OpenAI's own SDKs as clients, with nothing set but a base URL and a team key, and a simulated BeansAI whose bill the ledger
has to match to the micro-dollar."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types import ImageEditCompletedEvent, ImageGenCompletedEvent, ImagesResponse

from proxy.prices import shipped_card
from proxy.simulator import Simulator, SimulatorOptions, pictures, running_simulator
from tests.live import UPSTREAM_KEY, LiveGateway, Loop, wait_for

PRICES = shipped_card().models["gpt-image-2"].micro_usd
LOW = PRICES["1024x1024", "low"]
ORDER: dict[str, Any] = {"model": "gpt-image-2", "prompt": "a bean", "size": "1024x1024", "quality": "low"}
PNG = pictures.picture(64, 48, 1)
# Room for all that is asked for here, but not for ten of the largest images.
BUDGET_MICRO_USD = 10 * PRICES["3840x2160", "high"] - 1

# With this set, a test that can't have Node's SDKs fails instead of being skipped.
REQUIRE_NODE = "TEST_REQUIRE_NODE"
NODE_PROJECT = Path(__file__).parent / "sdk"

# A first installation loads a few megabytes.
INSTALL_SECONDS = 120


@dataclass
class Stand:
    """A gateway before a simulated BeansAI. What came before a test is not on its account."""

    gateway: LiveGateway
    simulator: Simulator
    charges_before: int = 0

    def begin(self) -> None:
        self.simulator.reset()
        self.charges_before = len(self.gateway.charges())

    def charges(self) -> list[dict[str, Any]]:
        """The test's charges, once all have ended."""

        def ended() -> list[dict[str, Any]] | None:
            found = self.gateway.charges()[self.charges_before :]
            return found if all(charge["state"] != "forwarded" for charge in found) else None

        return wait_for(ended)

    def amounts(self) -> list[int]:
        """What the test's charges settled at, after checking that the bill says the same, request by request."""
        charges, bill = self.charges(), self.simulator.bill()
        billed = [(entry["client_request_id"], entry["micro_usd"], entry["images"]) for entry in bill["entries"]]
        settled = [(c["request_id"], c["settled_micro_usd"], c["images_delivered"]) for c in charges if c["images_delivered"]]
        assert sorted(billed) == sorted(settled)
        assert len({request_id for request_id, _, _ in billed}) == len(billed)
        assert bill["total_micro_usd"] == sum(charge["settled_micro_usd"] for charge in charges)
        assert sum(charge["reserved_micro_usd"] for charge in charges) == 0
        return [charge["settled_micro_usd"] for charge in charges]


@pytest.fixture(scope="module")
def shared_stand(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stand]:
    directory = tmp_path_factory.mktemp("sdks")
    loop = Loop()
    running = running_simulator(SimulatorOptions(key=UPSTREAM_KEY))
    simulator = loop.run(running.__aenter__())
    try:
        with LiveGateway(loop, f"sqlite:///{directory / 'beanmeter.db'}", simulator.base_url, directory) as gateway:
            gateway.set_budget(BUDGET_MICRO_USD)
            yield Stand(gateway, simulator)
    finally:
        loop.run(running.__aexit__(None, None, None))
        loop.close()


@pytest.fixture
def stand(shared_stand: Stand) -> Stand:
    shared_stand.begin()
    return shared_stand


@pytest.fixture(scope="module")
def client(shared_stand: Stand) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=shared_stand.gateway.base_url, api_key=shared_stand.gateway.key) as client:
        yield client


def is_png(encoded: str | None) -> bool:
    return base64.b64decode(encoded or "").startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("asked", "images", "micro_usd"),
    [
        ({}, 1, LOW),
        ({"n": 3}, 3, 3 * LOW),
        ({"size": "3840x2160", "quality": "high"}, 1, PRICES["3840x2160", "high"]),
        ({"size": "auto", "quality": "auto"}, 1, PRICES["1024x1024", "medium"]),
        ({"response_format": "b64_json", "output_format": "png", "user": "someone"}, 1, LOW),
        ({"prompt": "[[sim url]]"}, 1, LOW),
    ],
    ids=str,
)
def test_generate(stand: Stand, client: openai.OpenAI, asked: dict[str, Any], images: int, micro_usd: int) -> None:
    answer = client.images.generate(**ORDER | asked)
    assert len(answer.data or []) == images
    assert all(is_png(image.b64_json) or image.url for image in answer.data or [])
    assert stand.amounts() == [micro_usd]


@pytest.mark.parametrize(
    "form", ["a bean", "[[sim newline=crlf]]", "[[sim newline=cr]]", "[[sim noise done=no]]", "[[sim last-blank=no]]"]
)
def test_generate_streamed(stand: Stand, client: openai.OpenAI, form: str) -> None:
    with client.images.generate(**ORDER | {"prompt": form}, stream=True, partial_images=2) as stream:
        events = list(stream)
    completed = [event for event in events if isinstance(event, ImageGenCompletedEvent)]
    assert len([event for event in events if event.type == "image_generation.partial_image"]) == 2
    assert [is_png(event.b64_json) for event in completed] == [True]
    assert stand.amounts() == [LOW]


def test_several_images_in_one_stream(stand: Stand, client: openai.OpenAI) -> None:
    with client.images.generate(**ORDER, n=3, stream=True) as stream:
        assert [event.type for event in stream] == ["image_generation.completed"] * 3
    assert stand.amounts() == [3 * LOW]


def test_generate_asynchronously_many_at_once(stand: Stand) -> None:
    async def generate(client: openai.AsyncOpenAI, n: int) -> int:
        return len((await client.images.generate(**ORDER, n=n)).data or [])

    async def stream(client: openai.AsyncOpenAI) -> list[str]:
        async with await client.images.generate(**ORDER, stream=True, partial_images=1) as events:
            return [event.type async for event in events]

    async def run() -> tuple[list[int], list[list[str]]]:
        async with openai.AsyncOpenAI(base_url=stand.gateway.base_url, api_key=stand.gateway.key) as client:
            counts = asyncio.gather(*(generate(client, 1 + place % 3) for place in range(12)))
            streams = asyncio.gather(*(stream(client) for _ in range(6)))
            return await counts, await streams

    counts, streams = asyncio.run(run())
    assert counts == [1, 2, 3] * 4
    assert streams == [["image_generation.partial_image", "image_generation.completed"]] * 6
    assert sorted(stand.amounts()) == sorted([LOW, 2 * LOW, 3 * LOW] * 4 + [LOW] * 6)


FILE = ("bean.png", PNG, "image/png")
LARGE_FILE = ("Bohne \U0001fad8.png", PNG + bytes(3 << 20), "image/png")


@pytest.mark.parametrize(
    ("asked", "images"),
    [
        pytest.param({"image": FILE}, 1, id="one image"),
        pytest.param({"image": [FILE, LARGE_FILE, FILE], "n": 2}, 2, id="several images"),
        pytest.param({"image": FILE, "mask": FILE}, 1, id="a mask"),
        pytest.param({"image": [LARGE_FILE, FILE], "mask": FILE, "n": 3, "input_fidelity": "high"}, 3, id="all at once"),
    ],
)
def test_edit(stand: Stand, client: openai.OpenAI, asked: dict[str, Any], images: int) -> None:
    answer = client.images.edit(**ORDER | asked)
    assert [is_png(image.b64_json) for image in answer.data or []] == [True] * images
    assert stand.amounts() == [images * LOW]
    assert stand.charges()[0]["operation"] == "edit"


def test_edit_streamed(stand: Stand, client: openai.OpenAI) -> None:
    with client.images.edit(**ORDER, image=LARGE_FILE, stream=True, partial_images=1) as stream:
        events = list(stream)
    assert [event.type for event in events] == ["image_edit.partial_image", "image_edit.completed"]
    assert isinstance(events[-1], ImageEditCompletedEvent)
    assert stand.amounts() == [LOW]


def test_edit_with_data_urls(stand: Stand, client: openai.OpenAI) -> None:
    url = "data:image/png;base64," + base64.b64encode(PNG + bytes(2 << 20)).decode()
    body = {"images": [{"image_url": url}, {"image_url": url}], **ORDER, "n": 2}
    answer = client.post("/images/edits", cast_to=ImagesResponse, body=body)
    assert len(answer.data or []) == 2
    assert stand.amounts() == [2 * LOW]


def test_models(stand: Stand, client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["gpt-image-2"]
    assert client.models.retrieve("gpt-image-2").id == "gpt-image-2"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-image-1")
    assert stand.simulator.requests() == []


# Errors


@pytest.mark.parametrize(
    ("asked", "raised", "code", "param"),
    [
        ({"size": "1x1"}, openai.BadRequestError, "invalid_value", "size"),
        ({"quality": "hd"}, openai.BadRequestError, "invalid_value", "quality"),
        ({"n": 11}, openai.BadRequestError, "invalid_value", "n"),
        ({"model": "dall-e-3"}, openai.NotFoundError, "model_not_found", "model"),
        ({"size": "3840x2160", "quality": "high", "n": 10}, openai.RateLimitError, "insufficient_quota", None),
    ],
    ids=str,
)
def test_a_refusal_raises_once_and_costs_nothing(
    stand: Stand,
    client: openai.OpenAI,
    asked: dict[str, Any],
    raised: type[openai.APIStatusError],
    code: str,
    param: str | None,
) -> None:
    line = f'beanmeter_refusals_total{{code="{code}",team="red"}}'
    before = stand.gateway.metric(line)
    with pytest.raises(raised) as caught:
        client.images.generate(**ORDER | asked)
    assert (caught.value.code, caught.value.param) == (code, param)
    assert caught.value.request_id
    # The SDK did not try again.
    assert stand.gateway.metric(line) - before == 1
    assert stand.simulator.requests() == []
    assert stand.amounts() == []


def test_a_wrong_key_is_an_authentication_error(stand: Stand) -> None:
    with (
        openai.OpenAI(base_url=stand.gateway.base_url, api_key="sk-bm-not-a-key") as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        stranger.images.generate(**ORDER)
    assert stand.simulator.requests() == []


@pytest.mark.parametrize(
    ("directive", "raised", "requests"),
    [
        ("error=400", openai.BadRequestError, 1),
        ("error=403 body=html", openai.PermissionDeniedError, 1),
        # This the SDK tries again, and each attempt is a request of its own.
        ("error=500", openai.InternalServerError, 3),
    ],
)
def test_an_error_of_the_upstream_is_the_same_through_the_gateway(
    stand: Stand, client: openai.OpenAI, directive: str, raised: type[openai.APIStatusError], requests: int
) -> None:
    with pytest.raises(raised):
        client.images.generate(**ORDER | {"prompt": f"[[sim {directive}]]"})
    assert len(stand.simulator.requests()) == requests
    assert stand.amounts() == [0] * requests
    assert {charge["state"] for charge in stand.charges()} == {"released"}


def test_a_refusal_of_the_organisations_key_is_raised_once(stand: Stand, client: openai.OpenAI) -> None:
    with pytest.raises(openai.InternalServerError) as caught:
        client.images.generate(**ORDER | {"prompt": "[[sim error=401]]"})
    assert caught.value.code == "upstream_credentials"
    assert len(stand.simulator.requests()) == 1
    assert stand.amounts() == [0]


@pytest.mark.parametrize("directive", ["reset=before-headers", "reset=before-headers end=close"])
def test_an_upstream_that_breaks_off_is_not_asked_again(stand: Stand, client: openai.OpenAI, directive: str) -> None:
    with pytest.raises(openai.InternalServerError) as caught:
        client.images.generate(**ORDER | {"prompt": f"[[sim {directive}]]"})
    assert caught.value.code == "upstream_failed"
    assert len(stand.simulator.requests()) == 1
    (charge,) = stand.charges()
    assert (charge["state"], charge["reserved_micro_usd"]) == ("review", LOW)


@pytest.mark.parametrize("ending", ["reset", "close"])
def test_a_stream_that_is_cut_raises(stand: Stand, client: openai.OpenAI, ending: str) -> None:
    prompt = f"[[sim cut=50% end={ending}]]"
    with (
        client.images.generate(**ORDER | {"prompt": prompt}, stream=True) as stream,
        pytest.raises(Exception, match=r".") as caught,
    ):
        list(stream)
    assert isinstance(caught.value, openai.APIError | openai.APIConnectionError | OSError) or "peer" in str(caught.value)
    (charge,) = stand.charges()
    assert (charge["state"], charge["settled_micro_usd"], charge["reserved_micro_usd"]) == ("review", 0, LOW)
    assert len(stand.simulator.requests()) == 1


def test_an_error_in_a_stream_raises_and_what_was_made_is_paid(stand: Stand, client: openai.OpenAI) -> None:
    asked = ORDER | {"prompt": "[[sim sse-error-after=1]]", "n": 3}
    with client.images.generate(**asked, stream=True) as stream, pytest.raises(openai.APIError):
        list(stream)
    assert stand.amounts() == [LOW]


# Node


@pytest.fixture(scope="module")
def node_project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project in ``tests/sdk`` with the SDKs installed, outside of the checkout."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        return missing_node("node and npm are not installed")
    version = subprocess.run(["node", "--version"], capture_output=True, text=True, check=True).stdout
    if int(version.removeprefix("v").partition(".")[0]) < 20:
        return missing_node(f"the SDKs need Node 20 or newer, and this is {version.strip()}")
    project = tmp_path_factory.mktemp("node") / "sdk"
    shutil.copytree(NODE_PROJECT, project, ignore=shutil.ignore_patterns("node_modules"))
    command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--prefer-offline", "--fetch-retries=1"]
    try:
        done = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=INSTALL_SECONDS)
    except subprocess.TimeoutExpired:
        return missing_node(f"npm did not install the SDKs within {INSTALL_SECONDS} seconds")
    return project if done.returncode == 0 else missing_node(f"npm can't install the SDKs: {done.stderr.strip()[-300:]}")


def missing_node(reason: str) -> Path:
    if os.environ.get(REQUIRE_NODE):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.mark.parametrize("sdk", ["openai-6", "openai-7"])
def test_the_node_sdk(stand: Stand, node_project: Path, sdk: str) -> None:
    command = ["node", "exchange.mjs", sdk, stand.gateway.base_url, stand.gateway.key]
    done = subprocess.run(command, cwd=node_project, capture_output=True, text=True, timeout=INSTALL_SECONDS)
    assert done.returncode == 0, done.stderr
    answers = {line["name"]: line["answer"] for line in map(json.loads, done.stdout.splitlines())}
    assert answers == {
        "generate": 1,
        "several": 3,
        "stream": ["image_generation.partial_image"] * 2 + ["image_generation.completed"],
        "edit": 1,
        "edit of several": 2,
        "edit with a mask": 1,
        "streamed edit": ["image_edit.partial_image", "image_edit.completed"],
        "models": ["gpt-image-2"],
        "wrong size": {"error": "BadRequestError", "status": 400, "code": "invalid_value"},
        "refused upstream": {"error": "BadRequestError", "status": 400, "code": "moderation_blocked"},
        "over budget": {"error": "RateLimitError", "status": 429, "code": "insufficient_quota"},
    }
    medium = PRICES["1024x1024", "medium"]
    assert stand.amounts() == [LOW, 3 * medium, LOW, LOW, 2 * LOW, LOW, LOW, 0]


def test_the_node_project_is_locked_by_hash_and_names_no_registry() -> None:
    lock = json.loads((NODE_PROJECT / "package-lock.json").read_text("utf-8"))
    packages = {name: package for name, package in lock["packages"].items() if name}
    assert packages
    assert all("integrity" in package and "resolved" not in package for package in packages.values())
    assert "://" not in json.dumps({name: package["integrity"] for name, package in packages.items()})
