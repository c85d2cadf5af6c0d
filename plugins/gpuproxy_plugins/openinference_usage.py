"""Reads token usage from answers of OpenAI, Anthropic, Responses and Ollama shape, as they pass.

Bytes are searched first and parsed only where ``"usage"`` occurs. The last usage that is not null wins, field
by field: all engines report running totals, and Anthropic's ``message_delta`` completes its
``message_start``. Zero is a value. What is no JSON, or tells counts in another form, is searched from its end.
"""

import json
import re
from typing import Any

import msgspec
from msgspec import Raw, Struct

from gpuproxy.plugin import TAIL_BYTES, Usage, UsageReader

BYTES_PER_TOKEN = 6  # where it is estimated: English has four as a rule, and a third of a chat's body is JSON
_TOKENS_MAX = 1 << 40  # beyond any context window; keeps a babbling upstream out of the ledger
_NAME_CHARS_MAX = 256
_ERROR_BYTES_MAX = 4_096  # of a line that tells of one
_START_BYTES = 1_024  # of an answer whose end does not tell its usage
_CANDIDATES_MAX = 16  # how many "usage" keys of a tail are tried, last first
_DIGITS_MAX = 13  # of a count written as text: those of _TOKENS_MAX
_DETAILS = ("prompt_tokens_details", "input_tokens_details", "input_token_details")
_EVALUATED = re.compile(rb'"((?:prompt_)?eval)_count": ?([0-9]{1,13})(?![0-9])')  # Ollama's, behind a long text
WORD = b'"usage"'
UNREADABLE = (ValueError, RecursionError)


class Details(Struct, gc=False):
    """What part of the input came from a cache."""

    cached_tokens: int | None = None


class Counts(Struct, gc=False):
    """The ``usage`` object, all dialects at once."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: Details | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    input_tokens_details: Details | None = None
    input_token_details: Details | None = None  # as the Realtime API spells it
    cache_read_input_tokens: int | None = None
    cache_creation_input_tokens: int | None = None
    total_tokens: int | None = None


class TgiDetails(Struct, gc=False):
    """What Text Generation Inference tells of an answer; ``prefill`` has an item for each token of the input."""

    generated_tokens: int | None = None
    prefill: list[Raw] = []


class Answer(Struct, gc=False):
    """A whole JSON answer; the counts at the top are Ollama's own, ``details`` are TGI's."""

    model: Any = None
    usage: Counts | None = None
    prompt_eval_count: int | None = None
    eval_count: int | None = None
    details: TgiDetails | None = None


class _Generated(Struct, gc=False):
    generated_text: str = ""
    text_output: str = ""


_decode_generated = msgspec.json.Decoder(_Generated).decode
_decode_answer = msgspec.json.Decoder(Answer).decode
_scan_value = json.JSONDecoder().raw_decode


def usage_of(counts: Counts | None) -> Usage | None:
    """Return the counts as Usage, None if they tell no tokens or impossible ones.

    Anthropic's ``input_tokens`` excludes what was read from or written to the cache; the others include it. xAI and
    Gemini leave what was thought out of ``completion_tokens``, but not out of the total.
    """
    if counts is None:
        return None
    if counts.prompt_tokens is not None or counts.completion_tokens is not None:
        details = counts.prompt_tokens_details
        cached = (details.cached_tokens or 0) if details is not None else 0
        total, output, both = counts.prompt_tokens or 0, counts.completion_tokens, counts.total_tokens
        if output is not None and both is not None and both - total > output:
            output = both - total
        return tokens(total, cached, output or 0)
    if counts.input_tokens is None and counts.output_tokens is None:
        return None if counts.total_tokens is None else tokens(counts.total_tokens, 0, 0)  # of a reranking
    details = counts.input_tokens_details or counts.input_token_details
    read = counts.cache_read_input_tokens or 0
    total = (counts.input_tokens or 0) + read + (counts.cache_creation_input_tokens or 0)
    cached = read or ((details.cached_tokens or 0) if details is not None else 0)
    return tokens(total, cached, counts.output_tokens or 0)


def tokens(total: int, cached: int, output: int) -> Usage | None:
    """Return the numbers as Usage, None if they are impossible."""
    if 0 <= total <= _TOKENS_MAX and 0 <= output <= _TOKENS_MAX:
        return Usage(total, cached if 0 <= cached <= total else (total if cached > 0 else 0), output)
    return None


def model_told(name: Any) -> str:
    """Return the model that an answer says it is of, empty if it says none."""
    return name if isinstance(name, str) and len(name) <= _NAME_CHARS_MAX else ""


def _native_usage(answer: Answer) -> Usage | None:
    """Return what an answer of Ollama's or TGI's own tells."""
    if answer.eval_count is not None or answer.prompt_eval_count is not None:
        return tokens(answer.prompt_eval_count or 0, 0, answer.eval_count or 0)  # of embeddings the input alone
    if answer.details is not None and answer.details.generated_tokens is not None:
        return tokens(len(answer.details.prefill), 0, answer.details.generated_tokens)
    return None


def _usage_of_tail(tail: bytes) -> Usage | None:
    """Return what the end of a text tells that is no whole JSON, or JSON with counts in an unusual form."""
    counts = last_counts(tail)
    if counts is not None:
        return usage_of(counts)
    evaluated = {name: int(count) for name, count in _EVALUATED.findall(tail)}
    return tokens(evaluated.get(b"prompt_eval", 0), 0, evaluated.get(b"eval", 0)) if evaluated else None


def _usage_of_start(start: bytes) -> Usage | None:
    """Return what an answer tells before its first list: llama.cpp's embeddings come behind their usage."""
    return usage_of(last_counts(start.partition(b"[")[0]))


