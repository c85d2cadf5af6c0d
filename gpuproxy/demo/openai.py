"""The demo's OpenAI side: models, chat, completions, embeddings, in whole answers and token by token."""

import array
import base64
import secrets
import sys
import time
from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any

from aiohttp import web
from msgspec import Meta, Struct

from gpuproxy.demo import wire
from gpuproxy.demo.text import DIMENSIONS, answer, embedding, tokens
from gpuproxy.demo.wire import RefusedError, check_model, event, json_answer

CHAT, EMBED = "demo-chat", "demo-embed"
ANSWER_TOKENS_MAX = 4_096

Limit = Annotated[int, Meta(ge=1)]
Choice = Callable[[str | None, str | None, bool], dict[str, Any]]  # (piece, finish reason, is the first)


class StreamOptions(Struct):
    """What a stream carries besides text."""

    include_usage: bool = False


class Message(Struct):
    """One turn of a chat; content is text or a list of parts."""

    role: str
    content: str | list[dict[str, Any]] | None = None


class Generation(Struct, kw_only=True):
    """What chat and plain completions share."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Limit | None = None
    max_completion_tokens: Limit | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    n: Annotated[int, Meta(ge=1, le=1)] | None = None


class ChatRequest(Generation, kw_only=True):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Meta(min_length=1)]


class CompletionRequest(Generation, kw_only=True):
    """POST /v1/completions."""

    prompt: str


class EmbeddingRequest(Struct):
    """POST /v1/embeddings; lists of numbers are token ids."""

    model: str
    input: str | list[str | int | list[int]]
    dimensions: Annotated[int, Meta(ge=1, le=2_048)] = DIMENSIONS
    encoding_format: str = "float"


class Answer(Struct):
    """A generated text and how it ended."""

    pieces: list[str]
    finish_reason: str
    prompt_token_count: int

    def text(self) -> str:
        """Return the whole text."""
        return "".join(self.pieces)

    def usage(self) -> dict[str, int]:
        """Return the usage object of OpenAI's answers."""
        prompt, completion = self.prompt_token_count, len(self.pieces)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def generate(question: str, asked: Generation, prompt_token_count: int) -> Answer:
    """Answer the question within the limits of the request."""
    text, finish_reason = answer(question, asked.seed or 0), "stop"
    for stop in [asked.stop] if isinstance(asked.stop, str) else asked.stop or []:
        text = text.partition(stop)[0] if stop else text
    pieces = tokens(text)
    limit = min(asked.max_completion_tokens or asked.max_tokens or ANSWER_TOKENS_MAX, ANSWER_TOKENS_MAX)
    if len(pieces) > limit:
        pieces, finish_reason = pieces[:limit], "length"
    return Answer(pieces, finish_reason, prompt_token_count)


