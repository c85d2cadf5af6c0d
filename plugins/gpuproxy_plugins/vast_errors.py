"""What vast.ai means by an answer that is no success.

It tells failures in two families: ``{"success": false, "error", "msg"}`` with fitting or unfitting statuses, also
200, and plain text. The word in ``error`` counts before the status: a 404 may be a wrong credential (``auth_error``),
an offer that is taken (``no_such_ask``) or an instance that is gone. Seen by others, not all of it documented.
"""

import re

import msgspec
from msgspec import Struct

from gpuproxy.plugin import (
    CapacityGone,
    InstanceGone,
    InsufficientFunds,
    InvalidAnswer,
    Phase,
    ProviderError,
    ProviderUnavailable,
    RateLimited,
    SpecRefused,
    Unauthorized,
)
from gpuproxy_plugins.provider_http import CHANGING, Answer

DAY_S = 86_400


class Told(Struct):
    """The parts of an error body that mean something; each may be missing or of another type."""

    success: object = None
    error: object = None
    msg: object = None
    detail: object = None
    new_contract: object = None

    def words(self, body: bytes) -> str:
        """Return everything it says, in lower case, to look for words in."""
        said = [str(part) for part in (self.error, self.msg, self.detail) if part]
        return " ".join(said or [body[:2_000].decode(errors="replace")]).lower()


def read_told(body: bytes) -> Told:
    """Return what an answer says of itself; of one that is no JSON object, nothing."""
    try:
        return msgspec.json.decode(body, type=Told)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return Told()


def is_success(answer: Answer, told: Told) -> bool:
    """Tell whether the call did what it was for: a 200 may say otherwise, and a change must say ``success``."""
    is_fine = told.success is True if answer.phase in CHANGING else told.success is not False
    return 200 <= answer.status < 300 and is_fine and told.error in (None, "", False)


def failure(name: str, answer: Answer, told: Told, shown: str, now_s: float) -> ProviderError:
    """Return the error an unsuccessful answer stands for. `shown` is its text, safe to show."""
    words, phase = told.words(answer.body), answer.phase
    if told.error == "auth_error" or answer.status == 401:
        return Unauthorized(name, phase, f"it refuses the credential ({shown}); check api_key_env and the key's rights")
    if answer.status == 429:
        return _limited(name, answer, told, words, shown, now_s)
    if "no_such_ask" in words:
        return CapacityGone(name, phase, f"the offer is gone ({shown}); try the next", instance_id=_left(told))
    if _left(told):  # a bid that is too low makes a stopped instance all the same
        return CapacityGone(
            name, phase, f"it did not come to run ({shown}); try another offer", instance_id=_left(told)
        )
    if answer.status >= 500 or answer.status == 408:
        message = f"it fails with {answer.status} ({shown}); try later"
        return ProviderUnavailable(name, phase, message, may_have_worked=phase in CHANGING)
    if answer.status == 402 or "insufficient" in words or "credit" in words:
        return InsufficientFunds(name, phase, f"our account there has no money ({shown}); add credit")
    return _refused(name, answer, told, words, shown)


def _refused(name: str, answer: Answer, told: Told, words: str, shown: str) -> ProviderError:
    phase: Phase = answer.phase
    if "no_such_instance" in words:
        return InstanceGone(name, phase, f"there is no such instance ({shown}); list them to see those there are")
    if phase == "create" and isinstance(told.error, str) and answer.status in (200, 400, 403, 404, 422):
        return SpecRefused(name, phase, f"it does not accept this ({shown}); change the request")
    if answer.status == 403:
        return Unauthorized(name, phase, f"it forbids this ({shown}); check the key's rights")
    message = f"it answers {answer.status} ({shown}), which means nothing here; its API may have changed"
    return InvalidAnswer(name, phase, message, may_have_worked=phase in CHANGING)


def _limited(name: str, answer: Answer, told: Told, words: str, shown: str, now_s: float) -> RateLimited:
    """Say how long to stay away: until midnight UTC for the day's quota, else as the header or the text says."""
    retry_after_s = _seconds(answer.headers.get("retry-after"))
    if told.error == "search_quota_exceeded":
        reset_s = _seconds(answer.headers.get("x-ratelimit-reset"))
        retry_after_s = reset_s - now_s if reset_s is not None else DAY_S - now_s % DAY_S
    if retry_after_s is None:
        found = re.search(r"threshold=([0-9]{1,4}(?:\.[0-9]{1,3})?)", words)
        retry_after_s = float(found[1]) if found else 5.0
    retry_after_s = min(max(retry_after_s, 0.0), DAY_S)
    message = f"too many calls ({shown}); come back in {retry_after_s:.0f} s"
    is_changing = answer.phase in CHANGING  # the limiter may stand before or behind the work
    return RateLimited(name, answer.phase, message, may_have_worked=is_changing, retry_after_s=retry_after_s)


def _seconds(text: str | None) -> float | None:
    return float(text) if text and re.fullmatch(r"[0-9]{1,12}(\.[0-9]{1,6})?", text) else None


def _left(told: Told) -> str:
    is_id = isinstance(told.new_contract, int) and not isinstance(told.new_contract, bool)
    return str(told.new_contract) if is_id else ""