def last_counts(tail: bytes) -> Counts | None:
    """Return the last ``"usage": {…}`` in the tail of a JSON text, None if there is none."""
    text = tail.decode("utf-8", "replace")
    at = len(text)
    for _ in range(_CANDIDATES_MAX):
        at = text.rfind('"usage"', 0, at)
        if at < 0:
            return None
        if (counts := _counts_after(text[at + len(WORD) :].lstrip())) is not None:
            return counts
    return None


def _counts_after(text: str) -> Counts | None:
    """Return the object behind the colon that `text` must begin with."""
    if not text.startswith(":"):
        return None
    try:
        value: Any = _scan_value(text[1:].lstrip())[0]
    except UNREADABLE:
        return None
    return loose_counts(value) if isinstance(value, dict) else None


def loose_counts(fields: dict[str, Any]) -> Counts:
    """Return counts that may be written as ``5.0`` or ``"5"``; what is no number is left out."""
    counts = Counts()
    for name in Counts.__struct_fields__:
        value = fields.get(name)
        if name not in _DETAILS:
            setattr(counts, name, _number(value))
        elif isinstance(value, dict):
            setattr(counts, name, Details(_number(value.get("cached_tokens"))))
    return counts


def _number(value: Any) -> int | None:
    if isinstance(value, str) and value.isdecimal() and len(value) <= _DIGITS_MAX:
        return int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if type(value) is int else None


class _TailReader:
    """Keeps the last TAIL_BYTES of a body, whether that is all of it, and how it began if not."""

    __slots__ = ("_is_cut", "_kept", "_start")

    def __init__(self) -> None:
        self._kept: bytes | bytearray = b""
        self._is_cut = False
        self._start = b""

    def feed(self, data: bytes) -> None:
        """Keep the next bytes."""
        if not self._kept:
            self._kept = data  # most answers come in one piece: no copy
            return
        if isinstance(self._kept, bytes):
            self._kept = bytearray(self._kept)
        self._kept += data
        if len(self._kept) > 2 * TAIL_BYTES:
            self._cut()
            del self._kept[:-TAIL_BYTES]

    def _tail(self) -> bytes:
        kept = self._kept
        if isinstance(kept, bytes) and len(kept) <= TAIL_BYTES:
            return kept
        if len(kept) > TAIL_BYTES:
            self._cut()
        return bytes(kept[-TAIL_BYTES:])

    def _cut(self) -> None:
        if not self._is_cut:
            self._start = bytes(self._kept[:_START_BYTES])
            self._is_cut = True


