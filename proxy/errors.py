"""Every refusal that a caller can meet, once: its status, type, code and wording. Statuses may be decided only here.

Refusal
+-- InvalidApiKey              401  no key, malformed, unknown, revoked, expired, team archived: one text
+-- UnknownUrl                 404  a path that is not priced
+-- MethodNotAllowed           405  another method on a path of ours
+-- UnsupportedMediaType       415  another content type, or a content encoding
+-- RequestTooLarge            413  a body over the limit
+-- RequestTimeout             408  the request came too slowly
+-- UrlTooLong                 414
+-- HeadTooLarge               431  too many headers, or too large
+-- BadRequest                 400
|   +-- Unreadable                  not HTTP/1.1, or a head that two readers could take in two ways
|   +-- InvalidJson
|   +-- InvalidMultipart
|   +-- IncompleteBody              the client's body ended before its declared end
|   +-- DuplicateParameter          a field that sets the price, twice
|   +-- MissingRequiredParameter
|   +-- InvalidValue
+-- ModelNotFound              404
+-- InsufficientQuota          429  over a hard budget
+-- RateLimitExceeded          429  over a request rate or concurrency limit
+-- IdempotencyKeyInUse        409  the first request with this idempotency key is still going on
+-- IdempotencyKeyReused       409  it has ended, and was paid for
+-- IdempotencyKeyMismatch     422  it was another request
+-- LedgerUnavailable          503  nothing was held, nothing was sent
+-- StorageUnavailable         503  no room to keep the body while it is read; nothing was sent
+-- UpstreamUnreachable        502  no connection; nothing was sent
+-- UpstreamCredentials        502  the upstream refused the organisation's own key
+-- UpstreamFailed             502  sent, and no answer began: what it cost is not known yet
"""

from __future__ import annotations

import json
from typing import ClassVar

SOURCE_HEADER = (b"x-beanmeter-error-source", b"gateway")

NO_RETRY = (b"x-should-retry", b"false")


