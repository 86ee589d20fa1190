"""The gateway's answers to a request it cannot serve, in the error format of the OpenAI API.

::

    {"error": {"message": "...", "type": "invalid_request_error", "param": "temperature", "code": null}}

One place maps every error of the layers below to a status (``to_api_error``), so that each dialect answers alike.
"""

from __future__ import annotations

import msgspec

from atropos_verl.errors import EngineError, EngineStoppedError, GenerationRequestError

__all__ = ["ApiError", "to_api_error"]

_TYPE_OF_STATUS = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    500: "internal_server_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


class ApiError(Exception):
    """A request that is answered with an error status.

    ``param`` is the offending field of the body (``"sampling_params.top_p"``), ``code`` a short machine-readable
    reason (``"context_length_exceeded"``); both may be None.
    """

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code

    def body(self) -> bytes:
        """The JSON body, UTF-8."""
        error = {
            "message": self.message,
            "type": _TYPE_OF_STATUS.get(self.status, "api_error"),
            "param": self.param,
            "code": self.code,
        }
        return msgspec.json.encode({"error": error})


def to_api_error(error: Exception) -> ApiError:
    """Status and message for an error raised while a request was served.

    The engine's own errors keep their text. Anything else is a fault of this server: the client learns its type only
    (the caller logs the traceback).
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, GenerationRequestError):
        return ApiError(400, str(error), param=error.param)
    if isinstance(error, EngineStoppedError):
        return ApiError(503, f"the inference engine has stopped: {error}", code="engine_stopped")
    if isinstance(error, EngineError):
        return ApiError(500, f"the inference engine failed: {error}", code="engine_error")
    if isinstance(error, TimeoutError):
        return ApiError(504, f"the request timed out: {error}", code="timeout")
    return ApiError(500, f"internal error ({type(error).__name__}); the gateway's log has the traceback")
