"""Node and packages from npm, for clients that are written in JavaScript."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

INSTALL_S = 120
RUN_S = 30
NODE, NPM = shutil.which("node"), shutil.which("npm")


def installed(request: pytest.FixtureRequest, *packages: str) -> Path:
    """Return a directory where Node finds these packages; npm puts them there once and for all runs."""
    if NODE is None or NPM is None:
        pytest.skip("node and npm are not installed")
    cache = getattr(request.config, "cache", None)
    if cache is None:
        pytest.skip("pytest keeps nothing over runs, so npm would fetch the packages each time")
    directory = Path(cache.mkdir("npm-" + "-".join(package.strip("@").replace("/", "-") for package in packages)))
    if not (directory / "done").exists():
        line = [NPM, "install", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix", str(directory), *packages]
        try:
            done = subprocess.run(line, capture_output=True, text=True, timeout=INSTALL_S, check=False)
        except subprocess.TimeoutExpired:
            pytest.skip(f"npm did not install {', '.join(packages)} within {INSTALL_S} s")
        if done.returncode:
            pytest.skip(f"npm cannot install {', '.join(packages)}: {done.stderr.strip()[-200:]}")
        (directory / "done").touch()
    return directory


def run(directory: Path, code: str, **variables: str) -> str:
    """Run a module that finds the packages of `directory`; return what it prints."""
    environment = {**os.environ, "NO_PROXY": "*", "no_proxy": "*", **variables}
    line = [str(NODE), "--input-type=module", "-e", code]
    done = subprocess.run(
        line, cwd=directory, env=environment, capture_output=True, text=True, timeout=RUN_S, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@contextmanager
def serving(directory: Path, code: str) -> Iterator[int]:
    """Run a module that serves, and prints its port first; yield that."""
    line = [str(NODE), "--input-type=module", "-e", code]
    with subprocess.Popen(line, cwd=directory, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            yield int(server.stdout.readline())
        finally:
            server.kill()
