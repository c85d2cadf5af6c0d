"""What is compared: nginx and gpuproxy in front of the same fake upstream, each on one processor."""

import json
import os
import pwd
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from load import JSON, Load, request
from proc_cpu import children, command_line, tree
from programs import BenchmarkError, free_port, is_listening, program, started, tail, wait_until

_GATEWAY = [sys.executable, "-c", "from gpuproxy.cli import main; main()"]
_COMMAND_S = 30
_IN_FLIGHT = 1_000_000_000  # "never" for nginx's counts of calls per connection


@dataclass(frozen=True)
class Contender:
    """A proxy under load: `pid` is the root of all its processes, `worker_pid` the one that forwards."""

    name: str
    pid: int
    worker_pid: int
    json_port: int
    sse_port: int
    key: str

    def port(self, load: Load) -> int:
        """Return the port that takes this kind of call."""
        return self.json_port if load is JSON else self.sse_port


@contextmanager
def fake_upstream(cpu: int, home: Path) -> Iterator[int]:
    """Run the fake inference server; gives its port."""
    log = home / "upstream.log"
    script = Path(__file__).with_name("fake_upstream.py")
    with started([sys.executable, str(script)], cpu, log) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line.strip().isdigit():
            raise BenchmarkError(f"the fake upstream did not start:\n{tail(log)}")
        yield int(line)


_NGINX_CONFIG = """
daemon off;
{user}
worker_processes 1;
pid {home}/nginx.pid;
error_log stderr error;
events {{ worker_connections 4096; }}
http {{
    access_log off;
    server_tokens off;
    keepalive_requests {never};
    client_body_temp_path {home}/nginx-body;
    proxy_temp_path {home}/nginx-proxy;
    fastcgi_temp_path {home}/nginx-fastcgi;
    uwsgi_temp_path {home}/nginx-uwsgi;
    scgi_temp_path {home}/nginx-scgi;
    proxy_http_version 1.1;
    proxy_set_header Connection "";
    upstream inference {{
        server 127.0.0.1:{upstream_port};
        keepalive 128;
        keepalive_requests {never};
    }}
    server {{
        listen 127.0.0.1:{json_port};
        location / {{ proxy_pass http://inference; }}
    }}
    server {{
        listen 127.0.0.1:{sse_port};
        location / {{ proxy_pass http://inference; proxy_buffering off; }}
    }}
}}
"""


@contextmanager
def nginx(upstream_port: int, cpu: int, home: Path) -> Iterator[Contender]:
    """Run nginx with one worker as a plain proxy: pooled upstream connections, no access log."""
    json_port, sse_port = free_port(), free_port()
    user = f"user {pwd.getpwuid(os.geteuid()).pw_name};" if os.geteuid() == 0 else ""
    text = _NGINX_CONFIG.format(
        user=user,
        home=home,
        never=_IN_FLIGHT,
        upstream_port=upstream_port,
        json_port=json_port,
        sse_port=sse_port,
    )
    config, log = home / "nginx.conf", home / "nginx.log"
    config.write_text(text)
    command = [program("nginx"), "-e", "stderr", "-p", str(home), "-c", str(config)]
    with started(command, cpu, log) as process:
        wait_until(lambda: is_listening(json_port) and is_listening(sse_port), process, log, "nginx")
        wait_until(lambda: bool(children(process.pid)), process, log, "nginx's worker")
        yield Contender("nginx", process.pid, children(process.pid)[0], json_port, sse_port, "")


@contextmanager
def gpuproxy(upstream_port: int, cpu: int, home: Path) -> Iterator[Contender]:
    """Run a whole gateway with one worker: key checked, answers metered, receipts kept in SQLite."""
    port = free_port()
    config, log = home / "config.toml", home / "gpuproxy.log"
    config.write_text(_gateway_config(port, upstream_port, home))
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("GPUPROXY_")}
    environment = {**inherited, "GPUPROXY_CONFIG": str(config)}
    email = "benchmark@example.com"
    _run_gateway_command(environment, "migrate")
    _run_gateway_command(environment, "user", "create", email, "--credits", "1000000")
    key = _run_gateway_command(environment, "key", "create", "--user", email, "--rpm", "1000000000")
    with started([*_GATEWAY, "serve", "-c", str(config)], cpu, log, environment) as process:
        wait_until(lambda: _is_healthy(port), process, log, "gpuproxy")
        try:
            yield Contender("gpuproxy", process.pid, _worker_of(process.pid), port, port, key)
        except BenchmarkError as error:
            raise BenchmarkError(f"{error}\nThe gateway's log ends with:\n{tail(log)}") from error


def receipt_count(gateway: Contender) -> int:
    """Return how many calls the gateway's store knows of."""
    status, body = request(gateway.json_port, "GET", "/api/v1/user/usage", {"X-API-Key": gateway.key})
    if status != 200:
        raise BenchmarkError(f"the gateway answered {status} when asked for usage: {body[:500]!r}")
    count: int = json.loads(body)["data"]["requests"]
    return count


def _gateway_config(port: int, upstream_port: int, home: Path) -> str:
    return f"""
[server]
host = "127.0.0.1"
port = {port}
workers = 1
data_dir = {json.dumps(str(home / "data"))}

[store]
url = {json.dumps(f"sqlite:///{home}/gpuproxy.db")}

[[upstreams]]
name = "llm"
protocol = "openinference"
urls = ["http://127.0.0.1:{upstream_port}"]
models = ["mock-model"]
"""


def _run_gateway_command(environment: dict[str, str], *arguments: str) -> str:
    command = [*_GATEWAY, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_COMMAND_S)
    if done.returncode:
        raise BenchmarkError(f"gpuproxy {' '.join(arguments)} ended with {done.returncode}:\n{done.stderr}")
    return done.stdout.strip()


def _is_healthy(port: int) -> bool:
    try:
        return request(port, "GET", "/health", {})[0] == 200
    except OSError:
        return False


def _worker_of(supervisor_pid: int) -> int:
    """Return the one process below the supervisor that forwards."""
    below = {pid: command_line(pid) for pid in tree(supervisor_pid)[1:]}
    workers = [pid for pid, command in below.items() if "gpuproxy.proxy" in command]
    if len(workers) != 1:
        raise BenchmarkError(f"expected one worker among the gateway's processes: {below}")
    return workers[0]
