"""Traces, as a receiver of OTLP gets them: one span an exchange, whose parent is the caller's, and nothing in it that is
nobody's business. The receiver is an HTTP server on loopback that reads what the exporter sends."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from structlog.testing import capture_logs

from proxy.settings import SettingsError, load
from proxy.tracing import check_tracing, spans
from tests.bare import GENERATIONS, JSON_TYPE, request
from tests.live import (
    JSON,
    ORDER,
    PATIENCE_SECONDS,
    PRICE_MICRO_USD,
    SSE,
    UPSTREAM_KEY,
    Conversation,
    LiveGateway,
    ScriptedUpstream,
    chunked,
    completed,
    event,
    json_answer,
    live_gateway,
    wait_for,
    whole,
)
from tests.test_supervisor import Served

TRACES = {"BEANMETER_TRACES": "true"}

TRACE_ID, SPAN_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PARENT = f"00-{TRACE_ID}-{SPAN_ID}-01"

# What a caller says that nobody else may read.
PROMPT = "a portrait of my grandmother in Zanzibar"
FILE = "grandmother-on-the-beach.png"

EDIT = {**ORDER, "images": [{"image_url": "data:image/png;base64,iVBORw0KGgo="}]}
ALL_WELL = {"status": 0, "error.type": None}


# The receiver


@dataclass(frozen=True)
class Told:
    """A span as it arrived. ``status`` 2 is an error; ``parent`` is empty where it begins a trace."""

    name: str
    kind: int
    trace_id: str
    span_id: str
    parent: str
    state: str
    status: int
    attributes: dict[str, Any]
    resource: dict[str, Any]


@dataclass
class Receiver:
    """Takes spans at ``url``. ``posts`` are the bodies as they came."""

    posts: list[bytes] = field(default_factory=list)

    def __enter__(self) -> Receiver:
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                assert self.path == "/v1/traces"
                receiver.posts.append(self.rfile.read(int(self.headers["content-length"])))
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def spans(self) -> list[Told]:
        """All spans so far."""
        found = []
        for post in list(self.posts):
            for group in ExportTraceServiceRequest.FromString(post).resource_spans:
                resource = attributes(group.resource.attributes)
                found += [told(span, resource) for scope in group.scope_spans for span in scope.spans]
        return found

    def span_of(self, request_id: str) -> Told:
        """The span of a request, once it is here. There is one."""

        def look() -> list[Told] | None:
            return [span for span in self.spans() if span.attributes.get("beanmeter.request_id") == request_id] or None

        (span,) = wait_for(look)
        return span


def attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in pairs}


def told(span: Any, resource: dict[str, Any]) -> Told:
    return Told(
        name=span.name,
        kind=span.kind,
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent=span.parent_span_id.hex(),
        state=span.trace_state,
        status=span.status.code,
        attributes=attributes(span.attributes),
        resource=resource,
    )


# The scene


@dataclass(frozen=True)
class Scene:
    gateway: LiveGateway
    upstream: ScriptedUpstream
    receiver: Receiver

    def post(self, order: dict[str, Any], path: str = "/images/generations", **options: Any) -> httpx2.Response:
        return self.gateway.client.post(path, json=order, **options)

    def span_of(self, response: httpx2.Response) -> Told:
        return self.receiver.span_of(response.headers["x-beanmeter-request-id"])

    def passed_on(self, *names: str) -> list[tuple[str, str]]:
        """Headers of the last request as the upstream got it."""
        return [(name, value) for name, value in self.upstream.requests[-1].headers if name in names]


@contextmanager
def environment(**variables: str) -> Iterator[None]:
    """OpenTelemetry's own variables, while a gateway of this process starts: it reads them then."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        yield


@contextmanager
def playing(place: Path, **variables: str) -> Iterator[Scene]:
    """A gateway that tells a receiver, with other variables of OpenTelemetry's or its settings in their place."""
    with Receiver() as receiver, ExitStack() as stack:
        ours = {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url, "OTEL_BSP_SCHEDULE_DELAY": "20", "OTEL_SERVICE_NAME": "images"}
        with environment(**{**ours, **variables}):
            started = live_gateway(f"sqlite:///{place / 'beanmeter.db'}", place, TRACES)
            gateway, upstream = stack.enter_context(started)
        yield Scene(gateway, upstream, receiver)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with playing(tmp_path_factory.mktemp("tracing")) as scene:
        yield scene


