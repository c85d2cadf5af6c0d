"""Where a customer's running machines are reached, as workers are told."""

from gpuproxy.fleet.parts import Fleet
from gpuproxy.fleet.rentals import living_of
from gpuproxy.link.messages import Machine


async def machines_of(fleet: Fleet, user_id: str) -> tuple[Machine, ...]:
    """Return the machines of a user that run. Raises what the store raises."""
    rows = await fleet.read(living_of, user_id)
    return tuple(
        Machine(row.id, row.ip, {int(inside): outside for inside, outside in row.ports.items()})
        for row in rows
        if row.state == "running" and row.ip
    )
