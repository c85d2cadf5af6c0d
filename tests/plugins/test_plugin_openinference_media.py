"""Pictures and sounds have many bytes and few tokens; what cannot be known to be one has a token a byte."""

import json
from typing import Any

import pytest
from gpuproxy_plugins.openinference import OpenInference
from gpuproxy_plugins.openinference_media import FORM_TOKENS_MAX, PICTURE_TOKENS_MAX

from gpuproxy.plugin import Call

OPEN = OpenInference()
PNG = "iVBORw0KGgo" + "A" * 1_000_000
JPEG, WAV, PDF = ("/9j/" + PNG, "UklGR" + PNG, "JVBERi0" + PNG)


def most(**fields: Any) -> tuple[int, int]:
    """Return the bound for a body, and its size without the million bytes of each picture."""
    body = json.dumps({"model": "m", **fields}).encode()
    call = Call(b"POST", b"/v1/chat/completions", [], body)
    assert OPEN.inspect(call).input_tokens_max == OPEN.describe(call).input_tokens_max
    return OPEN.inspect(call).input_tokens_max or len(body), len(body)


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64," + PNG}},
        {"type": "input_image", "image_url": "data:image/jpeg;base64," + JPEG},
        {"type": "image", "source": {"type": "base64", "media_type": "image/jpeg", "data": JPEG}},
        {"type": "input_audio", "input_audio": {"data": WAV, "format": "wav"}},
        {"content": "Hi", "images": [PNG]},
    ],
    ids=["chat", "responses", "anthropic", "sound", "ollama"],
)
def test_a_picture_or_sound_has_a_bound_of_its_own(part: Any) -> None:
    bound, size = most(messages=[{"role": "user", "content": [part, {"type": "text", "text": "what?"}]}])
    assert bound < size - len(PNG) + PICTURE_TOKENS_MAX + 30
    twice, _ = most(messages=[part, part]) if "images" not in part else (2 * bound, 0)
    assert PICTURE_TOKENS_MAX <= bound < twice <= 2 * (PICTURE_TOKENS_MAX + 300)


@pytest.mark.parametrize(
    "part",
    [
        {"type": "text", "text": PNG},
        {"role": "user", "content": PNG},
        {"type": "document", "source": {"media_type": "application/pdf", "data": PDF}},
        {"type": "image_url", "image_url": {"url": "A" * 1_000_000}},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64," + PNG[:60_000]}},
        {"data": "text that " * 100_000},
    ],
    ids=["text", "content", "document", "unknown", "small", "words"],
)
def test_all_else_has_a_token_a_byte(part: Any) -> None:
    bound, size = most(messages=[{"role": "user", "content": [part]}])
    assert bound == size


@pytest.mark.parametrize(("size", "bound"), [(100, 0), (1_000_000, FORM_TOKENS_MAX)])
def test_so_has_a_form(size: int, bound: int) -> None:
    body = (
        b'--b0\r\nContent-Disposition: form-data; name="model"\r\n\r\nwhisper-1\r\n'
        b'--b0\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n%b\r\n--b0--\r\n'
    ) % (b"x" * size)
    fields = [(b"Content-Type", b"multipart/form-data; boundary=b0")]
    call = Call(b"POST", b"/v1/audio/transcriptions", fields, body)
    assert OPEN.inspect(call).input_tokens_max == bound
