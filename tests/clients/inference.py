"""An upstream with the other shapes of inference: Open Inference V2, TGI, Ollama, and OpenAI's forms and sounds.

It reads what it is sent as strictly as the real ones, so that a byte changed on the way shows.
"""

import asyncio
import json
from array import array
from typing import Any

from aiohttp import web

Json = dict[str, Any]
MODELS = ("dense", "whisper", "speech", "paint", "claude")
WORDS = ["echo:", " Hi", " there"]
V2 = "Inference-Header-Content-Length"


class InferenceServer:
    """The application; `seen` are the paths it was asked for, `gate` holds back the end of a stream of ``gated``."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.gate = asyncio.Event()
        self.app = web.Application(client_max_size=64 << 20)
        self.app.add_routes(
            [
                web.get("/v2", self.server),
                web.get("/v2/health/{what}", self.health),
                web.get("/v2/models/{model}", self.model),
                web.post("/v2/models/{model}/infer", self.infer),
                web.post("/v2/models/{model}/generate", self.generate),
                web.post("/v2/models/{model}/generate_stream", self.generate_stream),
                web.post("/generate", self.tgi),
                web.post("/generate_stream", self.tgi_stream),
                web.post("/api/chat", self.ollama),
                web.post("/api/generate", self.ollama),
                web.post("/v1/audio/transcriptions", self.transcribe),
                web.post("/v1/audio/speech", self.speak),
                web.post("/v1/images/edits", self.paint),
                web.post("/v1/messages/count_tokens", self.count),
                web.post("/{path:.*}", self.name_path),
            ]
        )

    async def server(self, request: web.Request) -> web.Response:
        return web.json_response({"name": "tests", "version": "1", "extensions": ["binary_tensor_data"]})

    async def health(self, request: web.Request) -> web.Response:
        return web.json_response({request.match_info["what"]: True})

    async def model(self, request: web.Request) -> web.Response:
        return web.json_response(
            {"name": request.match_info["model"], "platform": "tests", "inputs": [], "outputs": []}
        )

    async def infer(self, request: web.Request) -> web.Response:
        """Double one tensor, given and wanted as JSON or as bytes behind it (Triton's binary extension)."""
        body = await request.read()
        size = int(request.headers.get(V2, len(body)))
        asked = json.loads(body[:size])
        (tensor,) = asked["inputs"]
        is_binary = "binary_data_size" in tensor.get("parameters", {})
        if is_binary:
            assert len(body) - size == tensor["parameters"]["binary_data_size"]
            numbers = array("f", body[size:])
        else:
            numbers = array("f", tensor["data"])
        doubled = array("f", [2 * number for number in numbers])
        output = {"name": "y", "datatype": "FP32", "shape": [len(numbers)]}
        head = {"model_name": request.match_info["model"], "id": asked.get("id"), "outputs": [output]}
        if not is_binary:
            output["data"] = doubled.tolist()
            return web.json_response(head)
        output["parameters"] = {"binary_data_size": 4 * len(doubled)}
        text = json.dumps(head).encode()
        headers = {V2: str(len(text)), "Content-Type": "application/octet-stream"}
        return web.Response(body=text + doubled.tobytes(), headers=headers)

    async def generate(self, request: web.Request) -> web.Response:
        await request.json()
        return web.json_response({"model_name": request.match_info["model"], "text_output": "".join(WORDS)})

    async def generate_stream(self, request: web.Request) -> web.StreamResponse:
        asked = await request.json()
        if asked["text_input"] == "":
            return web.json_response({"error": "text_input is empty"}, status=400)
        model = request.match_info["model"]
        events = [{"model_name": model, "text_output": word} for word in WORDS]
        return await _send(request, "text/event-stream; charset=utf-8", [_event(each) for each in events])

    async def tgi(self, request: web.Request) -> web.Response:
        await request.json()
        details = {"generated_tokens": len(WORDS), "prefill": [{"id": 1}, {"id": 2}]}
        return web.json_response({"generated_text": "".join(WORDS), "details": details})

    async def tgi_stream(self, request: web.Request) -> web.StreamResponse:
        await request.json()
        events: list[Json] = [{"token": {"text": word}, "details": None} for word in WORDS]
        events[-1]["details"] = {"generated_tokens": len(WORDS), "input_length": 2}
        return await _send(request, "text/event-stream", [_event(each) for each in events])

    async def ollama(self, request: web.Request) -> web.StreamResponse:
        asked = await request.json()
        counts = {"done": True, "prompt_eval_count": 2, "eval_count": len(WORDS)}
        if asked.get("stream") is False:
            return web.json_response({"model": asked["model"], "response": "".join(WORDS), **counts})
        lines = [{"model": asked["model"], "message": {"content": word}, "done": False} for word in WORDS]
        pieces = [json.dumps(line).encode() + b"\n" for line in [*lines, {"model": asked["model"], **counts}]]
        gate = self.gate if asked["model"] == "gated" else None
        return await _send(request, "application/x-ndjson", pieces, gate)

    async def transcribe(self, request: web.Request) -> web.Response:
        """Read a form as the real one does; the file comes back by its size and first bytes."""
        form = await request.post()
        file: Any = form["file"]
        sound = file.file.read()
        usage = {"type": "tokens", "input_tokens": 14, "output_tokens": 3, "total_tokens": 17}
        text = f"{form['model']}: {file.filename}, {len(sound)} bytes, {sound[:4].hex()}"
        return web.json_response({"text": text, "usage": usage})

    async def speak(self, request: web.Request) -> web.Response:
        asked = await request.json()
        return web.Response(body=bytes(range(256)) * len(asked["input"]), content_type="audio/mpeg")

    async def paint(self, request: web.Request) -> web.Response:
        form = await request.post()
        picture: Any = form["image"]
        usage = {"input_tokens": 50, "output_tokens": 50, "total_tokens": 100}
        return web.json_response({"created": 1, "data": [{"b64_json": picture.file.read().hex()}], "usage": usage})

    async def count(self, request: web.Request) -> web.Response:
        asked = await request.json()
        return web.json_response({"input_tokens": sum(len(each["content"].split()) for each in asked["messages"])})

    async def name_path(self, request: web.Request) -> web.Response:
        """Tell which path was asked for."""
        return web.json_response({"path": request.raw_path, "type": request.headers.get("Content-Type")})


def _event(fields: Json) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


async def _send(
    request: web.Request, kind: str, pieces: list[bytes], gate: asyncio.Event | None = None
) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": kind})
    await response.prepare(request)
    for number, piece in enumerate(pieces):
        if gate is not None and number == 2:
            await gate.wait()
        await response.write(piece)
    return response
