"""When a call may be sent once more: never after a byte reached the client, and never so often that it does harm.

Always: a connection that could not be made, and an idle one that turned out to be closed; neither reached anybody.
By the model's ``retry_on``, when the body can be sent again: answers 429, 502, 503, 504, a connection ``lost`` before
the answer began, a ``first_byte`` that did not come in time. Another endpoint takes the second try; without one the
answer passes as it is. A budget holds the extra load below a part of the calls.
"""

import time
from datetime import UTC
from email.utils import parsedate_to_datetime

from gpuproxy.proxy.heads import AnswerHead

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
    """Return the seconds that an answer's Retry-After asks for, 0 if it asks for none (RFC 9110 §10.2.3)."""
    if head.status in WAITING_STATUSES:
        for name, value in head.fields:
            if len(name) == 11 and name.lower() == b"retry-after":
                return min(int(value[:9]), WAIT_MAX_S) if value.isdigit() else _until(value, head)
    return 0


def _until(date: bytes, head: AnswerHead) -> int:
    """Return the seconds until a date: from the answer's own Date, for its clock need not be ours; 0 for no date."""
    until_s = _seconds(date)
    told = [_seconds(value) for name, value in head.fields if len(name) == 4 and name.lower() == b"date"]
    now_s = (told and told[0]) or int(time.time())
    return min(max(0, until_s - now_s), WAIT_MAX_S)


def _seconds(date: bytes) -> int:
    """Return an HTTP date in seconds since 1970, 0 if it is none."""
    try:
        when = parsedate_to_datetime(date.decode("ascii"))
        return int((when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp())
    except (ValueError, OverflowError):
        return 0