class JsonUsageReader(_TailReader):
    """Usage of a JSON answer: parsed whole up to TAIL_BYTES, beyond that only its end is searched."""

    __slots__ = ("_answer",)

    _answer: Answer  # once it is whole

    @property
    def response_model(self) -> str:
        """Return the model that the answer says it is of."""
        return model_told(self._answer.model) if hasattr(self, "_answer") else ""

    def finish(self) -> Usage | None:
        """Return what was used, None if the answer told nothing."""
        tail = self._kept
        if self._is_cut or not isinstance(tail, bytes) or len(tail) > TAIL_BYTES:
            tail = self._tail()
            if self._is_cut:
                return _usage_of_tail(tail) or _usage_of_start(self._start)
        try:
            answer = self._answer = _decode_answer(tail)
            return usage_of(answer.usage) if answer.usage is not None else _native_usage(answer)
        except UNREADABLE:
            is_whole = tail.rstrip().endswith((b"}", b"]"))  # else it was cut
            return _usage_of_tail(tail) if is_whole else None


class GeneratedReader(JsonUsageReader):
    """The same for a text of TGI's or V2's own, whose usage is told if at all on demand: else its size is taken."""

    __slots__ = ("_request_bytes",)

    def __init__(self, request_bytes: int) -> None:
        super().__init__()
        self._request_bytes = request_bytes

    def finish(self) -> Usage | None:
        """Return what was used: told, or estimated from what was asked and generated."""
        if not self._is_cut and (whole := bytes(self._kept).strip())[:1] == b"[":
            self._kept = whole[1:-1]  # TGI's answer at the root is a list of one
        if (told := super().finish()) is not None:
            return told
        try:
            answer = _decode_generated(self._tail())
        except UNREADABLE:
            return None
        size_bytes = len((answer.generated_text or answer.text_output).encode())
        if not size_bytes:
            return None
        return Usage(self._request_bytes // BYTES_PER_TOKEN, 0, max(1, size_bytes // BYTES_PER_TOKEN), "estimated")


class LinesUsageReader(_TailReader):
    """Usage of newline-delimited JSON (Ollama): the last line that tells it."""

    __slots__ = ()

    def finish(self) -> Usage | None:
        """Return what was used, None if the answer told nothing."""
        for line in reversed(self._tail().splitlines()[-_CANDIDATES_MAX:]):
            try:
                answer = _decode_answer(line)
                usage = usage_of(answer.usage) or _native_usage(answer)
            except UNREADABLE:
                continue
            if usage is not None:
                return usage
        return None


class OllamaStreamReader(LinesUsageReader):
    """The same for a stream of Ollama's, metered by its lines when it is cut: each carries a token.

    Not so the last of a whole stream, and one that tells of an error, with which a stream ends too.
    """

    __slots__ = ("_line_count", "_request_bytes")

    def __init__(self, request_bytes: int = 0) -> None:
        super().__init__()
        self._line_count = 0
        self._request_bytes = request_bytes

    def feed(self, data: bytes) -> None:
        """Keep the next bytes and count their lines."""
        self._line_count += data.count(b"\n")
        super().feed(data)

    def so_far(self) -> Usage:
        """Return what was delivered by now."""
        estimated = self._request_bytes // BYTES_PER_TOKEN
        last = bytes(self._kept[-_ERROR_BYTES_MAX:]).rstrip().rpartition(b"\n")[2]
        count = self._line_count - (last.startswith(b'{"error"') or b'"done":true' in last)
        return Usage(estimated if count else -1, 0, count, "estimated")

    def finish(self) -> Usage | None:
        """Return what the last line tells, what was delivered if the stream was cut before it."""
        told = super().finish()
        if told is not None:
            return told
        delivered = self.so_far()
        return delivered if delivered.output_tokens > 0 else None


_: list[type[UsageReader]] = [JsonUsageReader, GeneratedReader, LinesUsageReader, OllamaStreamReader]
