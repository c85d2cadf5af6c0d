"""When a call may be sent once more: never after a byte reached the client, and never so often that it does harm.

Always: a connection that could not be made, and an idle one that turned out to be closed; neither reached anybody.
At our own control it has died, perhaps at work: what must not be done twice goes there over a connection of its own.
By the model's ``retry_on``, when the body can be sent again: answers 429, 502, 503, 504, a connection ``lost`` before
the answer began, or with no HTTP on it, a ``first_byte`` that did not come in time. Another endpoint takes the second
try; without one the answer passes as it is. A budget holds the extra load below a part of the calls.
"""

import time

from gpuproxy.codec.retry_after import seconds_asked, unix_time
from gpuproxy.proxy.heads import AnswerHead

IDEMPOTENT = frozenset((b"GET", b"HEAD", b"OPTIONS", b"PUT", b"DELETE"))  # RFC 9110 §9.2.2; TRACE is not served
RESERVE = 10  # repetitions a model may have at once, earned before they are needed
STATUS_REASONS = {429: "429", 502: "502", 503: "503", 504: "504"}
WAIT_MAX_S = 3_600  # more in a Retry-After is taken for this
WAITING_STATUSES = (429, 503)


class Budget:
    """A bucket of hundredths: each call adds `percent`, each repetition takes 100."""

    __slots__ = ("_most", "_percent", "tokens")

    def __init__(self, percent: int) -> None:
        self._percent = percent
        self.tokens = self._most = 100 * RESERVE if percent else 0

    def earn(self) -> None:
        """Count a call."""
        if self.tokens < self._most:
            self.tokens += self._percent

    def spend(self) -> bool:
        """Take a repetition out, if there is one."""
        if self.tokens < 100:
            return False
        self.tokens -= 100
        return True


def wait_told(head: AnswerHead) -> int:
    """Return the seconds that an answer's Retry-After asks for, 0 if it asks for none.

    A date is compared with the answer's own Date, for its clock need not be ours.
    """
    if head.status not in WAITING_STATUSES:
        return 0
    told = {name.lower(): value.decode("latin-1") for name, value in head.fields if len(name) in (4, 11)}
    now_s = unix_time(told.get(b"date", "")) or time.time()
    return min(seconds_asked(told.get(b"retry-after", ""), now_s) or 0, WAIT_MAX_S)