@pytest.fixture
def scene(stage: Scene) -> Scene:
    """The module's, with an upstream that answers well."""
    stage.upstream.answer(whole(200, JSON, json_answer(size="1024x1024", quality="high")))
    return stage


# What a span says


def test_a_span_says_what_was_asked_for_and_what_became_of_it(scene: Scene) -> None:
    answer = json_answer(
        2, size="1024x1024", quality="high", usage={"input_tokens": 7, "output_tokens": 900, "total_tokens": 907}
    )
    scene.upstream.answer(whole(200, [*JSON, ("x-request-id", "up-1")], answer))
    response = scene.post({**ORDER, "n": 2, "prompt": PROMPT})
    assert response.status_code == 200
    span = scene.span_of(response)
    (charge,) = [row for row in scene.gateway.charges() if row["request_id"] == response.headers["x-beanmeter-request-id"]]
    assert (span.name, span.kind, span.status) == ("generate_content gpt-image-2", 3, 0)
    assert span.attributes == {
        "gen_ai.operation.name": "generate_content",
        "gen_ai.provider.name": "beansai",
        "gen_ai.output.type": "image",
        "gen_ai.request.model": "gpt-image-2",
        "gen_ai.request.choice.count": 2,
        "gen_ai.usage.input_tokens": 7,
        "gen_ai.usage.output_tokens": 900,
        "server.address": "127.0.0.1",
        "server.port": scene.upstream.port,
        "http.response.status_code": 200,
        "beanmeter.request_id": charge["request_id"],
        "beanmeter.upstream_request_id": "up-1",
        "beanmeter.team": "red",
        "beanmeter.key_id": scene.gateway.key_id,
        "beanmeter.operation": "generation",
        "beanmeter.size": "1024x1024",
        "beanmeter.quality": "high",
        "beanmeter.images_requested": 2,
        "beanmeter.images_delivered": 2,
        "beanmeter.outcome": "settled",
        "beanmeter.reason": "delivered",
        "beanmeter.hold_micro_usd": 2 * PRICE_MICRO_USD,
        "beanmeter.settled_micro_usd": charge["settled_micro_usd"],
        "beanmeter.reserved_micro_usd": 0,
    }
    assert span.resource["service.name"] == "images"


ENDS = [
    (
        "an edit",
        "/images/edits",
        EDIT,
        whole(200, JSON, json_answer(size="1024x1024")),
        {"beanmeter.operation": "edit", **ALL_WELL},
    ),
    (
        "streamed",
        "/images/generations",
        {**ORDER, "stream": True},
        chunked(200, SSE, [event("image_generation.partial_image", b64_json="aQ=="), completed(size="1024x1024")]),
        {"gen_ai.request.stream": True, "beanmeter.settled_micro_usd": PRICE_MICRO_USD, **ALL_WELL},
    ),
    (
        "dearer than it can be",
        "/images/generations",
        {**ORDER, "size": "auto", "quality": "auto"},
        whole(200, JSON, json_answer(size="1024x1024", quality="low")),
        {"beanmeter.size": "1024x1024", "beanmeter.quality": "low", **ALL_WELL},
    ),
    (
        "fewer than asked",
        "/images/generations",
        {**ORDER, "n": 2},
        whole(200, JSON, json_answer(1, size="1024x1024")),
        {"beanmeter.images_delivered": 1, "beanmeter.reason": "delivered_fewer", **ALL_WELL},
    ),
    (
        "refused upstream",
        "/images/generations",
        ORDER,
        whole(400, JSON, b'{"error": {"message": "%s"}}' % PROMPT.encode()),
        {"status": 2, "error.type": "400", "http.response.status_code": 400, "beanmeter.outcome": "released"},
    ),
    (
        "failed upstream",
        "/images/generations",
        ORDER,
        whole(500, JSON, b'{"error": {"message": "%s"}}' % PROMPT.encode()),
        {"status": 2, "error.type": "500", "beanmeter.outcome": "released", "beanmeter.settled_micro_usd": 0},
    ),
    (
        "an error in a stream",
        "/images/generations",
        {**ORDER, "stream": True},
        chunked(200, SSE, [event("error", error={"message": PROMPT})]),
        {"status": 2, "error.type": "failed_upstream", "http.response.status_code": 200},
    ),
    (
        "not understood",
        "/images/generations",
        ORDER,
        whole(200, [("Content-Type", "text/html")], PROMPT.encode()),
        {
            "status": 2,
            "error.type": "not_understood",
            "beanmeter.outcome": "review",
            "beanmeter.reserved_micro_usd": PRICE_MICRO_USD,
        },
    ),
    (
        "the organisation's key refused",
        "/images/generations",
        ORDER,
        whole(401, JSON, b'{"error": {"message": "%s"}}' % UPSTREAM_KEY.encode()),
        {"status": 2, "error.type": "401", "http.response.status_code": 401},
    ),
]


