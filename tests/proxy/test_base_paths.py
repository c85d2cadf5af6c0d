"""Targets below an upstream's base path."""

import pytest

from gpuproxy.errors import GatewayError
from gpuproxy.proxy.route import joined_path


@pytest.mark.parametrize(
    ("base_path", "path", "target"),
    [
        (b"", b"/v1/models", b"/v1/models"),
        (b"", b"?a=1", b"/?a=1"),
        (b"", b"/a/../b", b"/a/../b"),  # nothing to climb out of: byte-exact
        (b"/openai/v1", b"/v1/chat/completions", b"/openai/v1/chat/completions"),
        (b"/openai/v1", b"/v1?x", b"/openai/v1?x"),
        (b"/openai", b"/v1/models", b"/openai/v1/models"),
        (b"/mcp", b"", b"/mcp"),
        (b"/mcp", b"?session=1", b"/mcp?session=1"),
        (b"/mcp", b"/rest%2Fmore", b"/mcp/rest%2Fmore"),
        (b"/mcp", b"/a...b/.well-known?next=/../x", b"/mcp/a...b/.well-known?next=/../x"),
    ],
)
def test_a_path_is_put_below_the_base(base_path: bytes, path: bytes, target: bytes) -> None:
    assert joined_path(base_path, path) == target


@pytest.mark.parametrize(
    "path",
    [
        b"/..",
        b"/a/../../x",
        b"/%2e%2e/x",
        b"/.%2E/x",
        b"/a%2f..%2F..%2fx",
        b"/./x",
        b"/x/%2e",
        b"/..;a=1/x",
        b"/a\\..\\x",
        b"\\..",
        b"/%2e%2e;/x",
        b"/a%5c..%5Cx",
    ],
)
def test_a_path_must_not_climb_out_of_its_base(path: bytes) -> None:
    with pytest.raises(GatewayError, match="dot segments"):
        joined_path(b"/mcp", path)
