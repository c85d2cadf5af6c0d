"""The command line. Every command opens the store itself, so it works whether the daemon runs or not.

What a command needs is imported when it runs: ``gpuproxy --help`` must not wait for a database library.
"""

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from gpuproxy import __version__
from gpuproxy.errors import ConfigError, GatewayError, PluginError

if TYPE_CHECKING:
    from gpuproxy.access.accounts import Key, User
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


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="gpuproxy")
def cli() -> None:
    """The gateway that GPU inference runs through: forward, meter, bill."""


@cli.command()
@with_config
def serve(config_path: Path | None) -> None:
    """Run the gateway until SIGTERM or Ctrl-C."""
    path = _config_path(config_path)
    _load(path)
    from gpuproxy import supervisor

    sys.exit(supervisor.serve(path))


@cli.command()
@click.option("--once", is_flag=True, help="Exit after the demo call.")
@click.option("--port", type=click.IntRange(0, 65_535), default=8080, show_default=True, help="Port; 0: any.")
def demo(once: bool, port: int) -> None:
    """Run a whole gateway with a built-in upstream and make a call through it."""
    from gpuproxy import demo as demo_module

    sys.exit(demo_module.run(once, port))


@cli.command("check-config")
@with_config
@with_json
def check_config(config_path: Path | None, as_json: bool) -> None:
    """Check the configuration, name every fault and what is probably not meant; exit 2 for a fault."""
    from gpuproxy.config import warnings
    from gpuproxy.plugin import check_plugins

    path = _config_path(config_path)
    try:
        config = _load(path)
        check_plugins(config, os.environ)
    except ConfigError as error:
        if not as_json:
            raise
        _print_json({"is_valid": False, "faults": error.faults, "warnings": []})
        sys.exit(2)
    where = str(path) if path else "built-in defaults"
    found = warnings(config, os.environ)
    fields = {"is_valid": True, "faults": [], "warnings": found, "config": where}
    _show(fields, "\n".join([*(f"warning: {each}" for each in found), f"{where}: no fault"]), as_json)


@cli.command()
@with_config
@with_json
def reload(config_path: Path | None, as_json: bool) -> None:
    """Check the configuration, then let the running gateway take it without a dropped call."""
    import signal

    from gpuproxy.process import running_supervisor

    directory = Path(_config(config_path).server.data_dir)
    supervisor = running_supervisor(directory)
    if not supervisor:
        raise click.ClickException(f"no gateway runs on {directory}; start one with gpuproxy serve")
    os.kill(supervisor, signal.SIGHUP)
    _show({"pid": supervisor}, f"gateway {supervisor} was told to take the configuration", as_json)


@cli.command()
@with_config
@with_json
def migrate(config_path: Path | None, as_json: bool) -> None:
    """Bring the store to the schema of this version."""
    from gpuproxy.store.migrate import NEWEST, upgrade

    was_old = _on_store(config_path, upgrade)
    told = f"store brought to schema {NEWEST}" if was_old else f"store is at schema {NEWEST} already"
    _show({"schema": NEWEST, "was_changed": was_old}, told, as_json)


@cli.command()
@with_json
def version(as_json: bool) -> None:
    """Print the version."""
    _show({"version": __version__}, __version__, as_json)


@cli.group()
def user() -> None:
    """Create, list and block users."""


@user.command("create")
@click.argument("email")
@click.option("--admin", is_flag=True, help="May manage other users.")
@click.option("--credits", "credits_usd", metavar="USD", help="Credit to start with, such as 12.50.")
@with_config
@with_json
def user_create(email: str, admin: bool, credits_usd: str | None, config_path: Path | None, as_json: bool) -> None:
    """Create a user and print its id."""
    from gpuproxy.access.accounts import add_user
    from gpuproxy.ledger.book import add_credit, format_usd, parse_usd

    nanousd = 0 if credits_usd is None else _usage_fault(parse_usd, credits_usd)

    async def work(store: "Store") -> "User":
        async with store.writing() as connection:  # one: there must be no user whose credit got lost
            made = await add_user(connection, email, admin)
            if nanousd:
                await add_credit(store, connection, made.id, nanousd, f"user-create:{made.id}")
        return made

    made = _with_store(config_path, work)
    _show(_user_fields(made) | {"credits": format_usd(nanousd)}, made.id, as_json)


