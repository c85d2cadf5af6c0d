"""A whole gateway as people run it: configuration file, command line, daemon."""

import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import requests

GPUPROXY = Path(sys.executable).parent / "gpuproxy"
START_S = STOP_S = WAIT_S = 20.0


class Gateway(NamedTuple):
    """A running gateway and one caller's key."""

    url: str
    key: str
    config: Path
    environment: dict[str, str]
    log: Path

    def command(self, *words: str) -> str:
        """Run a subcommand against this gateway's configuration and return what it printed."""
        return command(self.config, self.environment, *words)

    def new_key(self, email: str) -> str:
        """Create a user and return a key of theirs."""
        self.command("user", "create", email)
        return self.command("key", "create", "--user", email, "--rpm", "0").strip()

    def usage(self, key: str, until: Callable[[Any], bool]) -> Any:
        """Return the usage of the key's user as soon as it is as `until` wants it."""
        deadline = time.monotonic() + WAIT_S
        while True:
            answer = requests.get(f"{self.url}/api/v1/user/usage", headers={"X-API-Key": key}, timeout=WAIT_S)
            usage = answer.json()
            if until(usage):
                return usage
            assert time.monotonic() < deadline, f"usage stays at {usage}"


def command(config: Path, environment: dict[str, str], *words: str) -> str:
    """Run ``gpuproxy`` with `words` and return its standard output; a failure shows its standard error."""
    line = [str(GPUPROXY), *words, "-c", str(config)]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=START_S, check=False)
    assert done.returncode == 0, f"{' '.join(words)} ended with {done.returncode}: {done.stderr}"
    return done.stdout


def toml_table(head: str, values: Mapping[str, Any]) -> str:
    """Return one table of TOML; its strings, numbers and lists are written as JSON writes them."""
    return "\n".join([head, *(f"{json.dumps(key)} = {json.dumps(value)}" for key, value in values.items()), ""])


def upstream(name: str, protocol: str, url: str, **values: Any) -> str:
    """Return the configuration of one upstream."""
    return toml_table("[[upstreams]]", {"name": name, "protocol": protocol, "urls": [url], **values})


@contextmanager
def running_gateway(directory: Path, settings: str, secrets: Mapping[str, str]) -> Iterator[Gateway]:
    """Run a gateway in `directory`; at the end it must stop cleanly and have logged no traceback."""
    config, log = directory / "config.toml", directory / "log"
    server = {"port": 0, "workers": 2, "data_dir": str(directory / "data"), "drain_s": 2.0}
    store = toml_table("[store]", {"url": f"sqlite:///{directory}/g.db"})
    config.write_text(toml_table("[server]", server) + store + settings)
    environment = {**os.environ, **secrets}
    with log.open("wb") as errors:
        line = [str(GPUPROXY), "serve", "-c", str(config)]
        daemon = subprocess.Popen(line, env=environment, cwd=directory, stdout=subprocess.PIPE, stderr=errors)
        try:
            url = announced_url(daemon, log)
            gateway = Gateway(url, "", config, environment, log)
            gateway = gateway._replace(key=gateway.new_key("caller@example.com"))
            yield gateway
            assert daemon.poll() is None, f"the gateway ended with {daemon.returncode}: {log.read_text()}"
            daemon.send_signal(signal.SIGTERM)
            assert daemon.wait(STOP_S) == 0, log.read_text()
        finally:
            daemon.kill()
            daemon.wait()
            assert daemon.stdout is not None
            daemon.stdout.close()
    logged = log.read_text()
    assert "Traceback" not in logged, logged
    assert gateway.key not in logged


def announced_url(daemon: "subprocess.Popen[bytes]", log: Path) -> str:
    """Return where a daemon says that it listens."""
    assert daemon.stdout is not None
    readable, _, _ = select.select([daemon.stdout], [], [], START_S)
    said = daemon.stdout.readline().decode() if readable else ""
    found = re.search(r"listening on (http://\S+)", said)
    assert found, f"the gateway said {said!r}; its log: {log.read_text()}"
    return found[1]
