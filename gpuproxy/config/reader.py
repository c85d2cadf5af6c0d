"""From plain values to Structs, noting every fault with its place instead of stopping at the first.

A field may carry a check of its own: ``Annotated[str, Meta(extra={"check": f})]`` calls ``f(value)``, which
returns a complaint or None; on a table, ``{"check": f}`` calls ``f(key, value)`` for each pair. ``{"secret":
True}`` keeps the value out of messages.
"""

import difflib
from collections.abc import Iterable, Mapping
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

import msgspec
from msgspec import Meta, Struct

from gpuproxy.config.checks import show
from gpuproxy.config.toml_lines import KeyPath
from gpuproxy.errors import ConfigError

AnyStruct = TypeVar("AnyStruct", bound=Struct)


class Faults:
    """Collects faults and finds their place: a line of the file, or the variable that set the value."""

    def __init__(self, source: str = "config", lines: Mapping[KeyPath, int] | None = None) -> None:
        self._source = source
        self._lines = lines or {}
        self._found: list[tuple[int, str]] = []
        self.variables: dict[KeyPath, str] = {}

    def add(self, path: KeyPath, complaint: str) -> None:
        """Note that the value at `path` is wrong."""
        place, line = self._place(path)
        name = key_name(path)
        self._found.append((line, f"{place}: {name}: {complaint}" if name else f"{place}: {complaint}"))

    def add_variable(self, variable: str, complaint: str) -> None:
        """Note that an environment variable is wrong."""
        self._found.append((0, f"{variable}: {complaint}"))

    def raise_if_any(self) -> None:
        """Raise ConfigError if anything was noted: variables first, then in the order of the file."""
        if self._found:
            raise ConfigError([text for _, text in sorted(self._found, key=lambda fault: fault[0])])

    def _place(self, path: KeyPath) -> tuple[str, int]:
        for end in range(len(path), 0, -1):
            if path[:end] in self.variables:
                return self.variables[path[:end]], 0
            if line := self._lines.get(path[:end]):
                return f"{self._source}:{line}", line
        return self._source, 0


def key_name(path: KeyPath) -> str:
    """Return the path as people write it: ``upstreams[1].urls[0]``."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".")


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """Return the complaint about a name that is not known, with the closest known one."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    hint = f'did you mean "{close[0]}"?' if close else f"known: {', '.join(names)}"
    return f"unknown {what} {show(name)}; {hint}"


def read_struct(kind: type[AnyStruct], tree: Any, path: KeyPath, faults: Faults) -> AnyStruct | None:
    """Return the Struct, or None after noting what is wrong with it."""
    if not isinstance(tree, Mapping):
        faults.add(path, f"expected a table, got {show(tree)}")
        return None
    fields = {field.encode_name: field for field in msgspec.structs.fields(kind)}
    for key in tree:
        if key not in fields:
            faults.add((*path, key), unknown("key", key, fields))
    missing = [name for name, field in fields.items() if field.required and name not in tree]
    for name in missing:
        faults.add(path, f'"{name}" is missing')
    values = {
        name: _read(field.type, tree[name], (*path, name), faults) for name, field in fields.items() if name in tree
    }
    if missing or None in values.values():
        return None
    return kind(**{fields[name].name: value for name, value in values.items()})


def bare(kind: Any) -> tuple[Any, dict[str, Any]]:
    """Split an annotated type into the type and what its Meta carries as extra."""
    metas = [meta for meta in getattr(kind, "__metadata__", ()) if isinstance(meta, Meta)]
    extra = {key: value for meta in metas for key, value in (meta.extra or {}).items()}
    return (kind.__origin__ if metas else kind), extra


def _read(kind: Any, value: Any, path: KeyPath, faults: Faults) -> Any:
    """Return the value as `kind`, or None after noting what is wrong with it (TOML has no null)."""
    kind = _present(kind)
    inner, extra = bare(kind)
    if isinstance(inner, type) and issubclass(inner, Struct):
        return read_struct(inner, value, path, faults)
    if get_origin(inner) is tuple and isinstance(value, list):
        if not value and extra.get("required"):
            faults.add(path, f"is empty; write at least one of {extra['required']}")
        items = [_read(get_args(inner)[0], item, (*path, at), faults) for at, item in enumerate(value)]
        return None if None in items else tuple(items)
    if get_origin(inner) is dict and isinstance(value, Mapping):
        return _read_table(value, extra, path, faults)
    return _read_leaf(kind, extra, value, path, faults)


def _present(kind: Any) -> Any:
    """Return what a value that is written must be: the type without its None."""
    if get_origin(kind) not in (UnionType, Union):
        return kind
    kinds = [each for each in get_args(kind) if each is not NoneType]
    return kinds[0] if len(kinds) == 1 else kind


def _read_table(table: Mapping[str, Any], extra: dict[str, Any], path: KeyPath, faults: Faults) -> Any:
    for key, value in table.items():
        complaint = extra["check"](key, value) if isinstance(value, str) else "expected a string"
        if complaint:
            faults.add((*path, key), complaint)
    return dict(table)


def _read_leaf(kind: Any, extra: dict[str, Any], value: Any, path: KeyPath, faults: Faults) -> Any:
    try:
        converted = msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        shown = "the value" if extra.get("secret") else show(value)
        quotes = (
            f'; write it in quotes, "{value}"' if _is_number_for_text(kind, value) and not extra.get("secret") else ""
        )
        faults.add(path, f"{shown} does not fit: {_expected(error)}{quotes}")
        return None
    if complaint := extra["check"](converted) if "check" in extra else None:
        faults.add(path, complaint)
    return converted


def _is_number_for_text(kind: Any, value: Any) -> bool:
    return bare(kind)[0] is str and isinstance(value, int | float) and not isinstance(value, bool)


def _expected(error: msgspec.ValidationError) -> str:
    text = str(error).partition(", got ")[0].partition(" - at ")[0].replace("`", "")
    return f"{text[:1].lower()}{text[1:]}".replace("array", "list").replace("object", "table")
