"""Rentals as the store has them. Functions are synchronous and work inside the caller's transaction.

Whoever changes a rental locks its row first and looks at the state it has then; accounts are locked after rentals.
"""

from datetime import datetime, timedelta
from typing import Any
from uuid import uuid4

from msgspec import Struct, structs
from sqlalchemy import ColumnElement, Connection, Row, select, update

from gpuproxy.access.paging import Page, after
from gpuproxy.errors import GatewayError
from gpuproxy.fleet.states import LIVING, State
from gpuproxy.ledger.transfers import insert_new
from gpuproxy.store.schema import installations, rentals

PREFIX_CHARACTERS = 8
LIVING_MAX = 10_000  # looked at in one pass
NO_TIME = timedelta(0)


class Rental(Struct, frozen=True, kw_only=True):
    """A row of `rentals`; see the table for the columns."""

    id: str
    user_id: str
    key_id: str = ""
    provider: str
    offer_id: str
    state: State
    native_id: str = ""
    instance_id: str = ""
    reason: str = ""
    has_failed: bool = False
    label: str = ""
    gpu_model: str
    gpu_count: int
    region: str = ""
    spec: dict[str, Any]
    ip: str = ""
    ports: dict[str, int] = {}
    basis: str
    price_nanousd_per_hour: int
    storage_price_nanousd_per_hour: int = 0
    cost_nanousd_per_hour: int
    storage_cost_nanousd_per_hour: int = 0
    committed_hours: int = 0
    rate_nanousd_per_hour: int = 0
    cost_rate_nanousd_per_hour: int = 0
    metered_at: datetime
    running_us: int = 0
    stopped_us: int = 0
    accrued_nanousd: int = 0
    accrued_rest: int = 0
    cost_accrued_nanousd: int = 0
    cost_accrued_rest: int = 0
    charged_nanousd: int = 0
    written_off_nanousd: int = 0
    cost_posted_nanousd: int = 0
    hold_id: str
    warned_s: int = 0
    request_key: str | None = None
    request_hash: str = ""
    group_id: str = ""
    seen_at: datetime | None = None
    missing_count: int = 0
    created_at: datetime
    running_at: datetime | None = None
    moved_at: datetime
    ended_at: datetime | None = None
    expires_at: datetime | None = None


def prefix_of(connection: Connection) -> str:
    """Return what the tags of this installation begin with, made up when first asked.

    Several installations may rent with one account of a provider; each touches only its own.
    """
    insert_new(connection, installations, {"id": 1, "prefix": f"gpx{uuid4().hex[:PREFIX_CHARACTERS]}-"})
    prefix: str = connection.execute(select(installations.c.prefix)).scalar_one()
    return prefix


def new_id(prefix: str) -> str:
    """Return the id of a new rental, which is its tag at the provider too."""
    return f"{prefix}{uuid4().hex[:16]}"


def add(connection: Connection, rental: Rental) -> bool:
    """Store a new rental; False if its id or request key is taken."""
    return insert_new(connection, rentals, structs.asdict(rental))


def find(connection: Connection, rental_id: str) -> Rental | None:
    """Return the rental; None if there is none."""
    return _first(connection, rentals.c.id == rental_id)


def locked(connection: Connection, rental_id: str) -> Rental:
    """Return the rental as nobody else can change it until the transaction ends."""
    row = connection.execute(select(rentals).where(rentals.c.id == rental_id).with_for_update()).one()
    return _rental(row)


def by_request(connection: Connection, request_key: str) -> Rental | None:
    """Return the rental that a call with this Idempotency-Key has made."""
    return _first(connection, rentals.c.request_key == request_key)


def named(connection: Connection, name: str, user_id: str | None = None, provider: str | None = None) -> Rental:
    """Return the rental with this contract id, or the newest with this id at the provider, prefixed or not.

    Raises GatewayError NOT_FOUND, also for another user's.
    """
    is_named = (rentals.c.native_id == name) | (rentals.c.instance_id == name)
    chosen: ColumnElement[bool] = (rentals.c.id == name) | (is_named & (rentals.c.native_id != ""))
    if user_id is not None:
        chosen &= rentals.c.user_id == user_id
    if provider is not None:
        chosen &= rentals.c.provider == provider
    row = connection.execute(select(rentals).where(chosen).order_by(rentals.c.created_at.desc()).limit(1)).first()
    if row is None:
        raise GatewayError("NOT_FOUND", f"no rental {name[:100]!r} in this account")
    return _rental(row)


def in_states(connection: Connection, states: tuple[State, ...] = LIVING, provider: str = "") -> list[Rental]:
    """Return the rentals in these states, oldest first, of one provider if it is named."""
    chosen: ColumnElement[bool] = rentals.c.state.in_(states)
    return _all(connection, chosen & (rentals.c.provider == provider) if provider else chosen)


def living_of(connection: Connection, user_id: str) -> list[Rental]:
    """Return a user's rentals that have not ended."""
    return _all(connection, (rentals.c.user_id == user_id) & rentals.c.state.in_(LIVING))


def page_of_user(connection: Connection, user_id: str, page: Page, is_living: bool) -> list[Rental]:
    """Return a part of a user's rentals, oldest first."""
    query = select(rentals).where(rentals.c.user_id == user_id)
    if is_living:
        query = query.where(rentals.c.state.in_(LIVING))
    return [_rental(row) for row in connection.execute(after(query, rentals, page))]


def of_group(connection: Connection, group_id: str) -> list[Rental]:
    """Return the rentals of a reservation."""
    return _all(connection, rentals.c.group_id == group_id)


def locked_group(connection: Connection, group_id: str) -> list[Rental]:
    """Return the rentals of a reservation, as nobody else changes them now; everybody locks them in this order."""
    return [locked(connection, rental.id) for rental in of_group(connection, group_id)]


def change(connection: Connection, rental: Rental, **values: Any) -> Rental:
    """Write columns; return the rental with them. Its row must be locked."""
    connection.execute(update(rentals).where(rentals.c.id == rental.id).values(**values))
    return structs.replace(rental, **values)


def microseconds(since: datetime, until: datetime) -> int:
    """Return how long that is, exactly; 0 if it is the other way round."""
    return max(NO_TIME, until - since) // timedelta(microseconds=1)


def _all(connection: Connection, chosen: ColumnElement[bool]) -> list[Rental]:
    query = select(rentals).where(chosen).order_by(rentals.c.created_at, rentals.c.id).limit(LIVING_MAX)
    return [_rental(row) for row in connection.execute(query)]


def _first(connection: Connection, chosen: ColumnElement[bool]) -> Rental | None:
    row = connection.execute(select(rentals).where(chosen)).first()
    return _rental(row) if row is not None else None


def _rental(row: Row[Any]) -> Rental:
    return Rental(**row._mapping)
