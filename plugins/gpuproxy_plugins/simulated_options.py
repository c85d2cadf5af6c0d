"""What the block of the simulated marketplace may say under ``options``."""

from typing import Annotated

import msgspec
from msgspec import Meta, Struct

KNOWN = "seed, boot_s, failures, file, and PORT = HOST:PORT"


class Options(Struct, frozen=True, forbid_unknown_fields=True):
    """The options, read. ``ports`` lead from a port inside to one on ``ip``, where a server of yours listens."""

    seed: str = "1"
    boot_s: Annotated[float, Meta(ge=0, le=86_400)] = 5.0
    failures: Annotated[float, Meta(ge=0, le=1)] = 0.0
    file: str = ""
    ip: str = ""
    ports: dict[int, int] = {}


def read_options(given: dict[str, str]) -> Options:
    """Read the block's options. Raises ValueError that names the wrong one."""
    named = {name: value for name, value in given.items() if name in ("seed", "boot_s", "failures", "file")}
    addresses = {int(name): _address(name, value) for name, value in given.items() if name.isdecimal()}
    if unknown := [name for name in given if not name.isdecimal() and name not in named]:
        raise ValueError(f'options: "{unknown[0]}" is unknown; known: {KNOWN}')
    hosts = {host for host, _ in addresses.values()}
    if len(hosts) > 1:
        raise ValueError(f"options: the ports lead to {', '.join(sorted(hosts))}; an instance has one address")
    try:
        options = msgspec.convert(named, Options, strict=False)
    except msgspec.ValidationError as error:
        raise ValueError(f"options: {error}; known: {KNOWN}") from error
    ports = {inside: port for inside, (_, port) in addresses.items()}
    return msgspec.structs.replace(options, ip=hosts.pop() if hosts else "", ports=ports)


def _address(name: str, value: str) -> tuple[str, int]:
    host, _, port = value.rpartition(":")
    if not host or not port.isdecimal() or not 1 <= int(port) <= 65_535 or not 1 <= int(name) <= 65_535:
        raise ValueError(f'options: {name} = "{value}" is no PORT = HOST:PORT; write 8000 = "127.0.0.1:9000"')
    return host, int(port)
