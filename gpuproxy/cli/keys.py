"""Commands for API keys."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import click

from gpuproxy.cli.common import fields_of, names, show, table, with_config, with_json, with_store


@click.group()
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
    allowed = None if models is None else names(models)
    may = ALL_SCOPES if scopes is None else names(scopes)
    rules = None if tools is None else names(tools)
    secret, made = with_store(
        config_path,
        lambda store: create_key(store, email, name, expires_at, allowed, may, rpm, rpm_ceiling, tpm, streams, rules),
    )
    show(fields_of(made) | {"api_key": secret}, secret, as_json)


@key.command("list")
@click.option("--user", "email", metavar="EMAIL", help="Of this user only.")
@with_config
@with_json
def key_list(email: str | None, config_path: Path | None, as_json: bool) -> None:
    """List API keys without their secret, oldest first."""
    from gpuproxy.access.accounts import list_keys

    found = with_store(config_path, lambda store: list_keys(store, email))
    columns = ("id", "prefix", "name", "user_id", "expires_at", "revoked_at")
    table([fields_of(each) for each in found], columns, as_json)


@key.command("revoke")
@click.argument("key_id", metavar="ID")
@with_config
@with_json
def key_revoke(key_id: str, config_path: Path | None, as_json: bool) -> None:
    """Revoke an API key; it is dead on every worker within a second."""
    from gpuproxy.access.accounts import revoke_key

    was_live = with_store(config_path, lambda store: revoke_key(store, key_id))
    told = f"key {key_id} is revoked" if was_live else f"key {key_id} was revoked before"
    show({"id": key_id, "was_live": was_live}, told, as_json)
