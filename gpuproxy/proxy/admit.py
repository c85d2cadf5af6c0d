"""Who is calling: from a credential to a grant, from memory whenever possible.

A grant is trusted for ``grant_ttl_s``; then it is still used while control is asked again in the background, so
that no call waits for a refresh. Revocation does not depend on that: control pushes it. When control is away a
grant serves on up to ``stale_grant_s`` (static stability). Unknown keys are remembered briefly, and many
callers with one new key share one question.
"""

import hashlib
import time
from collections.abc import Callable

from gpuproxy.codec.key import is_well_formed
from gpuproxy.config import Auth
from gpuproxy.errors import GatewayError
from gpuproxy.link.client import LinkClient
from gpuproxy.types import Grant

GRANTS_MAX = 100_000
UNKNOWN_MAX = 10_000
REFRESHED_AT_ONCE_MAX = 5_000  # grants asked about anew when the link comes back; the rest wait for their next use
REVOKED_KEPT_S = 10.0  # longer than any answer about a key can be on its way

Waiter = Callable[[Grant | GatewayError], None]


class Held:
    """A grant with the times (loop seconds) until which it is fresh and usable at all."""

    __slots__ = ("fresh_until_s", "grant", "usable_until_s")

    def __init__(self, grant: Grant, fresh_until_s: float, usable_until_s: float) -> None:
        self.grant = grant
        self.fresh_until_s = fresh_until_s
        self.usable_until_s = usable_until_s


class Admission:
    """The grants of a worker."""

    def __init__(self, config: Auth, link: LinkClient, now: Callable[[], float]) -> None:
        self._config = config
        self._link = link
        self._now = now
        self._held: dict[bytes, Held] = {}
        self._by_key_id: dict[str, bytes] = {}
        self._unknown: dict[bytes, float] = {}
        self._waiting: dict[bytes, list[Waiter]] = {}
        self._asked: dict[bytes, tuple[int, float]] = {}
        self._revoked: dict[str, float] = {}

    def find(self, credential: bytes, waiter: Waiter) -> Held | None:
        """Return what is held for a credential, or None and call `waiter` later. Raises GatewayError UNAUTHORIZED.

        Cost when held: one SHA-256 and one dict look-up (0.6 µs).
        """
        digest = hashlib.sha256(credential).digest()
        held = self._held.get(digest)
        now_s = self._now()
        if held is not None and now_s < held.usable_until_s:
            if now_s >= held.fresh_until_s:
                held.fresh_until_s = now_s + 1  # at most one question a second
                self._ask(digest)
            return held
        if not is_well_formed(credential):
            raise GatewayError("UNAUTHORIZED", "this is not an API key; keys start with gp_ and are 52 characters long")
        if self._unknown.get(digest, 0) > now_s:
            raise _unknown_key()
        waiters = self._waiting.setdefault(digest, [])
        waiters.append(waiter)
        if len(waiters) == 1:
            self._ask(digest)
        return None

    def revoke(self, key_ids: tuple[str, ...]) -> None:
        """Forget these keys now; whoever still holds the grant sees it revoked."""
        for key_id in key_ids:
            self._revoked[key_id] = self._now() + REVOKED_KEPT_S  # an older answer may still be on its way
            digest = self._by_key_id.pop(key_id, None)
            held = self._held.pop(digest, None) if digest is not None else None
            if held is not None:
                held.grant.revoked = True

    def is_good(self, grant: Grant) -> bool:
        """Tell whether a grant given earlier still holds; to be asked every few seconds."""
        return not (grant.revoked or grant.key_id in self._revoked or is_expired(grant))

    def renew(self, key_ids: tuple[str, ...]) -> None:
        """Ask about these keys again; until the answer is here they may do what they might."""
        for key_id in key_ids:
            digest = self._by_key_id.get(key_id)
            if digest is not None:
                self._ask(digest)

    def sweep(self) -> None:
        """Give up questions that wait too long; called now and then."""
        now_s = self._now()
        for digest, (question, deadline_s) in list(self._asked.items()):
            if deadline_s <= now_s:
                del self._asked[digest]
                self._link.give_up(question)
        for key_id in [key_id for key_id, until_s in self._revoked.items() if until_s <= now_s]:
            del self._revoked[key_id]

    def refresh_all(self) -> None:
        """Ask about every grant again: revocations may have been missed while the link was away."""
        for count, (digest, held) in enumerate(list(self._held.items())):
            if count < REFRESHED_AT_ONCE_MAX:
                self._ask(digest)
            else:
                held.usable_until_s = 0

    def _ask(self, digest: bytes) -> None:
        question = self._link.ask(digest, lambda grant, is_known: self._answered(digest, grant, is_known))
        if question >= 0:
            self._asked[digest] = question, self._now() + self._config.authorize_timeout_s

    def _answered(self, digest: bytes, grant: Grant | None, is_known: bool) -> None:
        self._asked.pop(digest, None)
        result: Grant | GatewayError
        if grant is not None and grant.key_id not in self._revoked:
            self._hold(digest, grant)
            result = grant
        elif is_known:
            self._refused(digest)
            if len(self._unknown) >= UNKNOWN_MAX:
                self._unknown.clear()
            self._unknown[digest] = self._now() + self._config.unknown_key_ttl_s
            result = _unknown_key()
        else:
            result = GatewayError("UNAVAILABLE", "keys cannot be checked at the moment; try again", 1)
        for waiter in self._waiting.pop(digest, ()):
            waiter(result)

    def _refused(self, digest: bytes) -> None:
        held = self._held.get(digest)
        if held is not None:  # it was good; tunnels it has opened may be there still
            self._revoked[held.grant.key_id] = self._now() + REVOKED_KEPT_S
        self._drop(digest)

    def _hold(self, digest: bytes, grant: Grant) -> None:
        now_s = self._now()
        if len(self._held) >= GRANTS_MAX:
            self._drop(next(iter(self._held)))
        self._unknown.pop(digest, None)
        self._by_key_id[grant.key_id] = digest
        self._held[digest] = Held(grant, now_s + self._config.grant_ttl_s, now_s + self._config.stale_grant_s)

    def _drop(self, digest: bytes) -> None:
        held = self._held.pop(digest, None)
        if held is not None:
            held.grant.revoked = True
            self._by_key_id.pop(held.grant.key_id, None)


def _unknown_key() -> GatewayError:
    return GatewayError("UNAUTHORIZED", "this API key is unknown, expired or revoked")


def is_expired(grant: Grant) -> bool:
    """Tell whether the grant's own expiry has passed (wall clock)."""
    return bool(grant.expires_ns) and grant.expires_ns <= time.time_ns()
