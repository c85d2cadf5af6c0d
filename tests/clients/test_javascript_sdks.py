"""The official JavaScript SDKs of OpenAI, Anthropic and MCP, unmodified, through the gateway."""

import json
import time
from pathlib import Path
from typing import Any

import httpx2
import pytest

from .conftest import Way
from .gateway import WAIT_S, Gateway
from .node import installed, run, serving
from .test_mcp_group import url_of
from .test_mcp_group_streams import group, shelf, shelf_thread  # noqa: F401  # fixtures
from .test_mcp_replicas import Twins, twins  # noqa: F401  # a fixture
from .test_mcp_sdk import LEGACY, MODERN

PACKAGES = "openai@6", "@anthropic-ai/sdk", "@modelcontextprotocol/sdk@1", "@modelcontextprotocol/client@2"
TEXT = "Grüße aus Łódź, 你好 🙂"

OPENAI = """
import OpenAI from "openai";
const client = new OpenAI({ baseURL: process.env.URL + "/v1", apiKey: process.env.KEY, maxRetries: 0 });
const messages = [{ role: "user", content: process.env.TEXT }];
const whole = await client.chat.completions.create({ model: "chat", messages });
let text = "", usages = 0;
for await (const chunk of await client.chat.completions.create({ model: "chat", messages, stream: true })) {
  text += chunk.choices[0].delta.content ?? "";
  usages += chunk.usage ? 1 : 0;
}
const refused = await client.chat.completions.create({ model: "none", messages }).catch((error) => error);
console.log(JSON.stringify({ whole: whole.choices[0].message.content, tokens: whole.usage.completion_tokens, text,
  usages, status: refused.status, kind: refused.constructor.name, code: refused.code }));
"""

ANTHROPIC = """
import Anthropic from "@anthropic-ai/sdk";
const client = new Anthropic({ baseURL: process.env.URL, apiKey: process.env.KEY, maxRetries: 0 });
const ask = { model: "chat", max_tokens: 64, messages: [{ role: "user", content: process.env.TEXT }] };
const whole = await client.messages.create(ask);
const streamed = await client.messages.stream(ask).finalMessage();
const refused = await client.messages.create({ ...ask, model: "none" }).catch((error) => error);
console.log(JSON.stringify({ whole: whole.content[0].text, streamed: streamed.content[0].text,
  tokens: streamed.usage.output_tokens, status: refused.status, kind: refused.constructor.name }));
"""

MCP = """
const { Client, StreamableHTTPClientTransport } = process.env.SDK === "2"
  ? await import("@modelcontextprotocol/client")
  : { ...await import("@modelcontextprotocol/sdk/client/index.js"),
      ...await import("@modelcontextprotocol/sdk/client/streamableHttp.js") };
const use = async () => {
  const client = new Client({ name: "test", version: "1" });
  const headers = { "X-API-Key": process.env.KEY };
  const transport = new StreamableHTTPClientTransport(new URL(process.env.URL), { requestInit: { headers } });
  await client.connect(transport);
  const tools = (await client.listTools()).tools.map((tool) => tool.name);
  const servers = new Set();
  for (let call = 0; call < 6; call++) {
    servers.add((await client.callTool({ name: "who", arguments: {} })).content[0].text);
  }
  const sum = await client.callTool({ name: "add", arguments: { a: 2, b: 3 } });
  const session = transport.sessionId, version = transport.protocolVersion;
  await transport.terminateSession?.();
  await client.close();
  return { tools, servers: [...servers], sum: sum.content[0].text, session, version };
};
console.log(JSON.stringify(await Promise.all(Array.from({ length: 8 }, use))));
"""

GROUP = """
const two = process.env.SDK === "2";
const { Client, StreamableHTTPClientTransport } = two
  ? await import("@modelcontextprotocol/client")
  : { ...await import("@modelcontextprotocol/sdk/client/index.js"),
      ...await import("@modelcontextprotocol/sdk/client/streamableHttp.js") };
const types = two ? {} : await import("@modelcontextprotocol/sdk/types.js");
const options = { capabilities: { elicitation: {} }, versionNegotiation: { mode: process.env.MODE } };
const client = new Client({ name: "test", version: "1" }, options);
client.setRequestHandler(two ? "elicitation/create" : types.ElicitRequestSchema,
  async () => ({ action: "accept", content: { city: "Łódź" } }));
let heard = 0;
client.setNotificationHandler(two ? "notifications/tools/list_changed" : types.ToolListChangedNotificationSchema,
  () => { heard++; });
const headers = { "X-API-Key": process.env.KEY };
const transport = new StreamableHTTPClientTransport(new URL(process.env.URL), { requestInit: { headers } });
await client.connect(transport);
const call = async (name, args = {}) => (await client.callTool({ name, arguments: args })).content[0].text;
const version = client.getNegotiatedProtocolVersion?.() ?? transport.protocolVersion;
const tools = (await client.listTools()).tools.map((tool) => tool.name);
const resources = (await client.listResources()).resources.map((each) => each.uri);
const read = (await client.readResource({ uri: resources[0] })).contents[0];
const ordered = await call("tools__order", { what: "tea" });
const subscription = process.env.MODE === "auto" ? await client.listen({ toolsListChanged: true }) : undefined;
while (!heard) await call(subscription ? "news__change" : "tools__announce");
await subscription?.close();
await transport.terminateSession?.();
await client.close();
console.log(JSON.stringify({ version, tools, resources, read, ordered }));
"""

