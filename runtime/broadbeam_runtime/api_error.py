"""The one error that handlers raise, in OpenAI's shape."""

from __future__ import annotations

from typing import Any


class ApiError(Exception):
    """A request that is answered with an error: HTTP status, message, and OpenAI's `param` and `code`."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code

    def body(self) -> dict[str, Any]:
        kinds = {400: "invalid_request_error", 404: "invalid_request_error", 413: "invalid_request_error"}
        kind = kinds.get(self.status, "service_unavailable" if self.status == 503 else "server_error")
        if self.status == 405:
            kind = "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}