@pytest.mark.parametrize(("path", "order", "answer", "expected"), [end[1:] for end in ENDS], ids=[end[0] for end in ENDS])
def test_how_an_exchange_ends(scene: Scene, path: str, order: dict[str, Any], answer: bytes, expected: dict[str, Any]) -> None:
    scene.upstream.answer(answer)
    span = scene.span_of(scene.post({**order, "prompt": PROMPT}, path))
    found = {"status": span.status, **span.attributes}
    assert {name: found.get(name) for name in expected} == expected
    assert span.name == "generate_content gpt-image-2"


def test_an_answer_that_never_begins_is_an_error(scene: Scene) -> None:
    async def reset(conversation: Conversation) -> None:
        await conversation.reset()

    scene.upstream.script = reset
    response = scene.post(ORDER)
    assert response.json()["error"]["code"] == "upstream_failed"
    span = scene.span_of(response)
    assert (span.status, span.attributes["error.type"], span.attributes["beanmeter.outcome"]) == (2, "no_answer", "review")
    assert "http.response.status_code" not in span.attributes


@pytest.mark.parametrize(
    ("changes", "key", "code", "status", "name"),
    [
        ({}, "sk-bm-nobodys", "invalid_api_key", 401, "generate_content"),
        ({"size": PROMPT}, None, "invalid_value", 400, "generate_content"),
        ({"model": PROMPT}, None, "model_not_found", 404, "generate_content"),
        ({"n": 10}, None, "insufficient_quota", 429, "generate_content gpt-image-2"),
    ],
)
def test_a_refusal_is_a_span_too(
    scene: Scene, changes: dict[str, Any], key: str | None, code: str, status: int, name: str
) -> None:
    _, poor = scene.gateway.add_team(f"poor-{code}")
    scene.gateway.set_budget(PRICE_MICRO_USD, team=f"poor-{code}")
    before = len(scene.upstream.requests)
    response = scene.post({**ORDER, **changes}, headers={"authorization": f"Bearer {key or poor}"})
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    span = scene.span_of(response)
    assert (span.name, span.status) == (name, 2)
    assert (span.attributes["error.type"], span.attributes["http.response.status_code"]) == (code, status)
    assert span.attributes.get("beanmeter.team") == (None if key else f"poor-{code}")
    assert "beanmeter.outcome" not in span.attributes
    assert len(scene.upstream.requests) == before


def test_a_client_that_leaves_has_one_span_with_what_was_made(scene: Scene) -> None:
    began, go_on = threading.Event(), threading.Event()
    beginning = chunked(200, SSE, [event("image_generation.partial_image", b64_json="aQ==")], end=False)
    ending = chunked(200, SSE, [completed(size="1024x1024", quality="high")]).partition(b"\r\n\r\n")[2]

    async def script(conversation: Conversation) -> None:
        await conversation.write(beginning)
        began.set()
        assert await asyncio.to_thread(go_on.wait, PATIENCE_SECONDS)
        await conversation.write(ending)

    scene.upstream.script = script
    before = {span.span_id for span in scene.receiver.spans()}
    body = json.dumps({**ORDER, "stream": True, "prompt": PROMPT}).encode()
    with scene.gateway.connect() as client:
        client.sendall(request("POST", GENERATIONS, [JSON_TYPE], body, scene.gateway.key))
        assert began.wait(PATIENCE_SECONDS)
    go_on.set()
    (span,) = wait_for(lambda: [span for span in scene.receiver.spans() if span.span_id not in before] or None)
    assert (span.status, span.attributes["beanmeter.outcome"]) == (0, "settled")
    assert span.attributes["beanmeter.settled_micro_usd"] == PRICE_MICRO_USD


def test_an_upload_that_breaks_off_is_a_span(scene: Scene) -> None:
    before = {span.span_id for span in scene.receiver.spans()}
    with scene.gateway.connect() as client:
        client.sendall(request("POST", GENERATIONS, [JSON_TYPE], json.dumps(ORDER).encode(), scene.gateway.key)[:-9])
        client.shutdown(socket.SHUT_RDWR)
    (span,) = wait_for(lambda: [span for span in scene.receiver.spans() if span.span_id not in before] or None)
    assert (span.status, span.attributes["error.type"]) == (2, "incomplete_body")


