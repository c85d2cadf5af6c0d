"""What the guide prints for the shell, Node and Python, run as it is printed against a gateway with a market."""

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gpuproxy_plugins.simulated  # noqa: F401  # the market
import pytest
import requests

import gpuproxy

from .gateway import GPUPROXY, Gateway, announced_url, running_gateway, toml_table
from .guide import BLOCKS, filled, sample
from .node import NODE, installed

WAIT_S = 20
PASSWORD = "correct horse battery"
# Which test runs what; the rest of a name is in another file.
RUN_BY = {
    "Python Example": "test_the_python_class_lists_gpus",
    "Node.js Example": "test_the_node_class_lists_gpus_and_calls_through_the_gateway",
    "Webhook Support": "test_a_webhook_is_made",
    "Export User Account Data": "test_account_data_is_exported",
    "Bulk Export (Admin Only)": "test_all_users_are_exported",
    "Schema Access": "../store/test_contract_views.py",
    "HTTP/HTTPS Proxy": "test_integration_guide.py",
    "Model Context Protocol (MCP)": "test_integration_guide.py",
    "Open Inference Protocol": "test_integration_guide.py",
    "WebSocket Streaming": "test_websocket_sample.py",
    "Health Check Endpoint": "test_health_is_told",
    "Metrics Endpoint (Prometheus Compatible)": "test_the_metrics_of_the_guide_are_there",
    "Logging": "test_logs_are_json",
    "API Key Management": "test_a_key_is_made_and_the_old_one_revoked",
    "Rate Limiting": "test_a_limit_is_asked_for",
    "Payment Webhooks": "test_a_billing_webhook_is_made_without_a_content_type",
    "Credit System Integration": "test_credit_is_shown_and_added",
    "Complete Integration Example": "test_complete_example.py",
}


class Person(NamedTuple):
    """A user who has logged in."""

    id: str
    token: str
    key: str
    key_id: str


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    settings = toml_table("[plugins]", {"enabled": ["https", "mcp", "openinference", "simulated"]})
    settings += toml_table("[[providers]]", {"name": "simulated"}) + toml_table("[rates]", {"requests_per_minute": 0})
    with running_gateway(tmp_path_factory.mktemp("market"), settings, {}) as gateway:
        yield gateway


def ask(gateway: Gateway, method: str, path: str, body: Any = None, credential: str = "") -> Any:
    headers = {"Authorization": f"Bearer {credential}"} if credential else {}
    answer = requests.request(method, f"{gateway.url}/api/v1{path}", json=body, headers=headers, timeout=WAIT_S)
    assert answer.status_code < 300, answer.text
    return answer.json()


def person(gateway: Gateway, email: str) -> Person:
    """Open an account as the README does."""
    told = ask(gateway, "POST", "/auth/register", {"email": email, "password": PASSWORD})
    token = told["tokens"]["access_token"]
    made = ask(gateway, "POST", "/auth/apikey", {"name": "old"}, token)
    return Person(told["user"]["id"], token, made["api_key"], made["id"])


@pytest.fixture(scope="module")
def ann(gateway: Gateway) -> Person:
    return person(gateway, "ann@example.com")


@pytest.fixture(scope="module")
def admin(gateway: Gateway) -> Person:
    gateway.command("user", "create", "root@example.com", "--admin")
    root = gateway.command("key", "create", "--user", "root@example.com", "--scopes", "admin").strip()
    made = person(gateway, "admin@example.com")
    ask(gateway, "PATCH", f"/admin/users/{made.id}", {"is_admin": True}, root)
    told = ask(gateway, "POST", "/auth/login", {"email": "admin@example.com", "password": PASSWORD})
    return made._replace(token=told["tokens"]["access_token"])


def host(gateway: Gateway) -> str:
    return gateway.url.removeprefix("http://")


