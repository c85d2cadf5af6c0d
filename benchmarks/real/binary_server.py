"""A second V2 server, for what mlserver's REST side lacks: the binary tensor extension, deflated requests.

Usage: binary_server.py PORT. It takes tensors as JSON or as raw bytes behind the JSON and answers in kind, as
Triton's "binary tensor data extension" asks.
"""

import gzip
import json
import sys
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np  # type: ignore[import-not-found]
from aiohttp import web

HEADER = "Inference-Header-Content-Length"
INFLATE: dict[str, Callable[[bytes], bytes]] = {"gzip": gzip.decompress, "deflate": zlib.decompress, "": bytes}


def tensors(body: bytes, header_length: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the request's JSON and its tensors by name."""
    request, rest = json.loads(body[:header_length]), body[header_length:]
    found = {}
    for tensor in request["inputs"]:
        kind = np.dtype({"FP32": "<f4", "INT64": "<i8"}[tensor["datatype"]])
        size = tensor.get("parameters", {}).get("binary_data_size")
        flat = np.array(tensor["data"], kind) if size is None else np.frombuffer(rest[:size], kind)
        rest = rest[size or 0 :]
        found[tensor["name"]] = flat.reshape(tensor["shape"])
    return request, found


async def infer(request: web.Request) -> web.Response:
    """Double every tensor."""
    body = INFLATE[request.headers.get("Content-Encoding", "")](await request.read())
    asked, found = tensors(body, int(request.headers.get(HEADER, len(body))))
    is_binary = asked.get("parameters", {}).get("binary_data_output") or any(
        output.get("parameters", {}).get("binary_data") for output in asked.get("outputs", ())
    )
    outputs, raw = [], b""
    for name, values in found.items():
        output: dict[str, Any] = {"name": f"{name}2", "shape": list(values.shape)}
        output["datatype"] = {"float32": "FP32", "int64": "INT64"}[values.dtype.name]
        doubled = (values * 2).astype(values.dtype)
        if is_binary:
            output["parameters"] = {"binary_data_size": doubled.nbytes}
            raw += doubled.tobytes()
        else:
            output["data"] = doubled.ravel().tolist()
        outputs.append(output)
    head = json.dumps({"model_name": request.match_info["model"], "outputs": outputs}).encode()
    if not is_binary:
        return web.Response(body=head, content_type="application/json")
    return web.Response(body=head + raw, headers={HEADER: str(len(head))}, content_type="application/octet-stream")


async def ready(request: web.Request) -> web.Response:
    """Say yes."""
    return web.json_response({"ready": True})


if __name__ == "__main__":
    app = web.Application(client_max_size=64 << 20, handler_args={"auto_decompress": False})
    app.add_routes([web.post("/v2/models/{model}/infer", infer), web.get("/v2/health/ready", ready)])
    web.run_app(app, host="127.0.0.1", port=int(sys.argv[1]), print=None)
