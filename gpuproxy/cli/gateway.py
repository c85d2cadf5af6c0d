"""Commands for the gateway itself: run it, try it, check and change what it goes by."""

import os
import sys
from pathlib import Path

import click

from gpuproxy import __version__
from gpuproxy.cli.common import checked, config_path_of, on_store, print_json, show, with_config, with_json
from gpuproxy.errors import ConfigError


@click.command()
@with_config
def serve(config_path: Path | None) -> None:
    """Run the gateway until SIGTERM or Ctrl-C."""
    path = config_path_of(config_path)
    try:
        config = checked(path)
    except ConfigError as error:
        from gpuproxy.observe.logs import log_faults

        if not log_faults(error.faults):
            raise
        sys.exit(2)
    from gpuproxy import supervisor

    sys.exit(supervisor.serve(path, config))


@click.command()
@click.option("--once", is_flag=True, help="Exit after the demo call.")
@click.option("--port", type=click.IntRange(0, 65_535), default=8080, show_default=True, help="Port; 0: any.")
def demo(once: bool, port: int) -> None:
    """Run a whole gateway with a built-in upstream and make a call through it."""
    from gpuproxy import demo as demo_module

    sys.exit(demo_module.run(once, port))


@click.command("check-config")
@with_config
@with_json
def check_config(config_path: Path | None, as_json: bool) -> None:
    """Check the configuration, name every fault and what is probably not meant; exit 2 for a fault."""
    from gpuproxy.config import warnings

    path = config_path_of(config_path)
    try:
        config = checked(path)
    except ConfigError as error:
        if not as_json:
            raise
        print_json({"is_valid": False, "faults": error.faults, "warnings": []})
        sys.exit(2)
    where = str(path) if path else "built-in defaults"
    found = warnings(config, os.environ)
    fields = {"is_valid": True, "faults": [], "warnings": found, "config": where}
    show(fields, "\n".join([*(f"warning: {each}" for each in found), f"{where}: no fault"]), as_json)


@click.command()
@with_config
@with_json
def reload(config_path: Path | None, as_json: bool) -> None:
    """Check the configuration, then let the running gateway take it without a dropped call."""
    import signal

    from gpuproxy.process import running_supervisor

    directory = Path(checked(config_path_of(config_path)).server.data_dir)
    supervisor = running_supervisor(directory)
    if not supervisor:
        raise click.ClickException(f"no gateway runs on {directory}; start one with gpuproxy serve")
    os.kill(supervisor, signal.SIGHUP)
    show({"pid": supervisor}, f"gateway {supervisor} was told to take the configuration", as_json)


@click.command()
@with_config
@with_json
def migrate(config_path: Path | None, as_json: bool) -> None:
    """Bring the store to the schema of this version."""
    from gpuproxy.store.migrate import NEWEST, upgrade

    was_old = on_store(config_path, upgrade)
    told = f"store brought to schema {NEWEST}" if was_old else f"store is at schema {NEWEST} already"
    show({"schema": NEWEST, "was_changed": was_old}, told, as_json)


@click.command()
@with_json
def version(as_json: bool) -> None:
    """Print the version."""
    show({"version": __version__}, __version__, as_json)
