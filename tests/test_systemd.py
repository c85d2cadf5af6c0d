"""The systemd units: valid, hardened, and in step with the configuration."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gpuproxy.config import Config, load
from gpuproxy.supervisor import _inherited_socket

UNITS = Path(__file__).parent.parent / "systemd"
EXPOSURE_MAX = 15  # tenths; what systemd-analyze rates as 1.5
STOP_GRACE_S = 30  # of the supervisor, on top of drain_s: 15 s for workers, 15 s for control
ANALYZE = shutil.which("systemd-analyze")
has_systemd = pytest.mark.skipif(ANALYZE is None, reason="systemd-analyze is not installed")


def directives(unit: str) -> dict[str, str]:
    """Return the directives of a unit; the last of equal ones wins."""
    text = (UNITS / unit).read_text()
    return dict(re.findall(r"^([A-Za-z]+)=(.*)$", text, re.MULTILINE))


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """Copy the units, with a program to start that is there."""
    for unit in UNITS.iterdir():
        text = re.sub(r"^ExecStart=\S+", f"ExecStart={sys.executable}", unit.read_text(), flags=re.MULTILINE)
        (tmp_path / unit.name).write_text(text)
    return tmp_path


def analyze(*words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([str(ANALYZE), *words], capture_output=True, text=True, timeout=60, check=False)


@has_systemd
def test_systemd_accepts_the_units(installed: Path) -> None:
    done = analyze("verify", "--man=no", *(str(path) for path in installed.iterdir()))
    ours = [line for line in done.stderr.splitlines() if "gpuproxy" in line]
    assert (done.returncode, ours) == (0, [])


@has_systemd
def test_the_service_is_hardened(installed: Path) -> None:
    service = str(installed / "gpuproxy.service")
    done = analyze("security", "--offline=true", "--no-pager", f"--threshold={EXPOSURE_MAX}", service)
    assert done.returncode == 0, done.stdout[-300:] + done.stderr


def test_the_service_is_locked_in_whatever_systemd_is_here() -> None:
    service = directives("gpuproxy.service")
    for name in ("NoNewPrivileges", "PrivateTmp", "PrivateDevices", "ProtectHome", "DynamicUser"):
        assert service[name] == "true", name
    assert service["ProtectSystem"] == "strict"
    assert service["CapabilityBoundingSet"] == service["AmbientCapabilities"] == ""
    assert service["SystemCallFilter"].startswith("~@privileged")


def test_systemd_waits_until_the_drain_is_over() -> None:
    assert int(directives("gpuproxy.service")["TimeoutStopSec"]) >= Config().server.drain_s + STOP_GRACE_S


def test_the_environment_of_the_service_is_a_valid_configuration() -> None:
    settings = re.findall(r"^Environment=(\S+?)=(.*)$", (UNITS / "gpuproxy.service").read_text(), re.MULTILINE)
    config = load(None, dict(settings))
    state = directives("gpuproxy.service")["StateDirectory"]
    assert config.server.data_dir.startswith(f"/var/lib/{state}/")


def test_service_and_socket_belong_together() -> None:
    service, socket = directives("gpuproxy.service"), directives("gpuproxy.socket")
    assert service["Requires"] == service["Also"] == "gpuproxy.socket"
    assert socket["ListenStream"].endswith(f":{Config().server.port}")
    assert int(socket["Backlog"]) == 4096


def test_several_sockets_are_refused_for_only_one_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
    monkeypatch.setenv("LISTEN_FDS", "2")
    with pytest.raises(OSError, match="hands over 2 sockets; leave one ListenStream"):
        _inherited_socket()
