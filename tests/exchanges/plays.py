"""What the upstream plays: answers that end as they are framed, and answers that break."""

from __future__ import annotations

from dataclasses import dataclass

from tests.live import Conversation, chunked, completed, event, until_closed, whole

Headers = list[tuple[str, str]]


@dataclass(frozen=True)
class Play:
    """A script: bytes on the wire, and what becomes of the connection after them."""

    wire: bytes
    ending: str = "keep"

    async def __call__(self, conversation: Conversation) -> None:
        await conversation.write(self.wire)
        if self.ending == "close":
            await conversation.close()
        elif self.ending == "reset":
            await conversation.reset()


def framed(framing: str, headers: Headers, body: bytes, status: int = 200) -> Play:
    """An answer that ends properly, as far as its framing can tell."""
    if framing == "length":
        return Play(whole(status, headers, body))
    if framing == "chunked":
        return Play(chunked(status, headers, [body] if body else []))
    return Play(until_closed(status, headers, body), "close")


def broken(manner: str, headers: Headers, body: bytes, status: int = 200) -> Play:
    """An answer whose transfer ends before its time: one byte short of its length, without its last chunk, or by a reset."""
    if manner == "short":
        return Play(whole(status, headers, body + b"!")[:-1], "close")
    return Play(chunked(status, headers, [body] if body else [], end=False), {"unfinished": "close", "reset": "reset"}[manner])


PREVIEW = event("image_generation.partial_image", b64_json="cHJldmlldw==", partial_image_index=0)
IMAGE = completed()
DONE = b"data: [DONE]\n\n"
