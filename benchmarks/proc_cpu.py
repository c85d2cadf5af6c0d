"""CPU time of processes, read from /proc (Linux).

The kernel tells it in clock ticks, 10 ms nearly everywhere: a measurement of two seconds of CPU time is good
to half a percent. A process that ends hands its time to the parent that waits for it, so the sum over a tree
including what was reaped never loses any.
"""

import os
from pathlib import Path

TICK_S = 1 / os.sysconf("SC_CLK_TCK")


def _fields(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat from the third (state) on; the name before may hold anything."""
    return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()


def own_cpu_s(pid: int) -> float:
    """Return user and system time of all threads of the process. Raises OSError when it is gone."""
    fields = _fields(pid)
    return (int(fields[11]) + int(fields[12])) * TICK_S


def tree_cpu_s(pid: int) -> float:
    """Return the CPU time of the process and all below it, with the children each of them has reaped."""
    return sum(sum(map(int, _fields(member)[11:15])) for member in tree(pid)) * TICK_S


def children(pid: int) -> list[int]:
    """Return the process ids of the direct children, oldest first where ids have not wrapped."""
    return sorted(child for child, parent in _parents().items() if parent == pid)


def tree(pid: int) -> list[int]:
    """Return the process id and those of everything below it."""
    members = [pid]
    for member in members:
        members.extend(children(member))
    return members


def command_line(pid: int) -> str:
    """Return the arguments of the process, parted by spaces."""
    return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").replace("\0", " ").strip()


def _parents() -> dict[int, int]:
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            parents[int(entry.name)] = int(_fields(int(entry.name))[1])
        except (OSError, IndexError):  # ended between the listing and the reading
            continue
    return parents
