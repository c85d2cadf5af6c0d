"""An upstream with the shapes of OpenAI and Anthropic; the model's name chooses how it behaves.

It answers with the words of the last message, counts words as tokens, and remembers what it was sent.
"""

import asyncio
import gzip
import json
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from . import sockets

SECRET = "sk-upstream-secret"
MODELS = (
    "chat", "tools", "gzip", "embed", "flaky", "gated",
    "error-400", "error-401", "error-429", "error-500", "error-529", "error-stream", "cut-stream", "cut-body",
)  # fmt: skip
CREATED = 1_700_000_000

Json = dict[str, Any]
BODY = web.RequestKey("body", dict[str, Any])


class Seen:
    """One request as it reached the upstream; names of header fields in lower case."""

    def __init__(self, request: web.Request, body: bytes) -> None:
        self.method, self.path = request.method, request.raw_path
        self.headers = {name.lower(): value for name, value in request.headers.items()}
        self.body = body


class ModelServer:
    """The application and its memory; it serves `models` to who holds `key`, to anyone if that is empty.

    `gate` holds back what follows the second piece of model ``gated``; `gone` tells that its reader left.
    """

    def __init__(self, key: str = SECRET, models: tuple[str, ...] = MODELS) -> None:
        self._key, self._models = key, models
        self.seen: list[Seen] = []
        self.gate = asyncio.Event()
        self.gone = asyncio.Event()
        self._flaky_calls: set[str] = set()
        self.app = web.Application(middlewares=[self._admit], client_max_size=64 << 20)
        self.app.add_routes(
            [
                web.post("/v1/chat/completions", self.chat),
                web.post("/v1/completions", self.completions),
                web.post("/v1/embeddings", self.embeddings),
                web.post("/v1/responses", self.responses),
                web.post("/v1/messages", self.messages),
                web.get("/v1/realtime", sockets.realtime),
                web.get("/v1/responses", sockets.responses),
                web.get("/v1/models", self.models),
                web.get("/v1/models/{model}", self.model),
            ]
        )

    @web.middleware
    async def _admit(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        body = await request.read()
        self.seen.append(Seen(request, body))
        anthropic = request.path == "/v1/messages"
        key = request.headers.get("X-Api-Key") or request.headers.get("Authorization", "").removeprefix("Bearer ")
        if self._key and key != self._key:
            return refusal(anthropic, 401, "authentication_error", "wrong key", code="invalid_api_key")
        if request.method == "POST":
            request[BODY] = json.loads(body)
            if failure := self._failure(anthropic, request[BODY]):
                return failure
        return await handler(request)

    def _failure(self, anthropic: bool, body: Json) -> web.Response | None:
        model = body.get("model", "")
        if model not in self._models:
            return refusal(anthropic, 404, "not_found_error", f"no model {model!r}", code="model_not_found")
        if model == "flaky" and body["user"] not in self._flaky_calls:
            self._flaky_calls.add(body["user"])
            return refusal(anthropic, 429, "rate_limit_error", "once more", headers={"retry-after-ms": "1"})
        if model.startswith("error-") and model != "error-stream":
            status = int(model.removeprefix("error-"))
            kind = {400: "invalid_request_error", 401: "authentication_error", 429: "rate_limit_error"}
            limits = {"retry-after": "7", "x-ratelimit-remaining-requests": "0"} if status == 429 else {}
            return refusal(anthropic, status, kind.get(status, "api_error"), f"upstream says {status}", limits)
        return None

    async def chat(self, request: web.Request) -> web.StreamResponse:
        body = request[BODY]
        words = answer_words(body)
        usage = openai_usage(body, words)
        if body.get("stream"):
            frames = chat_frames(body, words)
            if (body.get("stream_options") or {}).get("include_usage"):
                frames = [{**frame, "usage": None} for frame in frames]
                frames.append({**frames[0], "choices": [], "usage": usage})
            return await self._stream(request, [data_line(frame) for frame in frames], b"data: [DONE]\n\n")
        message: Json = {"role": "assistant", "content": "".join(words)}
        reason = "stop"
        if body["model"] == "tools":
            message, reason = (
                {"role": "assistant", "content": None, "tool_calls": [tool_call()]},
                "tool_calls",
            )
        choice = {"index": 0, "message": message, "finish_reason": reason, "logprobs": None}
        return self._json(request, {**completion_head(body, "chat.completion"), "choices": [choice], "usage": usage})

    async def completions(self, request: web.Request) -> web.StreamResponse:
        body = request[BODY]
        words = split_words(f"echo: {body['prompt']}")
        usage = token_usage(len(body["prompt"].split()), len(words))
        head = completion_head(body, "text_completion")
        if body.get("stream"):
            frames = [{**head, "choices": [{"index": 0, "text": word, "finish_reason": None}]} for word in words]
            frames[-1]["choices"][0]["finish_reason"] = "stop"
            return await self._stream(request, [data_line(frame) for frame in frames], b"data: [DONE]\n\n")
        choice = {"index": 0, "text": "".join(words), "finish_reason": "stop", "logprobs": None}
        return self._json(request, {**head, "choices": [choice], "usage": usage})

    async def embeddings(self, request: web.Request) -> web.StreamResponse:
        body = request[BODY]
        texts = [body["input"]] if isinstance(body["input"], str) else body["input"]
        data = [
            {"object": "embedding", "index": index, "embedding": [len(text) / 64, 0.5, -0.25]}
            for index, text in enumerate(texts)
        ]
        count = sum(len(text.split()) for text in texts)
        usage = {"prompt_tokens": count, "total_tokens": count}
        return self._json(request, {"object": "list", "model": body["model"], "data": data, "usage": usage})

    async def responses(self, request: web.Request) -> web.StreamResponse:
        body = request[BODY]
        words = split_words(f"echo: {body['input']}")
        done = response_object(body, words)
        if not body.get("stream"):
            return self._json(request, done)
        opened = {**done, "status": "in_progress", "output": [], "usage": None}
        events: list[Json] = [{"type": "response.created", "response": opened}]
        place = {"item_id": "msg_1", "output_index": 0, "content_index": 0, "logprobs": []}
        events += [{"type": "response.output_text.delta", "delta": word, **place} for word in words]
        events.append({"type": "response.completed", "response": done})
        for number, event in enumerate(events):
            event["sequence_number"] = number
        return await self._stream(request, [event_lines(event) for event in events], b"")

    async def messages(self, request: web.Request) -> web.StreamResponse:
        body = request[BODY]
        if "anthropic-version" not in request.headers:
            return refusal(True, 400, "invalid_request_error", "anthropic-version is required")
        words = answer_words(body)
        usage = {"input_tokens": count_words(body), "output_tokens": len(words), "cache_read_input_tokens": 2}
        head = {
            "id": "msg_1",
            "type": "message",
            "role": "assistant",
            "model": body["model"],
            "stop_sequence": None,
        }
        if not body.get("stream"):
            content = [{"type": "text", "text": "".join(words)}]
            whole = {**head, "content": content, "stop_reason": "end_turn", "usage": usage}
            return self._json(request, whole)
        opened = {**head, "content": [], "stop_reason": None, "usage": {**usage, "output_tokens": 1}}
        events: list[Json] = [
            {"type": "message_start", "message": opened},
            {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
            {"type": "ping"},
        ]
        for word in words:
            delta = {"type": "text_delta", "text": word}
            events.append({"type": "content_block_delta", "index": 0, "delta": delta})
        ended = {"stop_reason": "end_turn", "stop_sequence": None}
        events += [
            {"type": "content_block_stop", "index": 0},
            {"type": "message_delta", "delta": ended, "usage": {"output_tokens": len(words)}},
            {"type": "message_stop"},
        ]
        return await self._stream(request, [event_lines(event) for event in events], b"")

    async def models(self, request: web.Request) -> web.StreamResponse:
        data = [{"id": name, "object": "model", "created": CREATED, "owned_by": "tests"} for name in self._models]
        return self._json(request, {"object": "list", "data": data}, compress=True)

    async def model(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info["model"]
        return self._json(request, {"id": name, "object": "model", "created": CREATED, "owned_by": "tests"})

    def _json(self, request: web.Request, body: Json, compress: bool = False) -> web.StreamResponse:
        content = json.dumps(body, ensure_ascii=False).encode()
        response = web.Response(body=content, content_type="application/json", headers={"X-Upstream": "yes"})
        sent = request.get(BODY) or {}
        if sent.get("model") == "cut-body":
            assert request.transport is not None
            head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(content)
            request.transport.write(head + content[:20])
            request.transport.close()
        if (compress or sent.get("model") == "gzip") and "gzip" in request.headers.get("Accept-Encoding", ""):
            response.body = gzip.compress(content)
            response.headers["Content-Encoding"] = "gzip"
        return response

    async def _stream(self, request: web.Request, pieces: list[bytes], end: bytes) -> web.StreamResponse:
        """Send `pieces` one write each; the model decides whether the stream breaks after the second."""
        model = request[BODY]["model"]
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        response.enable_chunked_encoding()
        await response.prepare(request)
        for number, piece in enumerate(pieces):
            await response.write(piece)
            await asyncio.sleep(0)
            if number == 1 and model != "chat" and not await self._goes_on(request, response, model):
                return response
        await response.write_eof(end)
        return response

    async def _goes_on(self, request: web.Request, response: web.StreamResponse, model: str) -> bool:
        if model == "gated":
            try:
                await self.gate.wait()
            except asyncio.CancelledError:
                self.gone.set()
                raise
        if model == "cut-stream":
            assert request.transport is not None
            request.transport.close()
        if model == "error-stream":
            error = {
                "type": "overloaded_error",
                "message": "the model fell over",
                "code": "overloaded",
                "param": None,
            }
            anthropic = request.path == "/v1/messages"
            await response.write(
                event_lines({"type": "error", "error": error}) if anthropic else data_line({"error": error})
            )
        return model not in ("cut-stream", "error-stream")


def refusal(
    anthropic: bool,
    status: int,
    kind: str,
    message: str,
    headers: dict[str, str] | None = None,
    code: str | None = None,
) -> web.Response:
    """Return an error in the dialect asked for."""
    if anthropic:
        return web.json_response(
            {"type": "error", "error": {"type": kind, "message": message}}, status=status, headers=headers
        )
    error = {"message": message, "type": kind, "param": None, "code": code}
    return web.json_response({"error": error}, status=status, headers=headers)


def split_words(text: str) -> list[str]:
    """Split a text into words that keep their leading space: joined they are the text."""
    first, *rest = text.split(" ")
    return [first, *(f" {word}" for word in rest)]


def answer_words(body: Json) -> list[str]:
    """Return the answer to a chat: the last message, echoed."""
    content = body["messages"][-1]["content"]
    text = content if isinstance(content, str) else content[0]["text"]
    return split_words(f"echo: {text}")


def count_words(body: Json) -> int:
    """Return the words of all messages; what the upstream calls input tokens."""
    return sum(len(str(message["content"]).split()) for message in body["messages"])


def token_usage(prompt: int, completion: int) -> Json:
    """Return a usage object of OpenAI's shape."""
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def openai_usage(body: Json, words: list[str]) -> Json:
    """Return the usage of a chat, one input token of it cached."""
    return {**token_usage(count_words(body), len(words)), "prompt_tokens_details": {"cached_tokens": 1}}


def completion_head(body: Json, kind: str) -> Json:
    """Return the fields every completion object starts with."""
    return {"id": "cmpl-1", "object": kind, "created": CREATED, "model": body["model"]}


def tool_call() -> Json:
    """Return the one tool call model ``tools`` ever makes."""
    return {
        "id": "call_1",
        "type": "function",
        "function": {"name": "get_weather", "arguments": '{"city": "Łódź"}'},
    }


def chat_frames(body: Json, words: list[str]) -> list[Json]:
    """Return the chunks of a streamed chat, without usage."""
    head = completion_head(body, "chat.completion.chunk")
    deltas: list[Json] = [{"role": "assistant", "content": ""}, *({"content": word} for word in words)]
    reason = "stop"
    if body["model"] == "tools":
        call = tool_call()
        arguments = call["function"]["arguments"]
        opening = {**call, "index": 0, "function": {"name": "get_weather", "arguments": ""}}
        parts = [{"index": 0, "function": {"arguments": part}} for part in (arguments[:5], arguments[5:])]
        deltas = [{"role": "assistant", "content": None, "tool_calls": [opening]}]
        deltas += [{"tool_calls": [part]} for part in parts]
        reason = "tool_calls"
    choices: list[Json] = [{"index": 0, "delta": delta, "finish_reason": None} for delta in deltas]
    choices.append({"index": 0, "delta": {}, "finish_reason": reason})
    return [{**head, "choices": [choice]} for choice in choices]


def response_object(body: Json, words: list[str]) -> Json:
    """Return a finished object of OpenAI's Responses API."""
    text = {"type": "output_text", "text": "".join(words), "annotations": []}
    item = {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed", "content": [text]}
    count = len(body["input"].split())
    usage = {
        "input_tokens": count,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": len(words),
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": count + len(words),
    }
    head = {
        "id": "resp_1",
        "object": "response",
        "created_at": CREATED,
        "model": body["model"],
        "status": "completed",
    }
    return {
        **head,
        "output": [item],
        "usage": usage,
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
    }


def data_line(frame: Json) -> bytes:
    """Return one event with data alone."""
    return b"data: " + json.dumps(frame, ensure_ascii=False).encode() + b"\n\n"


def event_lines(frame: Json) -> bytes:
    """Return one event named by its type."""
    return f"event: {frame['type']}\n".encode() + data_line(frame)
