"""What commands share: their options, the configuration, the store, how they print."""

import asyncio
import os
import re
import sys
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from gpuproxy.errors import ConfigError

if TYPE_CHECKING:
    from msgspec import Struct

    from gpuproxy.config import Config
    from gpuproxy.store.engine import Store


CONFIG_FILE = Path("config.toml")
T = TypeVar("T")

with_config = click.option(
    "-c",
    "--config",
    "config_path",
    envvar="GPUPROXY_CONFIG",
    type=click.Path(path_type=Path),
    help="Configuration file. Default: ./config.toml if it is there, else the built-in defaults.",
)
with_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def config_path_of(given: Path | None) -> Path | None:
    """Return the file to read, None for none: the built-in defaults."""
    return given or (CONFIG_FILE if CONFIG_FILE.exists() else None)


def load(path: Path | None) -> "Config":
    """Read the configuration. Raises ConfigError."""
    from gpuproxy import config

    return config.load(path, os.environ)


def located(faults: Sequence[str], path: Path | None) -> list[str]:
    """Return faults that begin with the name of a key, and were found after the file was read, with their line."""
    from gpuproxy.config.toml_lines import key_lines

    if path is None:
        return list(faults)
    lines, found = key_lines(path.read_text()), []
    for fault in faults:
        block, index, key = re.match(r"(\w*)(?:\[(\d+)\])?(?:\.(\w+))?", fault).groups()  # type: ignore[union-attr]
        places = ((block, int(index or 0), key), (block, int(index or 0)))
        line = next((lines[place] for place in places if place in lines), None)
        found.append(fault if line is None else f"{path}:{line}: {fault}")
    return found


def checked(path: Path | None) -> "Config":
    """Read the configuration and see whether plugins can do what it wants. Raises ConfigError."""
    from gpuproxy.plugin import check_plugins

    found = load(path)
    try:
        check_plugins(found, os.environ)
    except ConfigError as error:
        raise ConfigError(located(error.faults, path)) from None
    return found


def config_of(given: Path | None) -> "Config":
    """Read the configuration a command was given. Raises ConfigError."""
    return load(config_path_of(given))


def with_store(config_path: Path | None, work: "Callable[[Store], Awaitable[T]]") -> T:
    """Do `work` on the configured store, brought up to date first."""
    from gpuproxy.store.migrate import upgrade

    async def on_newest(store: "Store") -> T:
        await upgrade(store)
        return await work(store)

    return on_store(config_path, on_newest)


def on_store(config_path: Path | None, work: "Callable[[Store], Awaitable[T]]") -> T:
    """Do `work` on the configured store. Database faults become one line."""
    url = config_of(config_path).store.url
    from sqlalchemy.exc import SQLAlchemyError

    from gpuproxy.store.engine import fault_of, open_store, shown

    async def run() -> T:
        store = open_store(url)
        try:
            return await work(store)
        finally:
            await store.close()

    try:
        return asyncio.run(run())
    except (SQLAlchemyError, OSError) as error:
        message = f"the store {shown(url)} cannot be used: {fault_of(error)}; see [store] url"
        raise click.ClickException(message) from None


def usage_fault(parse: Callable[[str], T], text: str, name: str = "--credits") -> T:
    """Parse what was typed; what is wrong with it is a fault of usage."""
    try:
        return parse(text)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint=name) from None


def names(listed: str) -> list[str]:
    """Return the names in a list with commas."""
    return [name.strip() for name in listed.split(",")]


def fields_of(thing: "Struct") -> dict[str, Any]:
    """Return what is printed of a record."""
    return {field: getattr(thing, field) for field in thing.__struct_fields__}


def show(fields: dict[str, Any], text: str, as_json: bool) -> None:
    """Print the fields as JSON, or the text."""
    if as_json:
        print_json(fields)
    else:
        click.echo(text)


def print_json(value: Any) -> None:
    """Print a value as JSON."""
    import msgspec

    click.echo(msgspec.json.encode(value).decode())


def table(rows: list[dict[str, Any]], columns: Sequence[str], as_json: bool) -> None:
    """Print JSON, a table on a terminal, or one tab-separated line for each row."""
    if as_json:
        print_json(rows)
    elif sys.stdout.isatty():
        _rich_table(rows, columns)
    else:
        for row in rows:
            click.echo("\t".join(_cell(row[column]) for column in columns))


def _rich_table(rows: list[dict[str, Any]], columns: Sequence[str]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(*columns)
    for row in rows:
        table.add_row(*(escape(_cell(row[column])) for column in columns))
    Console().print(table)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return value.isoformat(timespec="seconds") if isinstance(value, datetime) else str(value)
