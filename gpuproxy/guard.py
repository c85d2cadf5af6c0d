"""The guard for user-given targets (``target_url``, webhooks): one parser, one table of refused networks, the address
dialled is the one judged.

Refused are all addresses that are not public unicast, those of this machine, every IPv6 form that embeds an IPv4
address, and whatever `ipaddress.is_global` wrongly lets through (its answer differs between Python releases, so the
table is our own). Operators open networks by ``[egress] allow``.
"""

import ipaddress
import re
import socket
from collections.abc import Iterable
from typing import NamedTuple

from gpuproxy.errors import GatewayError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_DENIED: tuple[Network, ...] = tuple(
    ipaddress.ip_network(text)
    for text in (
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",
        "127.0.0.0/8",
        "169.254.0.0/16",
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",
        "192.88.99.0/24",
        "192.168.0.0/16",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/4",
        "240.0.0.0/4",
        "::/96",
        "::ffff:0:0/96",
        "::ffff:0:0:0/96",
        "64:ff9b::/96",
        "64:ff9b:1::/48",
        "100::/64",
        "2001::/23",
        "2001:db8::/32",
        "2002::/16",
        "3fff::/20",
        "5f00::/16",
        "fc00::/7",
        "fe80::/10",
        "fec0::/10",
        "ff00::/8",
    )
)

# Ports that no HTTP service has and that protocols with line commands listen on.
_DENIED_PORTS = frozenset((0, 1, 7, 9, 19, 20, 21, 22, 23, 25, 53, 69, 110, 111, 119, 135, 137, 139, 143, 389, 445))

_TARGET = re.compile(
    r"(?P<scheme>https?)://(?P<host>[a-z0-9](?:[a-z0-9._-]{0,252})|\[[0-9a-f:.]{2,45}\])(?::(?P<port>[0-9]{1,5}))?"
    r"(?P<path>/[!-~]*)?(?P<query>\?[!-~]*)?\Z",
    re.IGNORECASE | re.ASCII,  # or "ſ" is an "s"
)


class Target(NamedTuple):
    """A parsed target: `host` without brackets and lower case, `authority` as it goes into Host.

    ``path`` is in origin form with its query, byte-exact; empty when the URL has none.
    """

    scheme: str
    host: str
    port: int
    authority: str
    path: str


def parse_target(url: str, param: str = "target_url") -> Target:
    """Parse a user-given URL. Raises GatewayError BAD_REQUEST naming `param` and what is wrong."""
    without_fragment = url.split("#", 1)[0]
    match = _TARGET.match(without_fragment)
    if match is None or "\\" in url:
        raise GatewayError(
            "BAD_REQUEST",
            f"{param} {url[:200]!r} is not a plain http(s) URL; write http(s)://HOST[:PORT][/PATH], no user info, "
            "no spaces, non-ASCII percent-encoded",
            param=param,
        )
    scheme = match["scheme"].lower()
    default_port = 443 if scheme == "https" else 80
    port = int(match["port"] or default_port)
    if port > 65_535 or port in _DENIED_PORTS:
        raise GatewayError("TARGET_FORBIDDEN", f"{param}: port {port} is not allowed", param=param)
    host = match["host"].lower()
    authority = host if port == default_port else f"{host}:{port}"
    path = (match["path"] or "") + (match["query"] or "")
    return Target(scheme, host.strip("[]"), port, authority, "/" + path if path.startswith("?") else path)


def is_literal(host: str) -> bool:
    """Tell whether `host` is an address and no name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def is_own(address: Address) -> bool:
    """Tell whether an address is this machine's: what listens here may be shut off from outside. Sends nothing."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((str(address), 9))  # of UDP: finds the way, which to an own address begins there
            return ipaddress.ip_address(probe.getsockname()[0].split("%", 1)[0]) == address
    except OSError:
        return False  # there is no way


class Guard:
    """Judges addresses against the table and the operator's exceptions."""

    def __init__(self, allow: Iterable[str] = ()) -> None:
        self._allowed = tuple(ipaddress.ip_network(text) for text in allow)

    def is_allowed(self, address: str) -> bool:
        """Tell whether this resolved address may be dialled for a user-given target."""
        judged: Address = ipaddress.ip_address(address.split("%", 1)[0])
        if any(judged in network for network in self._allowed if network.version == judged.version):
            return True
        if any(judged in network for network in _DENIED if network.version == judged.version):
            return False
        return not is_own(judged)

    def check(self, host: str, addresses: Iterable[str], param: str = "target_url") -> None:
        """Refuse the target if any of its addresses is refused (no picking: a mixed answer is an attack)."""
        for address in addresses:
            if not self.is_allowed(address):
                raise GatewayError(
                    "TARGET_FORBIDDEN",
                    f"{param}: {host} is not a public address of another machine; ask the operator to list it in "
                    "[egress] allow",
                    param=param,
                )
