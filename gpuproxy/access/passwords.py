"""Passwords: which are good enough, and Argon2id in threads of its own.

One hash takes 20 ms of a core on purpose, so no more than HASHES_AT_ONCE run, and who finds the queue full is told to
come back: else a flood of log-ins would take the machine. An unknown account costs the same hash as a known one.
"""

import asyncio
import unicodedata
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from gpuproxy.errors import GatewayError

if TYPE_CHECKING:
    from argon2 import PasswordHasher

# The Password Storage Cheat Sheet of OWASP: 19 MiB, two passes, one lane.
MEMORY_KIB = 19_456
PASSES = 2
LANES = 1
HASHES_AT_ONCE = 2
QUEUE_MAX = 32
CHARACTERS_MIN = 8  # NIST SP 800-63B §5.1.1.2, as is the list of common ones
CHARACTERS_MAX = 256

T = TypeVar("T")


def check_password(password: str, email: str) -> None:
    """Raise GatewayError UNPROCESSABLE for a password that is too short, too long or among the first to be tried."""
    folded = _plain(password).lower()
    if not CHARACTERS_MIN <= len(password) <= CHARACTERS_MAX:
        raise _bad(f"a password has {CHARACTERS_MIN} to {CHARACTERS_MAX} characters")
    if folded in (email.lower(), email.lower().partition("@")[0]):
        raise _bad("the password is the e-mail address; choose another")
    if folded in _common() or len(set(folded)) == 1:
        raise _bad("the password is one of the commonest; choose another")


class Hasher:
    """Hashes and checks passwords in two threads. Close it at the end."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(HASHES_AT_ONCE, thread_name_prefix="password")
        self._waiting_count = 0

    async def hash(self, password: str) -> str:
        """Return what to store. Raises GatewayError UNAVAILABLE when the queue is full."""
        return await self._run(lambda: _argon2().hash(_plain(password)))

    async def is_right(self, stored: str | None, password: str) -> bool:
        """Tell whether `password` made `stored`; with None, no, after the same work. Raises as `hash` does."""
        return await self._run(lambda: _is_right(stored, password))

    def is_outdated(self, stored: str) -> bool:
        """Tell whether `stored` was made with less work than is asked for now."""
        return _argon2().check_needs_rehash(stored)

    def close(self) -> None:
        """Let go of the threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _run(self, work: Callable[[], T]) -> T:
        if self._waiting_count >= QUEUE_MAX:
            raise GatewayError("UNAVAILABLE", "too many passwords to check at the moment", retry_after_s=2)
        self._waiting_count += 1
        working = asyncio.get_running_loop().run_in_executor(self._threads, work)
        working.add_done_callback(self._done)
        return await asyncio.shield(working)  # a thread goes on when its caller leaves, and counts until its end

    def _done(self, _working: "asyncio.Future[T]") -> None:
        self._waiting_count -= 1


def _is_right(stored: str | None, password: str) -> bool:
    from argon2.exceptions import Argon2Error, InvalidHashError

    try:
        is_same = _argon2().verify(_nobodys_hash() if stored is None else stored, _plain(password))
    except (Argon2Error, InvalidHashError):
        return False
    return is_same and stored is not None


@cache
def _argon2() -> "PasswordHasher":
    from argon2 import PasswordHasher

    return PasswordHasher(time_cost=PASSES, memory_cost=MEMORY_KIB, parallelism=LANES)


@cache
def _nobodys_hash() -> str:
    return _argon2().hash("")  # no password is this short


@cache
def _common() -> frozenset[str]:
    return frozenset(Path(__file__).with_name("common_passwords.txt").read_text().split())


def _plain(password: str) -> str:
    """Return the one spelling of what may be typed in several ways, by keyboard and system."""
    return unicodedata.normalize("NFKC", password)


def _bad(message: str) -> GatewayError:
    return GatewayError("UNPROCESSABLE", message, param="password")
