"""Names to addresses, on threads of our own: what somebody's name servers do must make no other name wait.

The system's resolver blocks and cannot be cancelled; event loops run it on a few threads (libuv on two at a time), so
two names whose servers are silent would stop every new connection by name. Each kind of caller has its own `Resolver`,
and a name that hangs takes one of its threads however often it is asked for.
"""

import asyncio
import socket
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from gpuproxy.guard import Guard, is_literal

ADDRESSES_MAX = 8  # of one answer that are tried, in order
THREADS_MAX = 32  # made when needed; a name that hangs holds one for as long as `resolv_options` lets it


class Resolver:
    """Looks up names for one kind of caller until it is closed."""

    def __init__(self, thread_name: str, threads_max: int = THREADS_MAX) -> None:
        self._threads = ThreadPoolExecutor(threads_max, thread_name_prefix=thread_name)
        self._asked: dict[str, asyncio.Future[list[str]]] = {}  # what threads are at

    async def places(
        self,
        host: str,
        port: int,
        within_s: float,
        connect_to: Mapping[str, str],
        guard: Guard | None,
        param: str = "target_url",
    ) -> list[tuple[str, int]]:
        """Return the addresses and port to connect to, in the order to try: all judged by the guard, if there is one.

        Where the operator's own words (`connect_to`) lead is not judged again. Raises as `resolve`, and GatewayError
        TARGET_FORBIDDEN that names `param`.
        """
        redirected = connect_to.get(f"{host}:{port}")
        if redirected is not None:
            host, _, port_text = redirected.rpartition(":")
            port = int(port_text)
        found = await self.resolve(host.strip("[]"), within_s)
        if guard is not None and redirected is None:
            guard.check(host, found, param)
        return [(address, port) for address in found[:ADDRESSES_MAX]]

    async def resolve(self, host: str, within_s: float) -> list[str]:
        """Return the addresses of a host, each once, in the system's order. An address is its own, at no cost.

        Raises TimeoutError after `within_s`, OSError if there is none.
        """
        if is_literal(host):
            return [host]
        async with asyncio.timeout(within_s):
            return await asyncio.shield(self._asking(host, within_s))

    def _asking(self, host: str, within_s: float) -> asyncio.Future[list[str]]:
        """Return what will be the answer for a name, which a thread may be waiting for already."""
        asked = self._asked.get(host)
        if asked is None:
            loop, give_up_s = asyncio.get_running_loop(), time.monotonic() + within_s
            asked = self._asked[host] = loop.run_in_executor(self._threads, _look_up_by, give_up_s, host)
            asked.add_done_callback(lambda done: self._answered(host, done))
        return asked

    def _answered(self, host: str, asked: asyncio.Future[list[str]]) -> None:
        del self._asked[host]
        if not asked.cancelled():
            asked.exception()  # nobody may be waiting any more, and that is no fault

    def close(self) -> None:
        """Leave the threads to themselves."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def _look_up_by(give_up_s: float, host: str) -> list[str]:
    """Look a name up, unless nobody waits any more: threads are not taken by what had to wait for one too long."""
    if time.monotonic() > give_up_s:
        raise TimeoutError
    return look_up(host)


def look_up(host: str) -> list[str]:
    """Ask the system. Raises OSError."""
    try:
        answers = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except UnicodeError:  # a label that is empty or too long
        raise socket.gaierror(socket.EAI_NONAME, "this is no name") from None
    return list(dict.fromkeys(str(answer[4][0]) for answer in answers))


def resolv_options(dns_s: float) -> str:
    """Return what resolv.conf(5) takes as RES_OPTIONS: a question that got lost is asked again within `dns_s`.

    The system's own 5 s would be over before; and so long a silent server would hold its thread, twice over.
    """
    return f"timeout:{max(1, int(dns_s / 2))} attempts:2"