# Parents


def test_the_callers_span_is_the_parent_and_ours_that_of_the_upstream(scene: Scene) -> None:
    response = scene.post(ORDER, headers={"traceparent": PARENT, "tracestate": "vendor=t61rcWkgMzE", "baggage": "a=1"})
    span = scene.span_of(response)
    assert (span.trace_id, span.parent, span.state) == (TRACE_ID, SPAN_ID, "vendor=t61rcWkgMzE")
    assert sorted(scene.passed_on("traceparent", "tracestate", "baggage")) == [
        ("baggage", "a=1"),
        ("traceparent", f"00-{TRACE_ID}-{span.span_id}-01"),
        ("tracestate", "vendor=t61rcWkgMzE"),
    ]


def test_without_a_parent_a_trace_begins_here(scene: Scene) -> None:
    span = scene.span_of(scene.post(ORDER))
    assert span.parent == ""
    assert [(name, value[:52]) for name, value in scene.passed_on("traceparent")] == [
        ("traceparent", f"00-{span.trace_id}-{span.span_id}")
    ]


def test_what_the_caller_does_not_sample_is_not_told_and_passed_on_so(scene: Scene) -> None:
    unsampled = scene.post(ORDER, headers={"traceparent": PARENT[:-2] + "00"}).headers["x-beanmeter-request-id"]
    ((_, passed),) = scene.passed_on("traceparent")
    assert passed.startswith(f"00-{TRACE_ID}-")
    assert passed.endswith("-00")
    assert passed.split("-")[2] != SPAN_ID
    scene.span_of(scene.post(ORDER))  # It would be here before this one.
    assert unsampled not in [span.attributes["beanmeter.request_id"] for span in scene.receiver.spans()]


@pytest.mark.parametrize(
    "headers",
    [
        [("traceparent", "")],
        [("traceparent", "banana")],
        [("traceparent", PARENT.upper())],
        [("traceparent", f"00-{'0' * 32}-{SPAN_ID}-01")],
        [("traceparent", f"00-{TRACE_ID}-{'0' * 16}-01")],
        [("traceparent", f"ff-{TRACE_ID}-{SPAN_ID}-01")],
        [("traceparent", PARENT + "-more")],
        [("traceparent", "00" + PARENT)],
        [("traceparent", PARENT + "-" + "x" * 5_000)],
        [("traceparent", "cc" + PARENT[2:] + "-" + "x" * 5_000)],
        [("traceparent", "\xe9\xff" * 20)],
        [("traceparent", PARENT), ("traceparent", PARENT)],
    ],
    ids=lambda headers: headers[0][1][:24],
)
def test_a_parent_that_is_none_is_passed_over(scene: Scene, headers: list[tuple[str, str]]) -> None:
    body = json.dumps(ORDER).encode()
    sent = request("POST", GENERATIONS, [JSON_TYPE, *headers, ("tracestate", "vendor=1")], body, scene.gateway.key)
    with scene.gateway.connect() as client:
        client.sendall(sent)
        answer = http.client.HTTPResponse(client)
        answer.begin()
        assert answer.status == 200
        span = scene.receiver.span_of(answer.headers["x-beanmeter-request-id"])
    assert (span.parent, span.state) == ("", "")
    assert span.trace_id != TRACE_ID
    (only,) = scene.passed_on("traceparent", "tracestate")
    assert only[1].startswith(f"00-{span.trace_id}-{span.span_id}-")


@pytest.mark.parametrize(
    "state", ["a=1,a=2", "vendor=" + "x" * 5_000, "=", "\xe9=\xff", ",".join(f"v{n}=1" for n in range(99))]
)
def test_a_state_that_is_none_is_left_out(scene: Scene, state: str) -> None:
    body = json.dumps(ORDER).encode()
    sent = request("POST", GENERATIONS, [JSON_TYPE, ("traceparent", PARENT), ("tracestate", state)], body, scene.gateway.key)
    with scene.gateway.connect() as client:
        client.sendall(sent)
        answer = http.client.HTTPResponse(client)
        answer.begin()
        assert answer.status == 200
        span = scene.receiver.span_of(answer.headers["x-beanmeter-request-id"])
    assert (span.trace_id, span.parent) == (TRACE_ID, SPAN_ID)
    assert [value for _, value in scene.passed_on("traceparent")] == [f"00-{TRACE_ID}-{span.span_id}-01"]
    assert ("tracestate", state) not in scene.passed_on("tracestate")


