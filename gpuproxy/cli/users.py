"""Commands for users."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gpuproxy.cli.common import fields_of, show, table, usage_fault, with_config, with_json, with_store

if TYPE_CHECKING:
    from gpuproxy.access.accounts import User
    from gpuproxy.store.engine import Store


@click.group()
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

    nanousd = 0 if credits_usd is None else usage_fault(parse_usd, credits_usd)

    async def work(store: "Store") -> "User":
        async with store.writing() as connection:  # one: there must be no user whose credit got lost
            made = await add_user(connection, email, admin)
            if nanousd:
                await add_credit(store, connection, made.id, nanousd, f"user-create:{made.id}")
        return made

    made = with_store(config_path, work)
    show(fields_of(made) | {"credits": format_usd(nanousd)}, made.id, as_json)


@user.command("list")
@with_config
@with_json
def user_list(config_path: Path | None, as_json: bool) -> None:
    """List users, oldest first."""
    from gpuproxy.access.accounts import list_users

    found = with_store(config_path, list_users)
    table(
        [fields_of(each) for each in found],
        ("id", "email", "is_admin", "is_active", "created_at"),
        as_json,
    )


@user.command("block")
@click.argument("email")
@with_config
def user_block(email: str, config_path: Path | None) -> None:
    """Block a user; all their keys stop within a second. The last active admin stays."""
    from gpuproxy.access.accounts import set_active

    with_store(config_path, lambda store: set_active(store, email, False))


@user.command("unblock")
@click.argument("email")
@with_config
def user_unblock(email: str, config_path: Path | None) -> None:
    """Let a blocked user in again."""
    from gpuproxy.access.accounts import set_active

    with_store(config_path, lambda store: set_active(store, email, True))


@user.command("password")
@click.argument("email")
@with_config
def user_password(email: str, config_path: Path | None) -> None:
    """Set a user's password, read from standard input, and end their sessions."""
    from gpuproxy.access.logins import set_password

    password = click.prompt("Password", hide_input=True) if sys.stdin.isatty() else sys.stdin.readline().rstrip("\n")
    with_store(config_path, lambda store: set_password(store, email, password))
