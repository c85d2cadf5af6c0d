"""Upstreams that refuse to be asked for usage: the call goes out once more as the client wrote it, others at once so.

Some OpenAI-shaped servers answer 400 or 422 to a field they do not know. Nothing was generated then, so sending the
call again is safe. That an upstream refuses is believed only when the same call without the question goes well (an
answer that merely repeats the body of a bad call is no proof), and only for a while, for servers are updated.
"""

from typing import TYPE_CHECKING

from gpuproxy.observe.logs import get_logger
from gpuproxy.plugin import AnswerEditor, UpstreamRequest
from gpuproxy.proxy.encoded import decoded

if TYPE_CHECKING:
    from gpuproxy.proxy.upstream import UpstreamConnection
    from gpuproxy.proxy.worker import Plane

_log = get_logger("gpuproxy.unasked")

REMEMBERED_S = 3_600.0
REFUSAL_BYTES_MAX = 65_536  # a longer answer is not looked at
REFUSING = (400, 422)


class Unasked(UpstreamRequest):
    """What is sent in place of a request that was refused; `upstream` is who refused it."""

    upstream: str = ""


def without_question(request: UpstreamRequest, upstream: str) -> Unasked:
    """Return the request as the client wrote it."""
    return Unasked(request.path, None, request.headers, request.identity, upstream=upstream)


def is_refusal(editor: AnswerEditor, connection: "UpstreamConnection", body: bytes) -> bool | None:
    """Tell whether an answer refuses the question; None if that cannot be told before more of it has come."""
    was_refused = getattr(editor, "was_refused", None)
    head = connection.head
    if was_refused is None or head.status not in REFUSING or len(body) > REFUSAL_BYTES_MAX:
        return False
    if not connection.is_complete:
        return None if connection.content_length <= REFUSAL_BYTES_MAX else False
    return bool(was_refused(decoded(body, head.coding) if head.coding else body))


class UsageRefusals:
    """The upstreams that a worker does not ask for now."""

    def __init__(self, plane: "Plane") -> None:
        self._plane = plane
        self._until_s: dict[str, float] = {}

    def learn(self, request: UpstreamRequest) -> None:
        """Take note that a call has gone well without the question, if it had been refused with it."""
        if isinstance(request, Unasked) and request.upstream not in self._until_s:
            self._until_s[request.upstream] = self._plane.now_s + REMEMBERED_S
            _log.warning("upstream refuses stream_options; its streams are estimated", upstream=request.upstream)
            self.apply()

    def sweep(self, now_s: float) -> None:
        """Ask again those who refused long ago."""
        for upstream in [name for name, until_s in self._until_s.items() if until_s <= now_s]:
            del self._until_s[upstream]
            self.apply()

    def apply(self) -> None:
        """Let the router's endpoints be asked or not: after a change here, or of the router."""
        router = self._plane.router
        asked = {each.name: each.include_usage and each.name not in self._until_s for each in router.config.upstreams}
        destinations = {*router.upstreams.values(), *router.models.values()}
        for destination in destinations:
            for endpoint in destination.endpoints:
                endpoint.may_ask_usage = asked.get(endpoint.upstream, False)
        for destination in destinations:
            destination.settle()