def test_without_traces_the_callers_headers_pass_as_they_are(tmp_path: Path) -> None:
    given = {"traceparent": "banana", "tracestate": "a=1,a=2"}
    with live_gateway(f"sqlite:///{tmp_path / 'beanmeter.db'}", tmp_path) as (gateway, upstream):
        assert gateway.client.post("/images/generations", json=ORDER, headers=given).status_code == 200
        (arrived,) = upstream.requests
    assert {name: value for name, value in arrived.headers if name in given} == given


# What a span never says


def test_no_prompt_key_or_name_of_a_file_is_told(scene: Scene) -> None:
    secrets = {"authorization": f"Bearer {scene.gateway.key}", "cookie": "session=my-cookie", "x-canary": "my-header"}
    form = {**ORDER, "prompt": PROMPT, "user": "my-user"}
    answers = [
        whole(200, JSON, json_answer(size="1024x1024", revised_prompt=PROMPT)),
        whole(400, [*JSON, ("set-cookie", "my-cookie"), ("x-request-id", PROMPT)], json.dumps({"error": PROMPT}).encode()),
        whole(200, SSE, completed(size="1024x1024", revised_prompt=PROMPT)),
    ]
    for answer in answers:
        scene.upstream.answer(answer)
        scene.span_of(scene.post(form, headers=secrets))
        query = "?api-key=my-query"
        files = {"image": (FILE, b"\x89PNG my-picture", "image/png")}
        scene.span_of(scene.gateway.client.post("/images/edits" + query, data=form, files=files, headers=secrets))
    seen = b"".join(scene.receiver.posts)
    canaries = [
        PROMPT,
        "grandmother",
        FILE,
        scene.gateway.key,
        UPSTREAM_KEY,
        *["my-user", "my-cookie", "my-header", "my-query", "my-picture"],
    ]
    assert [canary for canary in canaries if canary.encode() in seen] == []
    assert scene.gateway.key_id.encode() in seen


# Receivers that are away, gateways that end


def lines_of(logs: Sequence[Any], name: str) -> list[Any]:
    return [line for line in logs if line["event"] == name]


def test_a_log_line_leads_to_its_span(scene: Scene) -> None:
    with capture_logs() as logs:
        answered = scene.span_of(scene.post(ORDER))
        refused = scene.span_of(scene.post({**ORDER, "size": "1x1"}))
    ids = [(line["trace_id"], line["span_id"]) for line in [*lines_of(logs, "exchange"), *lines_of(logs, "refused")]]
    assert ids == [(answered.trace_id, answered.span_id), (refused.trace_id, refused.span_id)]


@contextmanager
def nobody_listens() -> Iterator[str]:
    """Connections are refused."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{held.getsockname()[1]}"


@contextmanager
def nobody_answers() -> Iterator[str]:
    """Connections are taken, and nothing ever comes."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.parametrize("away", [nobody_listens, nobody_answers])