class OpenAi:
    """The handlers. `token_delay_s` is the mean pause before a token."""

    def __init__(self, token_delay_s: float) -> None:
        self._token_delay_s = token_delay_s
        self._created = int(time.time())

    def routes(self) -> list[web.RouteDef]:
        """Return what this side serves."""
        return [
            web.get("/v1/models", self.models),
            web.post("/v1/chat/completions", self.chat),
            web.post("/v1/completions", self.completions),
            web.post("/v1/embeddings", self.embeddings),
        ]

    async def models(self, _request: web.Request) -> web.StreamResponse:
        """List the models."""
        common = {"object": "model", "created": self._created, "owned_by": "gpuproxy"}
        return json_answer({"object": "list", "data": [{"id": name, **common} for name in (CHAT, EMBED)]})

    async def chat(self, request: web.Request) -> web.StreamResponse:
        """Answer the last thing the user said."""
        asked = await wire.decode(request, ChatRequest)
        _check(asked)
        texts = [_text(message) for message in asked.messages]
        said = [text for text, turn in zip(texts, asked.messages, strict=True) if turn.role == "user"]
        told = generate((said or texts)[-1], asked, sum(len(tokens(text)) + 4 for text in texts))
        head = _head("chatcmpl", asked.model)
        if asked.stream:
            return await self._stream(request, asked, told, head | {"object": "chat.completion.chunk"}, _delta)
        message = {"role": "assistant", "content": told.text(), "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": told.finish_reason}
        return json_answer({**head, "object": "chat.completion", "choices": [choice], "usage": told.usage()})

    async def completions(self, request: web.Request) -> web.StreamResponse:
        """Answer a prompt."""
        asked = await wire.decode(request, CompletionRequest)
        _check(asked)
        told = generate(asked.prompt, asked, len(tokens(asked.prompt)))
        head = _head("cmpl", asked.model) | {"object": "text_completion"}
        if asked.stream:
            return await self._stream(request, asked, told, head, _part)
        choice = _part(told.text(), told.finish_reason, True)
        return json_answer({**head, "choices": [choice], "usage": told.usage()})

    async def embeddings(self, request: web.Request) -> web.StreamResponse:
        """Return a vector for each input."""
        asked = await wire.decode(request, EmbeddingRequest)
        check_model(asked.model, EMBED)
        texts = _texts(asked.input)
        encode = _base64 if asked.encoding_format == "base64" else list
        vectors = [encode(embedding(text, asked.dimensions)) for text in texts]
        rows = [{"object": "embedding", "index": at, "embedding": vector} for at, vector in enumerate(vectors)]
        count = sum(len(tokens(text)) for text in texts)
        usage = {"prompt_tokens": count, "total_tokens": count}
        return json_answer({"object": "list", "data": rows, "model": asked.model, "usage": usage})

    async def _stream(
        self, request: web.Request, asked: Generation, told: Answer, head: dict[str, Any], choice: Choice
    ) -> web.StreamResponse:
        with_usage = asked.stream_options is not None and asked.stream_options.include_usage
        absent = {"usage": None} if with_usage else {}
        steps: list[tuple[str | None, str | None, bool]] = [
            (piece, None, at == 0) for at, piece in enumerate(told.pieces)
        ]
        steps.append((None, told.finish_reason, not told.pieces))

        async def events() -> AsyncIterator[bytes]:
            async for step in wire.paced(steps, self._token_delay_s):
                yield event({**head, "choices": [choice(*step)], **absent})
            if with_usage:
                yield event({**head, "choices": [], "usage": told.usage()})
            yield b"data: [DONE]\n\n"

        return await wire.send_events(request, events())


def _head(kind: str, model: str) -> dict[str, Any]:
    return {"id": f"{kind}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}


def _delta(piece: str | None, finish_reason: str | None, is_first: bool) -> dict[str, Any]:
    delta = {"role": "assistant"} if is_first else {}
    if piece is not None:
        delta["content"] = piece
    return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}


def _part(piece: str | None, finish_reason: str | None, _is_first: bool) -> dict[str, Any]:
    return {"index": 0, "text": piece or "", "logprobs": None, "finish_reason": finish_reason}


def _check(asked: Generation) -> None:
    check_model(asked.model, CHAT)
    if asked.stream_options is not None and not asked.stream:
        raise RefusedError(400, "stream_options may only be given when stream is true", "stream_options")


def _text(message: Message) -> str:
    if isinstance(message.content, list):
        return " ".join(part["text"] for part in message.content if isinstance(part.get("text"), str))
    return message.content or ""


def _texts(given: str | list[str | int | list[int]]) -> list[str]:
    if isinstance(given, str):
        return [given]
    if given and all(isinstance(item, int) for item in given):
        return [" ".join(map(str, given))]
    texts = [" ".join(map(str, item)) if isinstance(item, list) else item for item in given]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise RefusedError(400, "input must be text, a list of texts, or lists of token ids", "input")
    return [str(text) for text in texts]


def _base64(vector: list[float]) -> str:
    floats = array.array("f", vector)
    if sys.byteorder == "big":
        floats.byteswap()
    return base64.b64encode(floats.tobytes()).decode()