OLDER_SERVER = """
import { createServer } from "node:http";
import { randomUUID } from "node:crypto";
import { z } from "zod";
import { McpServer } from "@modelcontextprotocol/sdk/server/mcp.js";
import { StreamableHTTPServerTransport } from "@modelcontextprotocol/sdk/server/streamableHttp.js";
const sessions = new Map();
const begin = async () => {
  const transport = new StreamableHTTPServerTransport({
    sessionIdGenerator: randomUUID, onsessioninitialized: (id) => { sessions.set(id, transport); } });
  transport.onclose = () => { sessions.delete(transport.sessionId); };
  const server = new McpServer({ name: "older", version: "1" });
  server.registerTool("add", { inputSchema: { a: z.number(), b: z.number() } },
    async ({ a, b }) => ({ content: [{ type: "text", text: `${a + b} in ${sessions.size}` }] }));
  await server.connect(transport);
  return transport;
};
const server = createServer(async (request, response) => {
  if (request.url === "/sessions") { response.end(String(sessions.size)); return; }
  const transport = sessions.get(request.headers["mcp-session-id"]) ?? await begin();
  await transport.handleRequest(request, response);
});
server.listen(0, "127.0.0.1", () => { console.log(server.address().port); });
"""


@pytest.fixture(scope="module")
def packages(request: pytest.FixtureRequest) -> Path:
    return installed(request, *PACKAGES)


def told_by(packages: Path, code: str, way: Way) -> Any:
    return json.loads(run(packages, code, URL=way.url, KEY=way.key, TEXT=TEXT))


def test_the_openai_client_reads_answers_streams_and_refusals(way: Way, packages: Path) -> None:
    told = told_by(packages, OPENAI, way)
    assert (told["whole"], told["text"]) == (f"echo: {TEXT}",) * 2
    assert told["tokens"] > 0
    assert told["usages"] == 0
    if way.name == "gateway":
        assert (told["status"], told["kind"], told["code"]) == (404, "NotFoundError", "model_not_found")


def test_the_anthropic_client_reads_answers_streams_and_refusals(way: Way, packages: Path) -> None:
    told = told_by(packages, ANTHROPIC, way)
    assert told["whole"] == told["streamed"]
    assert TEXT in told["whole"]
    assert told["tokens"] > 0
    if way.name == "gateway":
        assert (told["status"], told["kind"]) == (404, "NotFoundError")


@pytest.mark.parametrize("sdk", ["1", "2"])
def test_sessions_of_the_mcp_client_stay_at_one_of_two_servers(twins: Twins, packages: Path, sdk: str) -> None:  # noqa: F811
    uses = json.loads(run(packages, MCP, URL=twins.url("twins"), KEY=twins.gateway.key, SDK=sdk))
    assert [(use["version"], use["sum"], len(use["servers"])) for use in uses] == [(LEGACY, "5", 1)] * 8
    assert all({"add", "who"} <= set(use["tools"]) for use in uses)
    assert len({use["session"] for use in uses}) == 8
    assert {use["servers"][0] for use in uses} == {"first", "second"}


@pytest.mark.parametrize(("sdk", "mode"), [("1", "legacy"), ("2", "legacy"), ("2", "auto")])
def test_the_mcp_client_uses_a_group(group: Gateway, packages: Path, sdk: str, mode: str) -> None:  # noqa: F811
    told = json.loads(run(packages, GROUP, URL=url_of(group), KEY=group.key, SDK=sdk, MODE=mode))
    assert told["version"] == (MODERN if mode == "auto" else LEGACY)
    assert {"tools__add", "news__change"} <= set(told["tools"])
    assert told["resources"] == ["news+news://today"]
    assert (told["read"]["uri"], told["read"]["text"]) == ("news+news://today", "none")
    assert told["ordered"] == "tea goes to Łódź"


def test_an_envelope_calls_a_server_of_sessions_and_leaves_none_behind(gateway: Gateway, packages: Path) -> None:
    with serving(packages, OLDER_SERVER) as port:
        url = f"http://127.0.0.1:{port}"
        body = {"method": "tools/call", "params": {"name": "add", "arguments": {"a": 2, "b": 3}}}
        envelope = {"protocol": "mcp", "target_url": f"{url}/mcp", "body": body}
        headers = {"X-API-Key": gateway.key}
        answer = httpx2.post(f"{gateway.url}/api/v1/gpu/proxy", json=envelope, headers=headers, timeout=WAIT_S).json()
        assert answer["data"]["result"]["content"][0]["text"] == "5 in 1"
        deadline_s = time.monotonic() + WAIT_S
        while (count := httpx2.get(f"{url}/sessions").text) != "0" and time.monotonic() < deadline_s:
            time.sleep(0.01)
        assert count == "0"