class Refusal(Exception):
    """An answer of the gateway's own, in OpenAI's error envelope.

    ``param`` names the field at fault, ``None`` where no field is. ``headers`` are the refusal's
    own; the edge adds the request id and :data:`SOURCE_HEADER`.
    """

    status: ClassVar[int]
    type: ClassVar[str] = "invalid_request_error"
    code: ClassVar[str]

    def __init__(self, message: str, *, param: str | None = None, headers: tuple[tuple[bytes, bytes], ...] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.headers = headers

    def body(self) -> bytes:
        """The JSON envelope: ``{"error": {"message", "type", "param", "code"}}``, ASCII only."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return json.dumps({"error": error}).encode("ascii")


class InvalidApiKey(Refusal):
    status = 401
    code = "invalid_api_key"

    def __init__(self) -> None:
        # One text for every cause: a caller without a valid key learns nothing about keys or teams.
        super().__init__(
            "Incorrect API key provided. Send a Beanmeter team key as 'Authorization: Bearer sk-bm-...'; "
            "the operator makes one with 'beanmeter key add TEAM'.",
            headers=((b"www-authenticate", b"Bearer"),),
        )


class UnknownUrl(Refusal):
    status = 404
    code = "unknown_url"

    def __init__(self) -> None:
        super().__init__(
            "Unknown URL. This gateway serves POST /v1/images/generations, POST /v1/images/edits, "
            "GET /v1/models and GET /v1/budget, spelled exactly so; what is not priced is not relayed."
        )


class MethodNotAllowed(Refusal):
    status = 405
    code = "method_not_allowed"

    def __init__(self, allow: str) -> None:
        super().__init__(f"This URL takes {allow} only.", headers=((b"allow", allow.encode("ascii")),))


class UnsupportedMediaType(Refusal):
    status = 415
    code = "unsupported_media_type"


class RequestTooLarge(Refusal):
    status = 413
    code = "request_too_large"

    def __init__(self, limit_bytes: int) -> None:
        super().__init__(
            f"The request body is larger than this gateway's limit of {limit_bytes} bytes. Send smaller or fewer "
            "reference images, or ask the operator to raise BEANMETER_MAX_BODY_BYTES."
        )


class BadRequest(Refusal):
    status = 400


class Unreadable(BadRequest):
    code = "bad_request"


class RequestTimeout(Refusal):
    status = 408
    code = "request_timeout"

    def __init__(self) -> None:
        super().__init__("The request came too slowly, and the gateway waits no longer. Nothing was sent upstream.")


class UrlTooLong(Refusal):
    status = 414
    code = "url_too_long"

    def __init__(self, limit_bytes: int) -> None:
        super().__init__(f"The URL is longer than {limit_bytes} bytes. What an order says belongs in its body.")


class HeadTooLarge(Refusal):
    status = 431
    code = "headers_too_large"

    def __init__(self, limit_bytes: int, limit_fields: int) -> None:
        super().__init__(f"The head of the request is larger than {limit_bytes} bytes or {limit_fields} fields. Send fewer.")


class InvalidJson(BadRequest):
    code = "invalid_json"


class InvalidMultipart(BadRequest):
    code = "invalid_multipart"


class IncompleteBody(BadRequest):
    code = "incomplete_body"

    def __init__(self) -> None:
        super().__init__("The connection ended before the whole request body had arrived. Nothing was sent upstream.")


class DuplicateParameter(BadRequest):
    code = "duplicate_parameter"

    def __init__(self, param: str) -> None:
        super().__init__(
            f"'{param}' is given more than once, so two readers could price this request differently. Give it once.",
            param=param,
        )


class MissingRequiredParameter(BadRequest):
    code = "missing_required_parameter"

    def __init__(self, param: str) -> None:
        super().__init__(f"Missing required parameter: '{param}'.", param=param)


class InvalidValue(BadRequest):
    code = "invalid_value"

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message, param=param)


class ModelNotFound(Refusal):
    status = 404
    code = "model_not_found"

    def __init__(self, message: str) -> None:
        super().__init__(message, param="model")


class InsufficientQuota(Refusal):
    status = 429
    type = "insufficient_quota"
    code = "insufficient_quota"

    def __init__(self, message: str) -> None:
        # No Retry-After: the SDKs would wait and ask again, and the answer would be the same.
        super().__init__(message, headers=(NO_RETRY,))


class RateLimitExceeded(Refusal):
    status = 429
    type = "requests"
    code = "rate_limit_exceeded"

    def __init__(self, message: str, retry_after_seconds: int) -> None:
        # Some SDKs ignore a Retry-After above 60, others obey it without end.
        seconds = max(1, min(60, retry_after_seconds))
        super().__init__(message, headers=((b"retry-after", b"%d" % seconds),))


class IdempotencyKeyInUse(Refusal):
    status = 409
    code = "idempotency_key_in_use"

    def __init__(self, first_request_id: str) -> None:
        super().__init__(
            f"Request {first_request_id} has the same Idempotency-Key and is still going on. Wait for its answer.",
            param="Idempotency-Key",
            headers=((b"retry-after", b"5"),),
        )


class IdempotencyKeyReused(Refusal):
    status = 409
    code = "idempotency_key_reused"

    def __init__(self, first_request_id: str, cost: str) -> None:
        super().__init__(
            f"This Idempotency-Key was used by request {first_request_id}, which cost ${cost}. Nothing was sent again, and "
            "its answer is not kept. To have another image made, send the request with another key.",
            param="Idempotency-Key",
            headers=(NO_RETRY,),
        )


class IdempotencyKeyMismatch(Refusal):
    status = 422
    code = "idempotency_key_mismatch"

    def __init__(self, first_request_id: str) -> None:
        super().__init__(
            f"This Idempotency-Key was used by request {first_request_id} with another body. Use one key for one request; "
            "a form that is sent again has to have the same boundary.",
            param="Idempotency-Key",
        )


class LedgerUnavailable(Refusal):
    status = 503
    type = "server_error"
    code = "ledger_unavailable"

    def __init__(self, why: str = "The ledger can't be reached, so this request could not be held against the budget") -> None:
        super().__init__(
            f"{why}; nothing was sent upstream. Try again in a few seconds.",
            headers=((b"retry-after", b"5"),),
        )


class StorageUnavailable(Refusal):
    status = 503
    type = "server_error"
    code = "storage_unavailable"

    def __init__(self) -> None:
        super().__init__(
            "The gateway has no room on disk to hold this request body while it is read; nothing was sent upstream. "
            "Try again, and tell the operator if it goes on.",
            headers=((b"retry-after", b"5"),),
        )


class UpstreamUnreachable(Refusal):
    status = 502
    type = "server_error"
    code = "upstream_unreachable"

    def __init__(self) -> None:
        super().__init__(
            "The image service can't be reached; nothing was sent and nothing was charged. Try again in a few seconds."
        )


class UpstreamCredentials(Refusal):
    status = 502
    type = "server_error"
    code = "upstream_credentials"

    def __init__(self) -> None:
        super().__init__(
            "The image service refused the organisation's own key; nothing was charged. "
            "Tell the operator to check BEANMETER_UPSTREAM_KEY.",
            headers=(NO_RETRY,),
        )


class UpstreamFailed(Refusal):
    status = 502
    type = "server_error"
    code = "upstream_failed"

    def __init__(self) -> None:
        # Not to be retried by an SDK: the image may have been made and billed.
        super().__init__(
            "The image service broke off before it answered, and may have made and billed the image all the same. "
            "The amount stays held until an operator has looked at it.",
            headers=(NO_RETRY,),
        )
