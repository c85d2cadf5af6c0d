"""Commands for credit, prices and the books."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gpuproxy.cli.common import print_json, show, table, usage_fault, with_config, with_json, with_store

if TYPE_CHECKING:
    from gpuproxy.store.engine import Store


@click.group()
def credits() -> None:
    """Add credit, take it back."""


@credits.command("add")
@click.argument("email")
@click.argument("usd")
@with_config
@with_json
def credits_add(email: str, usd: str, config_path: Path | None, as_json: bool) -> None:
    """Add credit, in dollars such as 12.50, to a user's account."""
    _adjust(email, usd, config_path, as_json, "added")


@credits.command("take")
@click.argument("email")
@click.argument("usd")
@with_config
@with_json
def credits_take(email: str, usd: str, config_path: Path | None, as_json: bool) -> None:
    """Take credit back, in dollars such as 12.50, that was added by mistake."""
    _adjust(email, usd, config_path, as_json, "taken")


def _adjust(email: str, usd: str, config_path: Path | None, as_json: bool, done: str) -> None:
    from uuid import uuid4

    from gpuproxy.access.accounts import find_user
    from gpuproxy.errors import GatewayError
    from gpuproxy.ledger.book import balance, credit, format_usd, parse_usd, take_credit

    nanousd = usage_fault(parse_usd, usd, "USD")
    move = credit if done == "added" else take_credit

    async def work(store: "Store") -> int:
        user = await find_user(store, email)
        try:
            await move(store, user.id, nanousd, f"credits-{done}:{uuid4()}")
        except GatewayError as error:
            if error.code != "INSUFFICIENT_CREDITS":
                raise
            left = format_usd(await balance(store, user.id))
            raise GatewayError(error.code, f"{email} has {left} USD; take no more than that") from None
        return await balance(store, user.id)

    left = format_usd(with_store(config_path, work))
    fields = {"email": email, done: format_usd(nanousd), "credits_remaining": left}
    show(fields, f"{email} has {left} USD", as_json)


@click.group()
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
    if not any(usd):
        raise click.UsageError(f"no price is given for {model}; name one, such as --request 0.01, or 0 to make it free")
    written = config.Price("" if is_tool else model, upstream, *usd, tool=model if is_tool else "")
    config.build({"prices": [msgspec.to_builtins(written)]})  # names what is wrong
    wanted = msgspec.structs.replace(from_config(written), valid_from_ns=valid_from_now())
    with_store(config_path, lambda store: add_price(store, wanted))
    show(msgspec.to_builtins(wanted), f"{model} costs this in a few seconds", as_json)


@price.command("list")
@with_config
@with_json
def price_list(config_path: Path | None, as_json: bool) -> None:
    """List all versions of prices that were set, by model, upstream and time."""
    import msgspec

    from gpuproxy.ledger.catalogue import list_prices
    from gpuproxy.pricing import Price

    found = [msgspec.to_builtins(each) for each in with_store(config_path, list_prices)]
    columns = (
        "model",
        "tool",
        "upstream",
        "valid_from_ns",
        *(name for name in Price.__struct_fields__ if "nanousd" in name),
    )
    table(found, columns, as_json)


@click.group()
def ledger() -> None:
    """Check the books."""


@ledger.command("verify")
@with_config
@with_json
def ledger_verify(config_path: Path | None, as_json: bool) -> None:
    """Check that every transfer, balance and hold adds up; name what does not and exit 1."""
    from gpuproxy.ledger.verify import verify

    found = with_store(config_path, verify)
    if as_json:
        print_json({"is_sound": not found, "faults": found})
    else:
        for fault in found:
            click.echo(f"{fault.rule}: {fault.subject_id}: {fault.detail}")
        click.echo(f"{len(found)} faults" if found else "no fault")
    sys.exit(1 if found else 0)
