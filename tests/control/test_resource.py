"""Protected resource metadata: what clients of MCP servers compare with the URL they call."""

from typing import Any

import pytest
from mcp.client.auth.utils import build_protected_resource_metadata_discovery_urls
from mcp.shared.auth import ProtectedResourceMetadata
from mcp.shared.auth_utils import check_resource_allowed

from gpuproxy.config import Config, build

from .conftest import Api

SERVERS = ["https://login.example.com", "https://other.example.com/realm"]
ROOT = "/.well-known/oauth-protected-resource"
MCP = "/api/v1/gpu/proxy/mcp/tools"
SEEN = {"X-Forwarded-Proto": "https", "X-Forwarded-Host": "gw.example.com:8443"}


@pytest.fixture
async def settings(request: pytest.FixtureRequest) -> Config:
    """Return the configuration."""
    marked = request.node.get_closest_marker("parametrize")
    tree: dict[str, Any] = request.getfixturevalue("tree") if marked and "tree" in marked.args[0] else {}
    return build({"mcp": {"authorization_servers": SERVERS}, **tree})


async def told(api: Api, path: str) -> Any:
    status, body = await api.call("GET", path, headers=SEEN)
    assert status == 200
    return body


async def test_the_resource_is_the_url_the_client_calls(api: Api) -> None:
    metadata = await told(api, ROOT + MCP)
    assert metadata == {
        "resource": f"https://gw.example.com:8443{MCP}",
        "authorization_servers": SERVERS,
        "bearer_methods_supported": ["header"],
    }


async def test_the_official_client_takes_what_it_finds(api: Api) -> None:
    url = f"https://gw.example.com:8443{MCP}"
    for found in build_protected_resource_metadata_discovery_urls(None, url):
        told_there = await told(api, found.removeprefix("https://gw.example.com:8443"))
        metadata = ProtectedResourceMetadata.model_validate(told_there)
        assert check_resource_allowed(url, str(metadata.resource))


@pytest.mark.parametrize("tree", [{"server": {"public_url": "https://pub.example/gpu/"}}], ids=["public"])
async def test_a_public_url_goes_before_what_is_seen(api: Api, tree: dict[str, Any]) -> None:
    assert (await told(api, ROOT + MCP))["resource"] == f"https://pub.example/gpu{MCP}"
    assert (await told(api, ROOT))["resource"] == "https://pub.example/gpu"


@pytest.mark.parametrize("tree", [{"mcp": {}}], ids=["none"])
async def test_without_authorization_servers_there_is_nothing(api: Api, tree: dict[str, Any]) -> None:
    for path in (ROOT, ROOT + MCP):
        status, body = await api.call("GET", path)
        assert (status, body["code"]) == (404, "NOT_FOUND")
        assert "[mcp] authorization_servers" in body["error"]


async def test_a_page_of_any_origin_may_read_it(api: Api) -> None:
    async with api.client.get(ROOT) as answer:
        assert answer.headers["Access-Control-Allow-Origin"] == "*"
