"""What a client is told when something is wrong: one exception per cause, one table to HTTP statuses.

RequestError
 ├─ MalformedHttp, HeadersTooLarge, BodyTooLarge, RequestTimeout   the connection cannot go on after these
 ├─ InvalidRequest, Unauthorized, ModelNotFound, NotFound, MethodNotAllowed
 ├─ TooManyRequests, Draining, NoEndpoint
 └─ EngineFailed, EngineTimeout, StreamBroken
"""

# ruff: noqa: N818  (a cause reads better without Error behind it, and the root's name says what it is)
from __future__ import annotations

from dataclasses import dataclass

import msgspec


class RequestError(Exception):
    """`param` is the request field or header at fault, as OpenAI's errors name it."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class MalformedHttp(RequestError):
    pass


class HeadersTooLarge(RequestError):
    pass


class BodyTooLarge(RequestError):
    pass


class RequestTimeout(RequestError):
    pass


class InvalidRequest(RequestError):
    pass


class Unauthorized(RequestError):
    pass


class ModelNotFound(RequestError):
    pass


class NotFound(RequestError):
    pass


class MethodNotAllowed(RequestError):
    pass


class TooManyRequests(RequestError):
    pass


class Draining(RequestError):
    pass


class NoEndpoint(RequestError):
    pass


class EngineFailed(RequestError):
    pass


class EngineTimeout(RequestError):
    pass


class StreamBroken(RequestError):
    """The engine's stream ended early, after the client had received a part of it."""


class InternalError(RequestError):
    pass


@dataclass(frozen=True, slots=True)
class Shape:
    """How an error looks on the wire; `headers` are whole lines."""

    status: int
    type: str
    code: str | None = None
    headers: bytes = b""


INVALID = "invalid_request_error"
SHAPES: dict[type[RequestError], Shape] = {
    MalformedHttp: Shape(400, INVALID, "malformed_http"),
    InvalidRequest: Shape(400, INVALID),
    Unauthorized: Shape(401, INVALID, "invalid_api_key", b'WWW-Authenticate: Bearer realm="broadbeam"\r\n'),
    ModelNotFound: Shape(404, INVALID, "model_not_found"),
    NotFound: Shape(404, INVALID, "not_found"),
    MethodNotAllowed: Shape(405, INVALID, "method_not_allowed"),
    RequestTimeout: Shape(408, INVALID, "request_timeout"),
    BodyTooLarge: Shape(413, INVALID, "body_too_large"),
    TooManyRequests: Shape(429, "rate_limit_error", "too_many_requests", b"Retry-After: 1\r\n"),
    HeadersTooLarge: Shape(431, INVALID, "headers_too_large"),
    InternalError: Shape(500, "api_error", "internal_error"),
    EngineFailed: Shape(502, "api_error", "engine_failed"),
    StreamBroken: Shape(502, "api_error", "stream_broken"),
    Draining: Shape(503, "api_error", "draining", b"Retry-After: 1\r\n"),
    NoEndpoint: Shape(503, "api_error", "no_engine_ready", b"Retry-After: 1\r\n"),
    EngineTimeout: Shape(504, "api_error", "engine_timeout"),
}


def error_body(error: RequestError) -> bytes:
    """OpenAI's error object as JSON."""
    shape = SHAPES[type(error)]
    fields = {"message": error.message, "type": shape.type, "param": error.param, "code": shape.code}
    return msgspec.json.encode({"error": fields})