def test_a_receiver_that_is_away_is_no_reason_to_wait(away: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spans, "FLUSH_SECONDS", 0.2)
    few = {"OTEL_BSP_SCHEDULE_DELAY": "1", "OTEL_BSP_MAX_QUEUE_SIZE": "4", "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "1"}
    with away() as url, capture_logs() as logs:
        with playing(tmp_path, OTEL_EXPORTER_OTLP_ENDPOINT=url, OTEL_EXPORTER_OTLP_TIMEOUT="1", **few) as scene:
            answers = [scene.post(ORDER) for _ in range(20)]
            assert [answer.status_code for answer in answers] == [200] * 20
            charges = scene.gateway.charges()
            assert [(row["state"], row["settled_micro_usd"]) for row in charges] == [("settled", PRICE_MICRO_USD)] * 20
            # There is something to be said, and it is said once.
            wait_for(lambda: lines_of(logs, "traces_troubled") or None)
            assert scene.receiver.posts == []
        assert len(lines_of(logs, "traces_troubled")) == 1


def test_the_last_spans_arrive_before_a_gateway_ends(tmp_path: Path) -> None:
    """Without its end, the next look at the queue would be in a minute."""
    with Receiver() as receiver:
        with playing(tmp_path, OTEL_EXPORTER_OTLP_ENDPOINT=receiver.url, OTEL_BSP_SCHEDULE_DELAY="60000") as scene:
            answers = [scene.post(ORDER) for _ in range(3)]
            assert receiver.spans() == []
        told_of = [span.attributes["beanmeter.request_id"] for span in receiver.spans()]
    assert sorted(told_of) == sorted(answer.headers["x-beanmeter-request-id"] for answer in answers)


def test_several_workers_tell_one_span_an_exchange_through_new_settings_and_the_end(tmp_path: Path) -> None:
    with (
        Receiver() as receiver,
        live_gateway(f"sqlite:///{tmp_path / 'beanmeter.db'}", tmp_path) as (other, upstream),
    ):
        environ = {
            "BEANMETER_UPSTREAM_URL": upstream.base_url,
            "BEANMETER_UPSTREAM_KEY": UPSTREAM_KEY,
            "BEANMETER_DATABASE_URL": other.database_url,
            "BEANMETER_WORKERS": "2",
            "BEANMETER_PORT": "0",
            "BEANMETER_STATE_DIR": str(tmp_path / "var"),
            **TRACES,
            "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url,
            "OTEL_BSP_SCHEDULE_DELAY": "60000",
        }
        served = Served(environ, tmp_path, other.key)
        try:
            served.wait_until_ready()
            asked = [ask_anew(served) for _ in range(6)]
            served.tell(signal.SIGHUP)
            wait_for(lambda: served.events("settings_renewed") or None)
            asked += [ask_anew(served) for _ in range(6)]
            served.tell(signal.SIGTERM)
            assert served.status() == 0
            served.wait_until_all_ended()
        finally:
            served.close()
        found = receiver.spans()
        lines = {line["request_id"]: (line["trace_id"], line["span_id"]) for line in served.events("exchange")}
    assert sorted(span.attributes["beanmeter.request_id"] for span in found) == sorted(asked)
    assert {span.attributes["beanmeter.request_id"]: (span.trace_id, span.span_id) for span in found} == lines
    assert {span.resource["service.name"] for span in found} == {"beanmeter"}
    assert not served.events("traces_troubled")


def ask_anew(served: Served) -> str:
    """One request over a connection of its own, so that any worker may have it; its id."""
    response = httpx2.post(
        f"{served.base_url}/images/generations",
        json=ORDER,
        headers={"authorization": served.client.headers["authorization"]},
        timeout=PATIENCE_SECONDS,
        trust_env=False,
    )
    assert response.status_code == 200
    request_id: str = response.headers["x-beanmeter-request-id"]
    return request_id


# The setting


def test_the_sdks_own_switch_turns_it_off(tmp_path: Path) -> None:
    with playing(tmp_path, OTEL_SDK_DISABLED="true") as scene:
        assert scene.post(ORDER, headers={"traceparent": "banana"}).status_code == 200
        assert scene.passed_on("traceparent") == [("traceparent", "banana")]
    assert scene.receiver.posts == []


def test_traces_without_the_extra_are_an_error_that_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http", None)
    with pytest.raises(SettingsError, match=r"BEANMETER_TRACES = 'true': .*-r requirements-full.txt"):
        load(TRACES, tmp_path)
    load({"BEANMETER_TRACES": "false"}, tmp_path)


@pytest.mark.parametrize("value", ["yes", "1", "True", "", "on"])
def test_the_setting_is_true_or_false(value: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="BEANMETER_TRACES"):
        load({"BEANMETER_TRACES": value}, tmp_path)


def test_a_variable_that_the_sdk_does_not_take_is_an_error_of_one_line(tmp_path: Path) -> None:
    with environment(OTEL_BSP_MAX_QUEUE_SIZE="-1"), pytest.raises(SettingsError, match=r"OTEL_.*max_queue_size"):
        check_tracing(load(TRACES, tmp_path))


def test_such_a_variable_ends_the_start_with_several_workers_before_any_of_them(tmp_path: Path) -> None:
    settings = {**os.environ, **TRACES, "BEANMETER_UPSTREAM_KEY": "sk-beans-x", "OTEL_BSP_MAX_QUEUE_SIZE": "-1"}
    for command in (["serve", "--workers", "2", "--port", "0"], ["doctor"]):
        ran = subprocess.run(
            [sys.executable, "-m", "proxy.cli", *command],
            env=settings,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
        )
        assert ran.returncode == 3
        assert "OTEL_" in ran.stderr
        assert "Traceback" not in ran.stderr


def test_who_does_not_ask_for_traces_does_not_load_them() -> None:
    look = "import sys, proxy.worker, proxy.demo; print([name for name in sys.modules if 'opentelemetry' in name])"
    ran = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=True)
    assert ran.stdout.strip() == "[]"
