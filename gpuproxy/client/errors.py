"""What can go wrong for a caller: one exception type for each thing that is to be done about it."""

import copyreg
from typing import Any


class GpuproxyError(Exception):
    """A call that failed; the gateway's own failures carry its error ``code`` and HTTP ``status``.

    ``status`` is 0 and ``code`` is CONNECTION_FAILED, TIMED_OUT or INVALID_ANSWER when no usable answer came.
    ``request_id`` finds the call in the gateway's log, empty when none was told. ``retry_after_s`` is what
    the gateway asked to wait, None if it did not.
    """

    def __init__(
        self, message: str, code: str, status: int = 0, request_id: str = "", retry_after_s: int | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.status = status
        self.request_id = request_id
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        """Return message, code and request id in one line."""
        return f"{self.message} ({self.code}, request {self.request_id or 'unknown'})"

    def __reduce__(self) -> tuple[Any, ...]:
        """Let it be told to another process as it is."""
        return copyreg.__newobj__, (type(self), *self.args), self.__dict__  # type: ignore[attr-defined]


class InvalidRequestError(GpuproxyError):
    """The call itself is wrong; the message says where."""


class AuthenticationError(GpuproxyError):
    """The key is unknown, expired or revoked."""


class InsufficientCreditsError(GpuproxyError):
    """The account has not enough credit."""


class PermissionDeniedError(GpuproxyError):
    """The key may not do this, or the target is forbidden."""


class NotFoundError(GpuproxyError):
    """There is no such thing."""


class ConflictError(GpuproxyError):
    """The thing exists already or is in another state."""


class RateLimitedError(GpuproxyError):
    """A limit is used up; ``retry_after_s`` says for how long."""


class UpstreamError(GpuproxyError):
    """The server behind the gateway could not be reached, broke off or took too long."""


class UnavailableError(GpuproxyError):
    """A part of the gateway is away for the moment; nothing has happened."""


class GatewayFaultError(GpuproxyError):
    """A fault of the gateway."""


class ConnectionFailedError(GpuproxyError):
    """The gateway could not be reached, or the connection broke."""


class TimedOutError(GpuproxyError):
    """No answer in time."""


class InvalidAnswerError(GpuproxyError):
    """Something answered that is not the gateway, or not in its form."""


class InstanceFailedError(GpuproxyError):
    """An instance was rented but does not run, or nothing is heard of it; ``contract_id`` names it."""

    def __init__(self, message: str, code: str, contract_id: str) -> None:
        super().__init__(message, code)
        self.contract_id = contract_id


BY_CODE: dict[str, type[GpuproxyError]] = {
    "CONNECTION_FAILED": ConnectionFailedError,
    "TIMED_OUT": TimedOutError,
    "INVALID_ANSWER": InvalidAnswerError,
    "UPSTREAM_UNREACHABLE": UpstreamError,
    "UPSTREAM_INVALID": UpstreamError,
    "UPSTREAM_TIMEOUT": UpstreamError,
}
BY_STATUS: dict[int, type[GpuproxyError]] = {
    401: AuthenticationError,
    402: InsufficientCreditsError,
    403: PermissionDeniedError,
    404: NotFoundError,
    409: ConflictError,
    429: RateLimitedError,
    503: UnavailableError,
}


def error_type(code: str, status: int = 0) -> type[GpuproxyError]:
    """Return the exception type for a failure."""
    by_class = GatewayFaultError if status >= 500 else InvalidRequestError if status >= 400 else GpuproxyError
    return BY_CODE.get(code) or BY_STATUS.get(status) or by_class


def failed(
    message: str, code: str, status: int = 0, request_id: str = "", retry_after_s: int | None = None
) -> GpuproxyError:
    """Return the exception for a failure, of the type that fits it."""
    return error_type(code, status)(message, code, status, request_id, retry_after_s)


def no_answer(error: Exception, is_timeout: bool) -> GpuproxyError:
    """Return the exception for a call whose connection failed, or on which nothing came in time."""
    if is_timeout:
        return failed(f"no answer in time: {type(error).__name__}", "TIMED_OUT")
    return failed(f"the connection failed: {error or type(error).__name__}", "CONNECTION_FAILED")
