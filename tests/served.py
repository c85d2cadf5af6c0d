"""The demo's gateway with everything behind it, for tests that come from outside as a client does."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from gpuproxy.demo.tour import CONFIG, serving
from gpuproxy.demo.upstream import MODELS, running


class Served(NamedTuple):
    """Where the gateway and the inference server are."""

    url: str
    upstream: str


def store_url(directory: Path) -> str:
    """Return where the gateway of this directory keeps its store; accounts may be opened there before it starts."""
    return f"sqlite:///{directory}/gpuproxy.db"


@contextmanager
def served(directory: Path) -> Iterator[Served]:
    """Serve until the block ends."""
    with running() as upstream:
        rented = upstream.removeprefix("http://")
        places = {"host": "127.0.0.1", "port": 0, "directory": directory, "upstream": upstream, "rented": rented}
        config = directory / "config.toml"
        config.write_text(CONFIG.format(**places, models=json.dumps(list(MODELS))))
        with serving(config, directory / "log") as gateway:
            yield Served(gateway.url, upstream)