@user.command("list")
@with_config
@with_json
def user_list(config_path: Path | None, as_json: bool) -> None:
    """List users, oldest first."""
    from gpuproxy.access.accounts import list_users

    found = _with_store(config_path, list_users)
    _table(
        [_user_fields(each) for each in found],
        ("id", "email", "is_admin", "is_active", "created_at"),
        as_json,
    )


@user.command("block")
@click.argument("email")
@with_config
def user_block(email: str, config_path: Path | None) -> None:
    """Block a user; all their keys stop within a second."""
    from gpuproxy.access.accounts import set_active

    _with_store(config_path, lambda store: set_active(store, email, False))


@user.command("unblock")
@click.argument("email")
@with_config
def user_unblock(email: str, config_path: Path | None) -> None:
    """Let a blocked user in again."""
    from gpuproxy.access.accounts import set_active

    _with_store(config_path, lambda store: set_active(store, email, True))


@user.command("password")
@click.argument("email")
@with_config
def user_password(email: str, config_path: Path | None) -> None:
    """Set a user's password, read from standard input, and end their sessions."""
    from gpuproxy.access.logins import set_password

    password = click.prompt("Password", hide_input=True) if sys.stdin.isatty() else sys.stdin.readline().rstrip("\n")
    _with_store(config_path, lambda store: set_password(store, email, password))


@cli.group()
def key() -> None:
    """Create, list and revoke API keys."""


@key.command("create")
@click.option("--user", "email", metavar="EMAIL", required=True, help="Whose key.")
@click.option("--name", default="", help="To tell it from others.")
@click.option("--expires", "days", type=click.IntRange(1, 36_500), metavar="DAYS", help="Default: never.")
@click.option("--models", metavar="A,B", help="Allow these models only.")
@click.option("--tools", metavar="S/T,…", help="Allow these MCP tools only; * is any text: web/*.")
@click.option("--scopes", metavar="A,B", help="Default: inference,account. Also: read, admin.")
@click.option("--rpm", type=click.IntRange(0), metavar="N", help="Requests per minute; 0: no limit.")
@click.option("--rpm-ceiling", type=click.IntRange(0), metavar="N", help="How far a call may raise --rpm by header.")
@click.option("--tpm", type=click.IntRange(0), metavar="N", help="Tokens per minute; 0: no limit.")
@click.option("--streams", type=click.IntRange(0), metavar="N", help="Streams open at once; 0: no limit.")
@with_config
@with_json
def key_create(
    email: str,
    name: str,
    days: int | None,
    models: str | None,
    scopes: str | None,
    rpm: int | None,
    rpm_ceiling: int | None,
    tpm: int | None,
    streams: int | None,
    tools: str | None,
    config_path: Path | None,
    as_json: bool,
) -> None:
    """Create an API key and print it, the only time it can be seen."""
    from gpuproxy.access.accounts import create_key
    from gpuproxy.types import ALL_SCOPES

    expires_at = None if days is None else datetime.now(UTC) + timedelta(days=days)
    allowed = None if models is None else _names(models)
    may = ALL_SCOPES if scopes is None else _names(scopes)
    rules = None if tools is None else _names(tools)
    secret, made = _with_store(
        config_path,
        lambda store: create_key(store, email, name, expires_at, allowed, may, rpm, rpm_ceiling, tpm, streams, rules),
    )
    _show(_key_fields(made) | {"api_key": secret}, secret, as_json)


