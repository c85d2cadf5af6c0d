"""The demo's Open Inference (V2) side: a real, tiny classifier, and the chat model as `generate`."""

import math
from collections.abc import AsyncIterator
from typing import Annotated, Any

from aiohttp import web
from msgspec import Meta, Struct

from gpuproxy import __version__
from gpuproxy.demo import wire
from gpuproxy.demo.openai import CHAT, Answer, Generation, generate
from gpuproxy.demo.text import tokens
from gpuproxy.demo.wire import RefusedError, check_model, event, json_answer

IRIS = "iris-centroids"
CENTROIDS = {  # class means of Fisher's iris data, in cm: sepal length and width, petal length and width
    "setosa": (5.006, 3.428, 1.462, 0.246),
    "versicolor": (5.936, 2.770, 4.260, 1.326),
    "virginica": (6.588, 2.974, 5.552, 2.026),
}
TENSORS: dict[str, dict[str, list[dict[str, Any]]]] = {
    IRIS: {
        "inputs": [{"name": "features", "datatype": "FP32", "shape": [-1, 4]}],
        "outputs": [
            {"name": "label", "datatype": "BYTES", "shape": [-1]},
            {"name": "distance", "datatype": "FP32", "shape": [-1, 3]},
        ],
    },
    CHAT: {
        "inputs": [{"name": "text_input", "datatype": "BYTES", "shape": [1]}],
        "outputs": [{"name": "text_output", "datatype": "BYTES", "shape": [1]}],
    },
}


class Tensor(Struct):
    """One named input of an infer request, as JSON."""

    name: str
    shape: list[int]
    datatype: str
    data: list[Any]


class WantedOutput(Struct):
    """An output asked for by name."""

    name: str


class InferRequest(Struct):
    """POST /v2/models/{model}/infer."""

    inputs: list[Tensor]
    id: str | None = None
    outputs: list[WantedOutput] | None = None


class GenerateParameters(Struct, frozen=True):
    """What of ``parameters`` is understood; the rest is passed over."""

    max_tokens: Annotated[int, Meta(ge=1)] | None = None
    seed: int | None = None


class GenerateRequest(Struct):
    """POST /v2/models/{model}/generate and generate_stream."""

    text_input: str
    id: str | None = None
    parameters: GenerateParameters = GenerateParameters()


class OpenInference:
    """The handlers. `token_delay_s` is the mean pause before a token."""

    def __init__(self, token_delay_s: float) -> None:
        self._token_delay_s = token_delay_s

    def routes(self) -> list[web.RouteDef]:
        """Return what this side serves."""
        routes = [
            web.get("/v2", self.server),
            web.get("/v2/health/live", self.live),
            web.get("/v2/health/ready", self.ready),
        ]
        for model in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
            routes += [
                web.get(model, self.model),
                web.get(f"{model}/ready", self.model_ready),
                web.post(f"{model}/infer", self.infer),
                web.post(f"{model}/generate", self.generate),
                web.post(f"{model}/generate_stream", self.generate_stream),
            ]
        return routes

    async def server(self, _request: web.Request) -> web.StreamResponse:
        """Describe the server."""
        return json_answer({"name": "gpuproxy-demo", "version": __version__, "extensions": ["generate"]})

    async def live(self, _request: web.Request) -> web.StreamResponse:
        """Tell that the server lives."""
        return json_answer({"live": True})

    async def ready(self, _request: web.Request) -> web.StreamResponse:
        """Tell that the server is ready."""
        return json_answer({"ready": True})

    async def model(self, request: web.Request) -> web.StreamResponse:
        """Describe a model."""
        name = _model(request, *TENSORS)
        head = {"name": name, "versions": ["1"], "platform": "gpuproxy_demo"}
        return json_answer({**head, **TENSORS[name]})

    async def model_ready(self, request: web.Request) -> web.StreamResponse:
        """Tell that a model is ready."""
        return json_answer({"name": _model(request, *TENSORS), "ready": True})

    async def infer(self, request: web.Request) -> web.StreamResponse:
        """Tell each flower's kind: the nearest centroid."""
        name = _model(request, IRIS)
        asked = await wire.decode(request, InferRequest)
        wanted = {output.name for output in asked.outputs or ()} or {"label", "distance"}
        outputs = [output for output in _classify(_flowers(asked)) if output["name"] in wanted]
        return json_answer({**_head(name, asked.id), "outputs": outputs})

    async def generate(self, request: web.Request) -> web.StreamResponse:
        """Answer a text, whole."""
        head, told = await self._answer(request)
        return json_answer({**head, "text_output": told.text()})

    async def generate_stream(self, request: web.Request) -> web.StreamResponse:
        """Answer a text token by token; the protocol has neither an end mark nor usage."""
        head, told = await self._answer(request)

        async def events() -> AsyncIterator[bytes]:
            async for piece in wire.paced(told.pieces, self._token_delay_s):
                yield event({**head, "text_output": piece})

        return await wire.send_events(request, events())

    async def _answer(self, request: web.Request) -> tuple[dict[str, Any], Answer]:
        name = _model(request, CHAT)
        asked = await wire.decode(request, GenerateRequest)
        limits = Generation(model=name, max_tokens=asked.parameters.max_tokens, seed=asked.parameters.seed)
        return _head(name, asked.id), generate(asked.text_input, limits, len(tokens(asked.text_input)))


def _model(request: web.Request, *known: str) -> str:
    name = request.match_info["model"]
    check_model(name, *known)
    if request.match_info.get("version", "1") != "1":
        raise RefusedError(404, f"model {name} has only version 1")
    return name


def _head(name: str, request_id: str | None) -> dict[str, Any]:
    return {"model_name": name, "model_version": "1"} | ({"id": request_id} if request_id else {})


def _flowers(asked: InferRequest) -> list[list[float]]:
    """Return the rows of the one input tensor, whose data may be flat or nested."""
    if len(asked.inputs) != 1 or asked.inputs[0].name != "features":
        raise RefusedError(400, "expected one input, named features")
    tensor = asked.inputs[0]
    if tensor.datatype not in ("FP32", "FP64"):
        raise RefusedError(400, f"input features: datatype {tensor.datatype} is not FP32 or FP64")
    data = [item for row in tensor.data for item in (row if isinstance(row, list) else [row])]
    if len(tensor.shape) != 2 or tensor.shape[1] != 4 or tensor.shape[0] * 4 != len(data):
        raise RefusedError(400, f"input features: {len(data)} numbers do not fill the shape {tensor.shape}")
    if not all(type(item) in (int, float) for item in data):
        raise RefusedError(400, "input features: data must be numbers")
    return [data[at : at + 4] for at in range(0, len(data), 4)]


def _classify(flowers: list[list[float]]) -> list[dict[str, Any]]:
    distances = [[round(math.dist(flower, mean), 6) for mean in CENTROIDS.values()] for flower in flowers]
    labels = [min(zip(row, CENTROIDS, strict=True))[1] for row in distances]
    flat = [distance for row in distances for distance in row]
    return [
        {"name": "label", "datatype": "BYTES", "shape": [len(flowers)], "data": labels},
        {"name": "distance", "datatype": "FP32", "shape": [len(flowers), 3], "data": flat},
    ]
