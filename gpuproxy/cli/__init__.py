"""The command line. Every command opens the store itself, so it works whether the daemon runs or not.

What a command needs is imported when it runs: ``gpuproxy --help`` must not wait for a database library.
"""

import sys
from collections.abc import Sequence
from typing import NoReturn

import click

from gpuproxy import __version__
from gpuproxy.cli import gateway, keys, money, users
from gpuproxy.errors import ConfigError, GatewayError, PluginError


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="gpuproxy")
def cli() -> None:
    """The gateway that GPU inference runs through: forward, meter, bill."""


GATEWAY = (gateway.serve, gateway.demo, gateway.check_config, gateway.reload, gateway.migrate, gateway.version)
for command in (*GATEWAY, users.user, keys.key, money.credits, money.price, money.ledger):
    cli.add_command(command)


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