@key.command("list")
@click.option("--user", "email", metavar="EMAIL", help="Of this user only.")
@with_config
@with_json
def key_list(email: str | None, config_path: Path | None, as_json: bool) -> None:
    """List API keys without their secret, oldest first."""
    from gpuproxy.access.accounts import list_keys

    found = _with_store(config_path, lambda store: list_keys(store, email))
    columns = ("id", "prefix", "name", "user_id", "expires_at", "revoked_at")
    _table([_key_fields(each) for each in found], columns, as_json)


@key.command("revoke")
@click.argument("key_id", metavar="ID")
@with_config
@with_json
def key_revoke(key_id: str, config_path: Path | None, as_json: bool) -> None:
    """Revoke an API key; it is dead on every worker within a second."""
    from gpuproxy.access.accounts import revoke_key

    was_live = _with_store(config_path, lambda store: revoke_key(store, key_id))
    told = f"key {key_id} is revoked" if was_live else f"key {key_id} was revoked before"
    _show({"id": key_id, "was_live": was_live}, told, as_json)


@cli.group()
def credits() -> None:
    """Add credit."""


@credits.command("add")
@click.argument("email")
@click.argument("usd")
@with_config
@with_json
def credits_add(email: str, usd: str, config_path: Path | None, as_json: bool) -> None:
    """Add credit, in dollars such as 12.50, to a user's account."""
    from uuid import uuid4

    from gpuproxy.access.accounts import find_user
    from gpuproxy.ledger.book import balance, credit, format_usd, parse_usd

    nanousd = _usage_fault(parse_usd, usd, "USD")

    async def work(store: "Store") -> int:
        user = await find_user(store, email)
        await credit(store, user.id, nanousd, f"credits-add:{uuid4()}")
        return await balance(store, user.id)

    left = format_usd(_with_store(config_path, work))
    fields = {"email": email, "added": format_usd(nanousd), "credits_remaining": left}
    _show(fields, f"{email} has {left} USD", as_json)


@cli.group()
def price() -> None:
    """Set and list prices."""


@price.command("set")
@click.argument("model")
@click.option("--input", "input_usd", default="", metavar="USD", help="Per million input tokens.")
@click.option("--cached-input", "cached_usd", default="", metavar="USD", help="Per million cached input tokens.")
@click.option("--output", "output_usd", default="", metavar="USD", help="Per million output tokens.")
@click.option("--request", "request_usd", default="", metavar="USD", help="Per call.")
@click.option("--second", "second_usd", default="", metavar="USD", help="Per second.")
@click.option("--upstream", default="", help="At this upstream only.")
@click.option("--tool", "is_tool", is_flag=True, help="MODEL is the name of an MCP tool.")
@with_config
@with_json
def price_set(
    model: str,
    input_usd: str,
    cached_usd: str,
    output_usd: str,
    request_usd: str,
    second_usd: str,
    upstream: str,
    is_tool: bool,
    config_path: Path | None,
    as_json: bool,
) -> None:
    """Set what calls of a model cost, in a moment; * is every model."""
    import msgspec

    from gpuproxy import config
    from gpuproxy.ledger.catalogue import add_price, valid_from_now
    from gpuproxy.pricing import from_config

    usd = (input_usd, cached_usd, output_usd, request_usd, second_usd)
    written = config.Price("" if is_tool else model, upstream, *usd, tool=model if is_tool else "")
    config.build({"prices": [msgspec.to_builtins(written)]})  # names what is wrong
    wanted = msgspec.structs.replace(from_config(written), valid_from_ns=valid_from_now())
    _with_store(config_path, lambda store: add_price(store, wanted))
    _show(msgspec.to_builtins(wanted), f"{model} costs this in a few seconds", as_json)


