"""Waiting for a rented instance to run, without I/O: what to ask, what an answer means, what a terminal shows."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote

from gpuproxy.client.errors import GpuproxyError, InstanceFailedError

WAIT_S = 900.0  # a large image takes minutes to arrive
POLL_S = 2.0
OVER = ("failed", "destroying", "destroyed", "stopping", "stopped")


def instance_path(provider: str, instance_id: str) -> str:
    """Return the path of an offer or a rented instance at a provider."""
    return f"/gpu/instances/{quote(provider, safe='')}/{quote(str(instance_id), safe='')}"


def rental_of(answer: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rented instance an answer tells of: at the top level its status would be the call's, success."""
    return dict(answer.get("data") or answer)


def rental_path(rental: Mapping[str, Any]) -> str:
    """Return the path that tells how a rented instance is."""
    return f"/gpu/rentals/{quote(str(rental['contract_id']), safe='')}"


def is_up(rental: Mapping[str, Any]) -> bool:
    """Tell whether the instance runs. Raises InstanceFailedError if it never will."""
    status = str(rental["status"])
    if status in OVER:
        reason = rental.get("reason") or "the provider gave no reason"
        message = f"instance {rental['contract_id']} is {status}: {reason}"
        raise InstanceFailedError(message, "INSTANCE_FAILED", str(rental["contract_id"]))
    return status == "running"


def not_in_time(rental: Mapping[str, Any], wait_s: float) -> InstanceFailedError:
    """Return the error for an instance that does not come up; it is still rented."""
    contract_id = str(rental["contract_id"])
    message = f"instance {contract_id} is {rental['status']} after {wait_s:g} s; it is still rented: destroy it or wait"
    return InstanceFailedError(message, "TIMED_OUT", contract_id)


@contextmanager
def in_doubt(provider: str, instance_id: str) -> Iterator[None]:
    """Say to who does not hear how a wish to rent ended that a machine may be rented and cost."""
    try:
        yield
    except BaseException as error:
        status = error.status if isinstance(error, GpuproxyError) else 0
        if not 400 <= status < 500 and status != 503:  # with these nothing has happened
            error.add_note(f"offer {instance_id} of {provider} may be rented all the same: GET /gpu/rentals tells")
        raise


@contextmanager
def left_behind(rental: Mapping[str, Any]) -> Iterator[None]:
    """Name the instance to who stops waiting for it, by a failure or an interruption: it is rented and costs."""
    contract_id = str(rental["contract_id"])
    try:
        yield
    except InstanceFailedError:
        raise
    except GpuproxyError as error:
        message = f"instance {contract_id} is rented, but how it is cannot be told: {error.message}"
        raise InstanceFailedError(message, error.code, contract_id) from error
    except BaseException as error:
        error.add_note(f"instance {contract_id} is rented and stays so: destroy it or wait for it")
        raise


@contextmanager
def progress(rental: Mapping[str, Any]) -> Iterator[Any]:
    """Show on a terminal that something is waited for; yield a function that takes the newest status."""
    if not sys.stderr.isatty():
        yield lambda status: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"{rental['contract_id']} {rental['status']}", total=None)
        yield lambda status: bar.update(task, description=f"{rental['contract_id']} {status}")
