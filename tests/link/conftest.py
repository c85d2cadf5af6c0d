"""The link's tests share control's end of it."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from links import Site


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    made = Site(tmp_path / "link.sock")
    await made.start()
    yield made
    await made.stop()
