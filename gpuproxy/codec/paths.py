"""Paths of URLs as servers read them that do not take them by the letter."""

from urllib.parse import unquote_to_bytes


def has_dot_segments(path: bytes) -> bool:
    """Tell whether some server could read segments ``.`` or ``..`` in a path, and so take it for another one.

    WHATWG's URL, of Node and browsers, reads a backslash as "/"; servlet containers end a segment's name at ";".
    """
    plain = unquote_to_bytes(path.partition(b"?")[0]).replace(b"\\", b"/")
    return any(segment.partition(b";")[0] in (b"..", b".") for segment in plain.split(b"/"))
