"""The simulated BeansAI's refusals in OpenAI's envelope. Its wording may live only here, and nothing of the gateway's does."""

from __future__ import annotations

import json


class Fault(Exception):
    """A request that the simulator answers with ``status`` and ``{"error": {"message", "type", "param", "code"}}``."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.error = {"message": message, "type": type, "param": param, "code": code}

    @property
    def body(self) -> bytes:
        return json.dumps({"error": self.error}).encode()


def wrong_key(key: str) -> Fault:
    """The 401 that echoes a part of the key, as OpenAI's does: a gateway must not pass it on."""
    masked = f"{key[:8]}{'*' * 12}{key[-4:]}" if len(key) > 16 else "*" * len(key)
    return Fault(
        401,
        f"Incorrect API key provided: {masked}. You can find your API key in the console.",
        code="invalid_api_key",
    )


def ordered_fault(status: int, key: str) -> Fault:
    """The error that the directive ``error=STATUS`` asks for, worded as its real counterpart is."""
    if status == 400:
        return Fault(
            400,
            "Your request was rejected by the safety system. safety_violations=[simulated].",
            type="image_generation_user_error",
            code="moderation_blocked",
        )
    if status == 401:
        return wrong_key(key)
    if status == 429:
        return Fault(
            429, "Rate limit reached for images per minute. Try again in 1s.", type="requests", code="rate_limit_exceeded"
        )
    if status >= 500:
        return Fault(status, "The server had an error while processing your request. Sorry about that!", type="server_error")
    return Fault(status, f"A simulated answer with status {status}.", code="simulated")
