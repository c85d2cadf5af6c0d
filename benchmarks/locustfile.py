"""People and programs of several kinds at once, for locust: small calls, streams, envelopes, tools, the management API.

It looks for faults under mixed load, and for how long callers wait; what a call costs is measured by ``compare.py``.
Every answer is read to its end and looked into: a stream without its end or a tool that failed counts as a failure.
"""

import itertools
import time
from collections.abc import Iterable
from typing import Any

from locust import HttpUser, between, events, task

PROXY = "/api/v1/gpu/proxy"
STREAM_END = b"data: [DONE]"
MCP_VERSION = "2025-11-25"
MS_PER_S = 1_000.0

_numbers = itertools.count(1)


@events.init_command_line_parser.add_listener
def add_options(parser: Any) -> None:
    """Ask for what a gateway has: a key, and the names of what it serves, which are those of `gpuproxy demo`."""
    parser.add_argument("--key", env_var="GPUPROXY_KEY", default="", is_secret=True, help="an API key")
    parser.add_argument("--model", default="demo-chat", help="a chat model")
    parser.add_argument("--tools", default="demo-tools", help="an MCP upstream with a tool `add`; empty: no tools")
    parser.add_argument("--target", default="", help="the URL of an inference server, for envelopes; empty: none")


class Caller(HttpUser):
    """Somebody with the key."""

    abstract = True

    def on_start(self) -> None:
        """Show the key with every call."""
        self.options = self.environment.parsed_options
        self.client.headers["Authorization"] = f"Bearer {self.options.key}"

    def send(self, name: str, path: str, body: Any = None, **more: Any) -> Any:
        """Make a call that must bring JSON; return it, None if it failed."""
        method = "GET" if body is None else "POST"
        with self.client.request(method, path, json=body, name=name, catch_response=True, **more) as answer:
            if not answer.ok:
                answer.failure(f"{answer.status_code}: {answer.text[:200]}")
                return None
            return answer.json()

    def chat(self, is_stream: bool = False) -> dict[str, Any]:
        """Return the body of a chat call, another one each time."""
        question = f"What is {next(_numbers)} * 23?"
        messages = [{"role": "user", "content": question}]
        return {"model": self.options.model, "messages": messages, "stream": is_stream}


class Chatter(Caller):
    """Calls a model: mostly small calls, some streams, some envelopes."""

    weight = 6
    wait_time = between(0.05, 0.2)

    def on_start(self) -> None:
        """See which models there are."""
        super().on_start()
        self.models()

    @task(10)
    def small_call(self) -> None:
        """Ask and get one answer, with what it used."""
        told = self.send("chat", "/v1/chat/completions", self.chat())
        assert told is None or told["usage"]["completion_tokens"] > 0

    @task(4)
    def stream(self) -> None:
        """Read a stream to its end; its time is that of its end, and of its first event under another name."""
        begin = time.perf_counter()
        call: dict[str, Any] = {
            "json": self.chat(is_stream=True),
            "stream": True,
            "name": "chat, stream",
            "catch_response": True,
        }
        with self.client.post(f"{PROXY}/v1/chat/completions", **call) as answer:
            lines = [line for line in self._lines(answer, begin) if line]
            answer.request_meta["response_time"] = (time.perf_counter() - begin) * MS_PER_S
            answer.request_meta["response_length"] = sum(map(len, lines))
            if not answer.ok or not lines or lines[-1] != STREAM_END:
                answer.failure(f"{answer.status_code}: a stream that ends with {lines[-1:]!r}")

    def _lines(self, answer: Any, begin: float) -> Iterable[bytes]:
        for at, line in enumerate(answer.iter_lines(chunk_size=None)):
            if at == 0:
                waited_ms = (time.perf_counter() - begin) * MS_PER_S
                fields: dict[str, Any] = {
                    "request_type": "POST",
                    "name": "chat, first event",
                    "exception": None,
                    "context": {},
                }
                self.environment.events.request.fire(response_time=waited_ms, response_length=len(line), **fields)
            yield line

    @task(2)
    def envelope(self) -> None:
        """Send a call in the envelope, and get the answer in one."""
        if self.options.target:
            body = {"protocol": "openinference", "target_url": self.options.target, "body": self.chat()}
            told = self.send("envelope", PROXY, body)
            assert told is None or told["status_code"] == 200

    @task(1)
    def models(self) -> None:
        """List the models."""
        self.send("models", "/v1/models")


class ToolUser(Caller):
    """Keeps an MCP session and calls a tool in it."""

    weight = 2
    wait_time = between(0.1, 0.5)

    def on_start(self) -> None:
        """Begin a session."""
        super().on_start()
        if not self.options.tools:
            return
        self.client.headers["Accept"] = "application/json, text/event-stream"
        client = {"name": "locust", "version": "1"}
        asked = {"protocolVersion": MCP_VERSION, "capabilities": {}, "clientInfo": client}
        with self._rpc("mcp, initialize", "initialize", asked) as answer:
            self.client.headers["Mcp-Protocol-Version"] = answer.json()["result"]["protocolVersion"]
            if session := answer.headers.get("Mcp-Session-Id"):
                self.client.headers["Mcp-Session-Id"] = session
        note = {"jsonrpc": "2.0", "method": "notifications/initialized"}
        self.client.post(f"{PROXY}/mcp/{self.options.tools}", json=note, name="mcp, initialized")

    @task
    def call_tool(self) -> None:
        """Call a tool and check what it says."""
        if not self.options.tools:
            return
        number = next(_numbers)
        with self._rpc("mcp, tool", "tools/call", {"name": "add", "arguments": {"a": number, "b": 2}}) as answer:
            if answer.ok and str(number + 2) not in answer.text:
                answer.failure(f"not the sum: {answer.text[:200]}")

    def on_stop(self) -> None:
        """End the session."""
        if self.options.tools:
            self.client.delete(f"{PROXY}/mcp/{self.options.tools}", name="mcp, end")

    def _rpc(self, name: str, method: str, params: dict[str, Any]) -> Any:
        body = {"jsonrpc": "2.0", "id": next(_numbers), "method": method, "params": params}
        return self.client.post(f"{PROXY}/mcp/{self.options.tools}", json=body, name=name, catch_response=True)


class Looker(Caller):
    """Looks at the account, as a dashboard does."""

    weight = 1
    wait_time = between(0.5, 2)

    def on_start(self) -> None:
        """Begin with what a dashboard shows first."""
        super().on_start()
        self.credit()

    @task(3)
    def credit(self) -> None:
        """See what is left."""
        self.send("credits", "/api/v1/user/credits")

    @task(2)
    def usage(self) -> None:
        """See what was used."""
        self.send("usage", "/api/v1/user/usage?group_by=day")

    @task(1)
    def keys(self) -> None:
        """See the keys."""
        self.send("keys", "/api/v1/auth/apikey")

    @task(1)
    def offers(self) -> None:
        """See what can be rented."""
        self.send("offers", "/api/v1/gpu/instances?limit=20")
