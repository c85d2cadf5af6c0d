"""The code is clean by the tools people run too: ruff, mypy, import-linter."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TOOLS = Path(sys.executable).parent
CHECKS = {"ruff": ["ruff", "check", "."], "mypy": ["mypy"], "import-linter": ["lint-imports", "--no-cache"]}


@pytest.mark.parametrize("check", CHECKS)
def test_there_is_nothing_to_complain_about(check: str) -> None:
    tool, *words = CHECKS[check]
    done = subprocess.run([str(TOOLS / tool), *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