@price.command("list")
@with_config
@with_json
def price_list(config_path: Path | None, as_json: bool) -> None:
    """List all versions of prices that were set, by model, upstream and time."""
    import msgspec

    from gpuproxy.ledger.catalogue import list_prices
    from gpuproxy.pricing import Price

    found = [msgspec.to_builtins(each) for each in _with_store(config_path, list_prices)]
    columns = (
        "model",
        "tool",
        "upstream",
        "valid_from_ns",
        *(name for name in Price.__struct_fields__ if "nanousd" in name),
    )
    _table(found, columns, as_json)


@cli.group()
def ledger() -> None:
    """Check the books."""


@ledger.command("verify")
@with_config
@with_json
def ledger_verify(config_path: Path | None, as_json: bool) -> None:
    """Check that every transfer, balance and hold adds up; name what does not and exit 1."""
    from gpuproxy.ledger.verify import verify

    found = _with_store(config_path, verify)
    if as_json:
        _print_json({"is_sound": not found, "faults": found})
    else:
        for fault in found:
            click.echo(f"{fault.rule}: {fault.subject_id}: {fault.detail}")
        click.echo(f"{len(found)} faults" if found else "no fault")
    sys.exit(1 if found else 0)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line; end with 0, 1 for a fault of what was asked, 2 for one of usage or config."""
    try:
        cli.main(args=arguments, prog_name="gpuproxy", standalone_mode=False)
    except ConfigError as error:
        _fail(error.faults, 2)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (GatewayError, PluginError, ValueError, OSError) as error:
        _fail([f"error: {error}"], 1)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
    sys.exit(0)


def _fail(lines: Sequence[str], code: int) -> NoReturn:
    for line in lines:
        click.echo(line, err=True)
    sys.exit(code)


def _config_path(given: Path | None) -> Path | None:
    return given or (CONFIG_FILE if CONFIG_FILE.exists() else None)


def _load(path: Path | None) -> "Config":
    from gpuproxy import config

    return config.load(path, os.environ)


def _config(given: Path | None) -> "Config":
    return _load(_config_path(given))


def _with_store(config_path: Path | None, work: "Callable[[Store], Awaitable[T]]") -> T:
    """Do `work` on the configured store, brought up to date first."""
    from gpuproxy.store.migrate import upgrade

    async def on_newest(store: "Store") -> T:
        await upgrade(store)
        return await work(store)

    return _on_store(config_path, on_newest)


def _on_store(config_path: Path | None, work: "Callable[[Store], Awaitable[T]]") -> T:
    """Do `work` on the configured store. Database faults become one line."""
    url = _config(config_path).store.url
    from sqlalchemy.exc import SQLAlchemyError

    from gpuproxy.store.engine import fault_of, open_store

    async def run() -> T:
        store = open_store(url)
        try:
            return await work(store)
        finally:
            await store.close()

    try:
        return asyncio.run(run())
    except SQLAlchemyError as error:
        raise click.ClickException(f"the store cannot be used: {fault_of(error)}; see [store] url") from None


def _usage_fault(parse: Callable[[str], T], text: str, name: str = "--credits") -> T:
    try:
        return parse(text)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint=name) from None


def _names(listed: str) -> list[str]:
    return [name.strip() for name in listed.split(",")]


def _user_fields(user: "User") -> dict[str, Any]:
    return {field: getattr(user, field) for field in user.__struct_fields__}


def _key_fields(key: "Key") -> dict[str, Any]:
    return {field: getattr(key, field) for field in key.__struct_fields__}


def _show(fields: dict[str, Any], text: str, as_json: bool) -> None:
    if as_json:
        _print_json(fields)
    else:
        click.echo(text)


def _print_json(value: Any) -> None:
    import msgspec

    click.echo(msgspec.json.encode(value).decode())


def _table(rows: list[dict[str, Any]], columns: Sequence[str], as_json: bool) -> None:
    """Print JSON, a table on a terminal, or one tab-separated line for each row."""
    if as_json:
        _print_json(rows)
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


if __name__ == "__main__":
    main()
