"""Slows down who guesses passwords, without ever shutting an account.

Failures are counted for each pair of account and address, so that a stranger cannot lock an owner out, and for each
address over all accounts. An attempt counts as failed from its start until it is forgiven: a hundred at once are a
hundred. The counts live in this process; each node of several has its own.
"""

import ipaddress
import time
from collections import deque
from collections.abc import Callable
from math import ceil
from typing import Any

from gpuproxy.errors import GatewayError

WINDOW_S = 900.0
FREE_FAILURES = 5  # of one account from one address in a window, without a delay
DELAY_S_MAX = 900.0
ADDRESS_WINDOW_S = 3_600.0
ADDRESS_FAILURES_MAX = 50
REMEMBERED_MAX = 10_000  # accounts and addresses each; the longest unused are forgotten

Failures = deque[float]  # their times, oldest first


class Attempts:
    """The failed log-ins of the last while; `now` tells the time in seconds."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._accounts: dict[tuple[str, str], Failures] = {}
        self._addresses: dict[str, Failures] = {}

    def begin(self, account: str, address: str) -> None:
        """Count one attempt as failed. Raises GatewayError RATE_LIMITED, and counts nothing, if it comes too early."""
        now_s, network = self._now(), _network_of(address)
        of_account = _recent(self._accounts, (account, network), now_s - WINDOW_S)
        of_address = _recent(self._addresses, network, now_s - ADDRESS_WINDOW_S)
        wait_s = max(_account_wait_s(of_account, now_s), _address_wait_s(of_address, now_s))
        if wait_s > 0:
            raise GatewayError("RATE_LIMITED", "too many failed attempts; wait a while", retry_after_s=ceil(wait_s))
        of_account.append(now_s)
        of_address.append(now_s)

    def forgive(self, account: str, address: str) -> None:
        """The attempt begun last was right: forget the failures of the account, and this one of the address."""
        network = _network_of(address)
        self._accounts.pop((account, network), None)
        of_address = self._addresses.get(network)
        if of_address:
            of_address.pop()

    def undo(self, account: str, address: str) -> None:
        """The attempt begun last was neither right nor wrong: count it no more."""
        network = _network_of(address)
        for failures in (self._accounts.get((account, network)), self._addresses.get(network)):
            if failures:
                failures.pop()


def _recent(table: dict[Any, Failures], key: Any, since_s: float) -> Failures:
    failures = table.pop(key, None) or deque(maxlen=ADDRESS_FAILURES_MAX)
    while failures and failures[0] <= since_s:
        failures.popleft()
    table[key] = failures  # at the end: the order of the table is that of use
    if len(table) > REMEMBERED_MAX:
        del table[next(iter(table))]
    return failures


def _account_wait_s(failures: Failures, now_s: float) -> float:
    if len(failures) < FREE_FAILURES:
        return 0.0
    delay_s = min(2.0 ** (len(failures) - FREE_FAILURES), DELAY_S_MAX)
    return failures[-1] + delay_s - now_s


def _address_wait_s(failures: Failures, now_s: float) -> float:
    if len(failures) < ADDRESS_FAILURES_MAX:
        return 0.0
    return failures[0] + ADDRESS_WINDOW_S - now_s


def _network_of(address: str) -> str:
    """Return the address, of IPv6 the /64: one customer has that many."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    if parsed.version == 4:
        return str(parsed)
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.ip_network((parsed, 64), strict=False))
