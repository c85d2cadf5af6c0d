"""Every error code a caller can meet, in one table, and the exception that carries one.

The table is the documentation: README lists it, ``/openapi.json`` will quote it, and a test compares.
``source`` says whose fault it is; ``is_retryable`` whether the same call may succeed later unchanged.
"""

from typing import Literal, NamedTuple

Source = Literal["client", "gateway", "upstream"]


class Code(NamedTuple):
    """One row of the table: HTTP status, whose fault, worth a retry, what it means."""

    status: int
    source: Source
    is_retryable: bool
    meaning: str


CODES: dict[str, Code] = {
    "BAD_REQUEST": Code(400, "client", False, "the request is malformed; the message says where"),
    "INVALID_JSON": Code(400, "client", False, "the body is not valid JSON, or a field has the wrong type"),
    "UNKNOWN_PROTOCOL": Code(400, "client", False, "no plugin handles this protocol; the known ones are named"),
    "UNAUTHORIZED": Code(401, "client", False, "no credential, or one that is unknown, expired or revoked"),
    "INSUFFICIENT_CREDITS": Code(402, "client", False, "the account has no credit left for this call"),
    "BUDGET_EXCEEDED": Code(402, "client", False, "a budget is used up until its window ends; the message says when"),
    "FORBIDDEN": Code(403, "client", False, "the credential is valid but may not do this"),
    "TARGET_FORBIDDEN": Code(403, "client", False, "the target address is not public or not allowed"),
    "NOT_FOUND": Code(404, "client", False, "no such path or thing"),
    "UNKNOWN_MODEL": Code(404, "client", False, "no upstream serves this model; the known ones are named"),
    "UNKNOWN_UPSTREAM": Code(404, "client", False, "no upstream has this name; the known ones are named"),
    "SESSION_GONE": Code(404, "client", False, "the session is unknown or its server is gone; begin a new one"),
    "METHOD_NOT_ALLOWED": Code(405, "client", False, "the path exists but not for this method"),
    "REQUEST_TIMEOUT": Code(408, "client", True, "the request did not arrive within the time limit"),
    "CONFLICT": Code(409, "client", False, "the thing exists already or is in another state"),
    "CAPACITY_GONE": Code(409, "client", False, "the offer is taken or has become too dear; choose another"),
    "BODY_TOO_LARGE": Code(413, "client", False, "the body is over the configured limit"),
    "URI_TOO_LONG": Code(414, "client", False, "the request target is over the configured limit"),
    "EXPECTATION_FAILED": Code(417, "client", False, "the only expectation served is 100-continue"),
    "UNPROCESSABLE": Code(422, "client", False, "a field is unknown or out of range; the message names it"),
    "UPGRADE_REQUIRED": Code(426, "client", False, "the version of WebSocket is not served; the answer says which is"),
    "RATE_LIMITED": Code(429, "client", True, "a limit is used up; Retry-After says when to come back"),
    "HEAD_TOO_LARGE": Code(431, "client", False, "the head is over the configured size or field count"),
    "INTERNAL": Code(500, "gateway", True, "a fault of the gateway; the request id finds it in the log"),
    "NOT_IMPLEMENTED": Code(501, "client", False, "the transfer coding is not supported"),
    "UPSTREAM_UNREACHABLE": Code(502, "upstream", True, "no connection to the upstream could be made"),
    "UPSTREAM_INVALID": Code(502, "upstream", True, "the upstream broke off or answered invalid HTTP"),
    "PROVIDER_FAILED": Code(502, "upstream", True, "the GPU provider did not answer, or not as it should"),
    "UNAVAILABLE": Code(503, "gateway", True, "a part the call needs is away for the moment"),
    "UPSTREAM_BUSY": Code(503, "gateway", True, "all connections allowed to this upstream are in use"),
    "JOURNAL_FULL": Code(503, "gateway", True, "the journal is at its limit, or its disk fails; no call is taken"),
    "UPSTREAM_TIMEOUT": Code(504, "upstream", True, "the upstream did not answer within the time limit"),
    "HTTP_VERSION": Code(505, "client", False, "only HTTP/1.0 and HTTP/1.1 are served"),
    "LOOP_DETECTED": Code(508, "client", False, "the request has passed this gateway too often"),
}


class GatewayError(Exception):
    """A failure with a code of the table; `message` names the value at fault and the remedy.

    `allow` is what METHOD_NOT_ALLOWED owes: the methods that are served, "GET, HEAD" (RFC 9110 §15.5.6).
    """

    def __init__(
        self,
        code: str,
        message: str,
        retry_after_s: float | None = None,
        param: str | None = None,
        *,
        allow: str = "",
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.retry_after_s = retry_after_s
        self.param = param
        self.allow = allow

    @property
    def status(self) -> int:
        """Return the HTTP status of the code."""
        return CODES[self.code].status


class ConfigError(Exception):
    """All faults found in one configuration, each a line that says where."""

    def __init__(self, faults: list[str]) -> None:
        super().__init__("\n".join(faults))
        self.faults = faults


class PluginError(Exception):
    """A plugin that cannot be loaded or registered; names the plugin and the remedy."""
