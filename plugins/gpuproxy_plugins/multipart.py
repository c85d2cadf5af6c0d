"""The small fields of a multipart/form-data body that is in memory (RFC 7578)."""

import re
from collections.abc import Collection, Iterator

_HEAD_BYTES_MAX = 8_192  # of one part; real ones are under 300
_VALUE_BYTES_MAX = 4_096
_PARTS_MAX = 256
# Quoted values are consumed whole, so that a file name cannot pretend to be a field name.
_PARAMETER = re.compile(rb';[ \t]*([!#-~]+?)[ \t]*=[ \t]*(?:"((?:[^"\\]|\\.)*)"|([^;"\s]*))')
_DISPOSITION = re.compile(rb"(?:^|\r\n)content-disposition:[ \t]*form-data([^\r\n]*)", re.IGNORECASE)


def is_form(content_type: bytes | None) -> bool:
    """Tell whether the content type is multipart/form-data."""
    return content_type is not None and content_type[:19].lower() == b"multipart/form-data"


def form_fields(body: bytes, content_type: bytes, wanted: Collection[bytes]) -> dict[bytes, bytes]:
    """Return the wanted fields that are there. Raises ValueError on a malformed form or a repeated field."""
    fields: dict[bytes, bytes] = {}
    for name, start, end in _parts(body, content_type):
        if name in wanted:
            _keep(fields, name, body, start, end)
    return fields


def field_span(body: bytes, content_type: bytes, wanted: bytes) -> tuple[int, int] | None:
    """Return where the value of a field stands, None if it is not there. Raises ValueError on a malformed form."""
    return next(((start, end) for name, start, end in _parts(body, content_type) if name == wanted), None)


def _parts(body: bytes, content_type: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield the name of each part, and where its value begins and ends."""
    delimiter = b"--" + _boundary(content_type)
    at = 0 if body.startswith(delimiter) else body.find(b"\r\n" + delimiter) + 2
    if at == 1:
        raise ValueError("the form's boundary does not occur in the body")
    for _ in range(_PARTS_MAX):
        at += len(delimiter)
        if body.startswith(b"--", at):
            return
        end = body.find(b"\r\n" + delimiter, at)
        if end < 0:
            raise ValueError("the form's last part does not end")
        head_end = body.find(b"\r\n\r\n", at, min(end, at + _HEAD_BYTES_MAX))
        found = _DISPOSITION.search(body[at : max(head_end, at)])
        yield (_parameters(found[1]).get(b"name", b"") if found else b""), head_end + 4, end
        at = end + 2
    raise ValueError(f"the form has more than {_PARTS_MAX} parts")


def _boundary(content_type: bytes) -> bytes:
    boundary = _parameters(content_type).get(b"boundary", b"")
    if not 0 < len(boundary) <= 70:  # RFC 2046 §5.1.1
        raise ValueError("the form's Content-Type names no boundary")
    return boundary


def _parameters(value: bytes) -> dict[bytes, bytes]:
    """Return the parameters of a field value, names in lower case, quotes taken off."""
    return {name.lower(): quoted or plain for name, quoted, plain in _PARAMETER.findall(value)}


def _keep(fields: dict[bytes, bytes], name: bytes, body: bytes, start: int, end: int) -> None:
    """Put the value ``body[start:end]`` into `fields`."""
    if name in fields:
        raise ValueError(f"the form has the field {name.decode('latin-1')!r} twice")
    if end - start > _VALUE_BYTES_MAX:
        raise ValueError(f"the form's field {name.decode('latin-1')!r} is over {_VALUE_BYTES_MAX} bytes")
    fields[name] = body[start:end]
