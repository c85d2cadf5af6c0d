"""Where in a TOML text each key stands, so that a fault can name the line.

tomllib keeps no positions. A text that it has accepted is a list of statements, each beginning a line; a
statement that spans lines is complete as soon as it parses on its own.
"""

import tomllib
from collections.abc import Iterator
from typing import Any

KeyPath = tuple[str | int, ...]


def key_lines(text: str) -> dict[KeyPath, int]:
    """Return the line (from 1) of every key path of a valid TOML text; list items count from 0."""
    found: dict[KeyPath, int] = {}
    table: KeyPath = ()
    last_items: dict[KeyPath, int] = {}  # array of tables: index of the one being filled
    for line, statement in _statements(text.split("\n")):
        tree = tomllib.loads(statement)
        if statement.lstrip().startswith("["):
            table = _enter(tree, last_items)
            found.setdefault(table, line)
        else:
            _note(found, table, tree, line, statement.split("\n"))
    return found


def _statements(lines: list[str]) -> Iterator[tuple[int, str]]:
    held: list[str] = []
    for number, line in enumerate(lines, start=1):
        if not held and (not line.strip() or line.lstrip().startswith("#")):
            continue
        held.append(line)
        statement = "\n".join(held)
        try:
            tomllib.loads(statement)
        except ValueError:
            continue
        yield number - len(held) + 1, statement
        held = []


def _enter(tree: dict[str, Any], last_items: dict[KeyPath, int]) -> KeyPath:
    path: KeyPath = ()
    node: Any = tree
    while node:
        key, node = next(iter(node.items()))
        path += (key,)
        if isinstance(node, list):  # only the last key of [[a.b]] comes as a list
            last_items[path] = last_items.get(path, -1) + 1
            node = None
        if path in last_items:
            path += (last_items[path],)
    return path


def _note(found: dict[KeyPath, int], path: KeyPath, node: Any, line: int, span: list[str]) -> None:
    if path:
        offset = next((index for index, text in enumerate(span) if isinstance(node, str) and node in text), 0)
        found.setdefault(path, line + offset)
    if isinstance(node, dict):
        for key, child in node.items():
            _note(found, (*path, key), child, line, span)
    elif isinstance(node, list):
        for index, child in enumerate(node):
            _note(found, (*path, index), child, line, span)
