"""Calls to paste, complete with address and key; the tests run them as they stand."""

CURL = """\
curl -N {url}/v1/chat/completions \\
  -H "Authorization: Bearer {key}" -H "Content-Type: application/json" \\
  -d '{{"model": "demo-chat", "stream": true, "messages": [{{"role": "user", "content": "What is 17 * 23?"}}]}}'"""

OPENAI = """\
from openai import OpenAI

client = OpenAI(base_url="{url}/api/v1/gpu/proxy/v1", api_key="{key}")
messages = [{{"role": "user", "content": "What does a gateway do?"}}]
for chunk in client.chat.completions.create(model="demo-chat", messages=messages, stream=True):
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()"""

MCP = """\
import asyncio, httpx2
from mcp import Client
from mcp.client.streamable_http import streamable_http_client

async def main():
    http = httpx2.AsyncClient(headers={{"Authorization": "Bearer {key}"}})
    url = "{url}/api/v1/gpu/proxy/mcp/demo-tools"
    async with http, Client(streamable_http_client(url, http_client=http)) as client:
        print([tool.name for tool in (await client.list_tools()).tools])
        print(await client.call_tool("add", {{"a": 2, "b": 3}}))

asyncio.run(main())"""

INFER = """\
curl {url}/api/v1/gpu/proxy/v2/models/iris-centroids/infer \\
  -H "X-API-Key: {key}" -H "Content-Type: application/json" \\
  -d '{{"inputs": [{{"name": "features", "shape": [1, 4], "datatype": "FP32", "data": [5.1, 3.5, 1.4, 0.2]}}]}}'"""

ENVELOPE = """\
curl {url}/api/v1/gpu/proxy \\
  -H "X-API-Key: {key}" -H "Content-Type: application/json" \\
  -d '{{"protocol": "openinference", "target_url": "{upstream}",
       "body": {{"model": "demo-chat", "messages": [{{"role": "user", "content": "Hello!"}}]}}}}'"""

RENT = """\
import httpx

api = httpx.Client(base_url="{url}/api/v1", headers={{"X-API-Key": "{key}"}}, timeout=120)
gpu = api.get("/gpu/instances", params={{"min_vram": 16}}).json()["data"][0]
rented = api.post(f"/gpu/instances/{{gpu['provider']}}/{{gpu['id']}}", json={{"wait": True}}).json()["data"]
print(rented["gpu_model"], "at", rented["price_per_hour"], "USD an hour is", rented["status"])
chat = {{"model": "demo-chat", "messages": [{{"role": "user", "content": "Hello, GPU!"}}]}}
print(api.post(f"/gpu/proxy/instances/{{rented['contract_id']}}/8000/v1/chat/completions", json=chat).text)
target = f"http://{{rented['ip']}}:8000/v1/chat/completions"
call = {{"protocol": "https", "target_url": target, "body": chat}}
print(api.post("/gpu/proxy", json=call).json()["status_code"])
print(api.delete(f"/gpu/instances/{{gpu['provider']}}/{{rented['contract_id']}}").json()["data"]["status"])"""

USAGE = """\
curl {url}/api/v1/user/usage -H "X-API-Key: {key}\""""

TITLES = {
    "curl, streamed": CURL,
    "Python, OpenAI SDK (pip install openai)": OPENAI,
    "Python, MCP SDK (pip install mcp)": MCP,
    "curl, Open Inference: which iris is this?": INFER,
    "curl, envelope: any protocol in one JSON form": ENVELOPE,
    "Python, rent a GPU (a simulated one), call it by contract and by address, destroy it": RENT,
    "curl, what all this used": USAGE,
}


def all_of(url: str, key: str, upstream: str) -> dict[str, str]:
    """Return each call under its title."""
    return {title: text.format(url=url, key=key, upstream=upstream) for title, text in TITLES.items()}