def bash(code: str, directory: Path) -> str:
    """Run what the guide prints for a shell; every command of it must go well."""
    line = ["bash", "-euo", "pipefail", "-c", code]
    done = subprocess.run(line, cwd=directory, capture_output=True, text=True, timeout=WAIT_S, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_sample_of_the_guide_is_run_by_a_test() -> None:
    assert [block.heading for block in BLOCKS] == list(RUN_BY)
    here = Path(__file__).parent
    for heading, name in RUN_BY.items():
        file = here / name if name.endswith(".py") else Path(__file__)
        assert f'sample("{heading}")' in file.read_text()
        assert name.endswith(".py") or name in globals()


def test_the_python_class_lists_gpus(gateway: Gateway, ann: Person, capsys: pytest.CaptureFixture[str]) -> None:
    code = filled(sample("Python Example"), host(gateway), **{"your-api-key": ann.key})
    names: dict[str, Any] = {}
    exec(compile(code, "sample", "exec"), names)
    assert capsys.readouterr().out == f"Found {names['gpus']['count']} GPUs\n"
    offer = names["gpus"]["data"][0]
    refused = names["client"].create_instance("simulated", offer["id"])
    assert refused["code"] == "INSUFFICIENT_CREDITS"


@pytest.fixture(scope="module")
def with_axios(request: pytest.FixtureRequest) -> Path:
    return installed(request, "axios@1")


def test_the_node_class_lists_gpus_and_calls_through_the_gateway(
    gateway: Gateway, ann: Person, with_axios: Path
) -> None:
    code = filled(sample("Node.js Example"), host(gateway), **{"your-api-key": ann.key})
    more = "const refused = await client.proxyRequest('https', 'http://127.0.0.1:1/x').catch(e => e.response.data);\n"
    more += "console.log(refused.code);\n"
    whole = f"(async () => {{\n{code}{more}}})()"  # the sample awaits outside of any function
    environment = {**os.environ, "NO_PROXY": "*", "no_proxy": "*"}
    line = [str(NODE), "-e", whole]
    done = subprocess.run(
        line, cwd=with_axios, env=environment, capture_output=True, text=True, timeout=WAIT_S, check=False
    )
    assert done.returncode == 0, done.stderr
    found, code = done.stdout.splitlines()
    assert (found.split()[0], int(found.split()[1]) > 0, code) == ("Found", True, "TARGET_FORBIDDEN")


def test_a_webhook_is_made(gateway: Gateway, ann: Person, tmp_path: Path) -> None:
    told = json.loads(bash(filled(sample("Webhook Support"), host(gateway), YOUR_API_KEY=ann.key), tmp_path))
    assert (told["status"], told["secret"]) == ("success", "webhook-secret-for-verification")
    assert told["id"] in [each["id"] for each in ask(gateway, "GET", "/webhooks", None, ann.token)["data"]]


def test_account_data_is_exported(gateway: Gateway, ann: Person, tmp_path: Path) -> None:
    bash(filled(sample("Export User Account Data"), host(gateway), YOUR_API_KEY=ann.key), tmp_path)
    text = (tmp_path / "account-data.json").read_text()
    data = json.loads(text)["data"]
    assert set(data) >= {"profile", "api_keys", "quotas", "gpu_usage", "transactions", "credit_history"}
    assert (data["profile"]["id"], ann.key in text) == (ann.id, False)


def test_all_users_are_exported(gateway: Gateway, ann: Person, admin: Person, tmp_path: Path) -> None:
    bash(filled(sample("Bulk Export (Admin Only)"), host(gateway), ADMIN_JWT=admin.token), tmp_path)
    exported = json.loads((tmp_path / "users-export.json").read_text())
    assert {ann.id, admin.id} <= {each["id"] for each in exported["data"]}


def test_health_is_told(gateway: Gateway, tmp_path: Path) -> None:
    told = json.loads(bash(filled(sample("Health Check Endpoint"), host(gateway)), tmp_path))
    assert set(told) >= {"status", "timestamp", "version", "services"}
    assert (told["status"], told["services"]["database"]) == ("ok", "healthy")


def test_the_metrics_of_the_guide_are_there(gateway: Gateway, ann: Person, tmp_path: Path) -> None:
    told = bash(filled(sample("Metrics Endpoint (Prometheus Compatible)"), host(gateway)), tmp_path)
    for name in ("requests_total", "active_instances", "latency_seconds", "errors_total"):
        assert f"# TYPE gpuproxy_{name} " in told


def test_logs_are_json(tmp_path: Path) -> None:
    """The daemon has another name than in the guide; a script of that name stands for it."""
    config, program = tmp_path / "config.toml", tmp_path / "bin" / "aiserve-gpuproxyd"
    config.write_text('[server]\nport = 0\nworkers = 1\ndata_dir = "data"\n')
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\nexec {GPUPROXY} serve -c {config}\n")
    program.chmod(0o755)
    with (tmp_path / "log").open("wb") as errors:
        line = ["bash", "-euc", sample("Logging")]
        daemon = subprocess.Popen(line, cwd=tmp_path, stdout=subprocess.PIPE, stderr=errors, start_new_session=True)
        try:
            announced_url(daemon, tmp_path / "log")
        finally:
            os.killpg(daemon.pid, signal.SIGTERM)
            daemon.wait(WAIT_S)
            assert daemon.stdout is not None
            daemon.stdout.close()
    lines = [json.loads(each) for each in (tmp_path / "log").read_text().splitlines()]
    assert lines
    assert all({"level", "timestamp", "message"} <= set(each) for each in lines)
    assert "debug" in {each["level"] for each in lines}


@pytest.mark.skipif(shutil.which("jq") is None, reason="jq is not installed")
def test_a_key_is_made_and_the_old_one_revoked(gateway: Gateway, ann: Person, tmp_path: Path) -> None:
    old = ask(gateway, "POST", "/auth/apikey", {"name": "to be revoked"}, ann.token)
    token = {"Bearer JWT": f"Bearer {ann.token}"}
    code = filled(sample("API Key Management"), host(gateway), OLD_KEY_ID=old["id"], **token)
    revoked, new = bash(f'{code}\necho && echo "$NEW_KEY"\n', tmp_path).splitlines()
    assert json.loads(revoked)["id"] == old["id"]
    assert ask(gateway, "GET", "/user/profile", None, new)["id"] == ann.id
    url = f"{gateway.url}/api/v1/user/profile"
    assert requests.get(url, headers={"X-API-Key": old["api_key"]}, timeout=WAIT_S).status_code == 401


def test_a_limit_is_asked_for(gateway: Gateway, ann: Person, tmp_path: Path) -> None:
    told = json.loads(bash(filled(sample("Rate Limiting"), host(gateway), **{": KEY": f": {ann.key}"}), tmp_path))
    assert (told["status"], told["count"] > 0) == ("success", True)


def test_a_billing_webhook_is_made_without_a_content_type(gateway: Gateway, ann: Person, tmp_path: Path) -> None:
    told = json.loads(bash(filled(sample("Payment Webhooks"), host(gateway), **{": KEY": f": {ann.key}"}), tmp_path))
    assert (told["status"], told["kind"]) == ("success", "billing")
    assert sorted(told["events"]) == ["payment.failed", "payment.success", "subscription.renewed"]


def test_credit_is_shown_and_added(
    gateway: Gateway, ann: Person, admin: Person, capsys: pytest.CaptureFixture[str]
) -> None:
    code = sample("Credit System Integration")
    assert "'uuid'" in code
    with gpuproxy.Client(f"{gateway.url}/api/v1", admin.token) as client:
        exec(compile(code.replace("'uuid'", repr(ann.id)), "sample", "exec"), {"client": client})
    assert capsys.readouterr().out == "Remaining: 0.0\nTotal: 0.0\n"
    assert ask(gateway, "GET", "/user/credits", None, ann.token)["credits_remaining"] == 100.0
