"""Pictures and sounds within a body: as base64 they have many bytes, and few tokens.

Bodies up to LONG_BODY_BYTES are not looked at. About 0.6 ms for a megabyte.
"""

import re

LONG_BODY_BYTES = 16_384
PICTURE_TOKENS_MAX = 65_536  # a large one in high detail has 48,000 where it has most, an hour of sound 36,000
FORM_TOKENS_MAX = 262_144  # 16 pictures to be changed, or 25 MB of sound

_BLOB_BYTES = 1_024  # no text is as long without a space, an escape or another script than Latin
_JSON_STARTS = (b"{", b" ", b"\t", b"\r", b"\n")
_KEYS = (b"url", b"image_url", b"data", b"images")  # where OpenAI, Anthropic and Ollama take them from
# PNG, JPEG, GIF, RIFF (WebP, WAV) and MP3. What is none of these, such as PDF, may well have a token to a byte.
_MAGIC = re.compile(rb"(?:data:[a-z]+/[a-z0-9.+-]+;base64,)?(?:iVBORw0KGgo|/9j/|R0lGOD|UklGR|SUQz)")


def text_size(body: bytes) -> int:
    """Return how many bytes of a body are text: not a form's file, nor strings of base64.

    What was asked is estimated by it when a stream is cut.
    """
    if body[:1] not in _JSON_STARTS:
        return 0
    return len(body) - sum([len(part) for part in body.split(b'"') if len(part) >= _BLOB_BYTES and _is_blob(part)])


def _is_blob(string: bytes) -> bool:
    start = string[:_BLOB_BYTES]
    return start.isascii() and b" " not in start and b"\\" not in start


def input_tokens_max(body: bytes) -> int:
    """Return the most tokens a body can make: one a byte, but PICTURE_TOKENS_MAX for each picture or sound."""
    if len(body) <= PICTURE_TOKENS_MAX or body[:1] not in _JSON_STARTS:
        return len(body)
    parts = body.split(b'"')
    saved = 0
    for at, part in enumerate(parts):
        if len(part) > PICTURE_TOKENS_MAX and at > 1 and parts[at - 2] in _KEYS and _MAGIC.match(part):
            saved += len(part) - PICTURE_TOKENS_MAX
    return len(body) - saved
