"""What listeners at /ws cost in memory: a gateway with one worker, and clients that subscribe and then only listen.

python benchmarks/listeners.py [--clients N]

Each client shows the key in a header and subscribes to one channel of its account. Printed is the resident memory of
the control process and of the worker before and after, and for each client. The aim is 150 MB for control with 5000.
"""

import argparse
import asyncio
import base64
import http.client
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from proc_cpu import children
from programs import BenchmarkError, free_port, started, wait_until

GPUPROXY = str(Path(sys.executable).parent / "gpuproxy")
AT_ONCE = 100
SETTLE_S = 3.0
WAIT_S = 30.0
AIM_MB = 150
CONTROL, WORKER = "gpuproxy.control.app", "gpuproxy.proxy.worker"
EMAIL = "listener@example.com"


def resident_mb(pid: int) -> float:
    """Return the resident memory of a process in MB (10^6)."""
    found = re.search(r"^VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return int(found[1]) * 1024 / 1e6 if found else 0.0


def process_of(supervisor: int, module: str) -> int:
    """Return the child of the supervisor that runs a module."""
    for pid in children(supervisor):
        if module.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
            return pid
    raise BenchmarkError(f"no process runs {module}")


async def listener(port: int, key: str) -> asyncio.StreamWriter:
    """Connect, subscribe, and return the connection once that was answered."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=4_096)
    head = f"GET /ws HTTP/1.1\r\nHost: x\r\nX-API-Key: {key}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    nonce = base64.b64encode(os.urandom(16)).decode()
    writer.write(f"{head}Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {nonce}\r\n\r\n".encode())
    if b" 101 " not in await reader.readline():
        raise BenchmarkError("the gateway did not upgrade the connection")
    await reader.readuntil(b"\r\n\r\n")
    writer.write(masked(b'{"type":"subscribe","channels":["billing_events"]}'))
    await reader.readuntil(b"subscribed")
    return writer


def masked(text: bytes) -> bytes:
    """Return a text frame as clients send it."""
    mask = os.urandom(4)
    return bytes((0x81, 0x80 | len(text))) + mask + bytes(byte ^ mask[at % 4] for at, byte in enumerate(text))


async def connect(port: int, key: str, count: int) -> list[asyncio.StreamWriter]:
    """Return so many listeners."""
    made: list[asyncio.StreamWriter] = []
    async with asyncio.timeout(WAIT_S + count / 50):
        while len(made) < count:
            made += await asyncio.gather(*(listener(port, key) for _ in range(min(AT_ONCE, count - len(made)))))
    return made


async def measure(supervisor: int, port: int, key: str, count: int) -> None:
    """Connect and print the figures."""
    pids = {"control": process_of(supervisor, CONTROL), "worker": process_of(supervisor, WORKER)}
    warm = await connect(port, key, 10)  # so that what is made once is not counted for each
    await asyncio.sleep(SETTLE_S)
    before = {name: resident_mb(pid) for name, pid in pids.items()}
    made = await connect(port, key, count - len(warm))
    await asyncio.sleep(SETTLE_S)
    for name, pid in pids.items():
        now = resident_mb(pid)
        each_kb = (now - before[name]) * 1e3 / len(made)
        print(f"{name:8} {before[name]:6.1f} MB with 10, {now:6.1f} MB with {count}: {each_kb:5.1f} kB for each")
    print(f"aim: {AIM_MB} MB for control with 5000")
    for writer in (*warm, *made):
        writer.close()


def is_ready(port: int) -> bool:
    """Say whether the gateway takes calls: the port is open from its very start."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=1)
    try:
        connection.request("GET", "/health/ready")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def prepared(directory: Path, port: int) -> tuple[Path, str]:
    """Write a configuration; return it and the key of a user."""
    config = directory / "config.toml"
    config.write_text(
        f'[server]\nport = {port}\nworkers = 1\ndata_dir = "{directory}/data"\n'
        f'[store]\nurl = "sqlite:///{directory}/g.db"\n[rates]\nrequests_per_minute = 0\n'
    )
    said = [
        subprocess.run([GPUPROXY, *words, "-c", str(config)], check=True, capture_output=True, text=True).stdout
        for words in (("user", "create", EMAIL), ("key", "create", "--user", EMAIL))
    ]
    return config, said[1].strip()


def main() -> None:
    """Run a gateway and measure it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=5_000)
    count = parser.parse_args().clients
    with tempfile.TemporaryDirectory() as name:
        directory, port = Path(name), free_port()
        config, key = prepared(directory, port)
        command = [GPUPROXY, "serve", "-c", str(config)]
        with started(command, 0, directory / "log") as process:
            wait_until(lambda: is_ready(port), process, directory / "log", "the gateway")
            asyncio.run(measure(process.pid, port, key, count))


if __name__ == "__main__":
    main()
