"""What a person should know of providers: how the last look went, instances we did not rent, charges that differ.

A finding is open until it is there no more or somebody has acknowledged it. Strays (our tag, but no living rental) are
destroyed without anybody's doing; foreign instances (another tag, or none) are shown and never touched. Admins are told
of what is new. Functions work inside the caller's transaction.
"""

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any, Literal, get_args
from uuid import uuid4

from msgspec import Struct
from sqlalchemy import ColumnElement, Connection, delete, func, select, update

from gpuproxy.access.paging import Page, after
from gpuproxy.errors import GatewayError
from gpuproxy.events.outbox import record
from gpuproxy.ledger.transfers import insert_new
from gpuproxy.store.schema import fleet_findings, provider_looks, users

Kind = Literal["stray", "foreign", "difference"]
KINDS: tuple[Kind, ...] = get_args(Kind)
LISTED: tuple[Kind, ...] = ("stray", "foreign")  # shown by lists, and over when one shows them no more
FOUND_MAX = 1_000  # open ones kept of one provider
KEPT = timedelta(days=30)  # those of lists, once they are over
ADMINS_MAX = 20  # told of what is new
NEWS_MAX = 20  # told of one list
ERROR_CHARACTERS_MAX = 500

_column = fleet_findings.c
_look = provider_looks.c


class Finding(Struct, frozen=True):
    """Something to look at. `subject_id` is the provider's id of an instance, of a difference the rental's."""

    id: str
    provider: str
    kind: Kind
    subject_id: str
    detail: dict[str, Any]
    created_at: datetime
    resolved_at: datetime | None = None
    acknowledged_at: datetime | None = None


class Look(Struct, frozen=True):
    """How the last looks at a provider's list and charges went."""

    provider: str
    looked_at: datetime | None = None
    listed_at: datetime | None = None
    error: str = ""
    instance_count: int = 0
    compared_until: datetime | None = None
    compare_error: str = ""
    comparison: dict[str, Any] | None = None


def note_list(
    connection: Connection,
    provider: str,
    at: datetime,
    instance_count: int,
    found: Mapping[tuple[Kind, str], dict[str, Any]],
) -> None:
    """Note a list that came, with the strays and foreign instances in it."""
    _note(connection, provider, looked_at=at, listed_at=at, error="", instance_count=instance_count)
    is_listed = (_column.provider == provider) & _column.kind.in_(LISTED)
    query = select(_column.kind, _column.subject_id).where(is_listed, _column.resolved_at.is_(None))
    before = {(row.kind, row.subject_id) for row in connection.execute(query)}
    for kind, subject_id in before - found.keys():
        same = (_column.provider == provider, _column.kind == kind, _column.subject_id == subject_id)
        connection.execute(update(fleet_findings).where(*same).values(resolved_at=at))
    new = sorted(found.keys() - before, reverse=True)[: max(0, FOUND_MAX - len(before))]  # strays first
    for number, (kind, subject_id) in enumerate(new):
        add(connection, provider, kind, subject_id, found[kind, subject_id], at, is_told=number < NEWS_MAX)
    connection.execute(delete(fleet_findings).where(is_listed, _column.resolved_at < at - KEPT))


def note_failure(connection: Connection, provider: str, at: datetime, error: str) -> None:
    """Note that no list came."""
    _note(connection, provider, looked_at=at, error=error[:ERROR_CHARACTERS_MAX])


def note_comparison(connection: Connection, provider: str, until: datetime, comparison: dict[str, Any]) -> None:
    """Note how a span of rentals compared with what the provider took."""
    _note(connection, provider, compared_until=until, compare_error="", comparison=comparison)


def note_no_comparison(connection: Connection, provider: str, error: str) -> None:
    """Note that the provider did not say what it took."""
    _note(connection, provider, compare_error=error[:ERROR_CHARACTERS_MAX])


def add(
    connection: Connection,
    provider: str,
    kind: Kind,
    subject_id: str,
    detail: dict[str, Any],
    at: datetime,
    is_told: bool = True,
) -> None:
    """Store a finding, and tell admins; one that was over is open again."""
    row = Finding(str(uuid4()), provider, kind, subject_id, detail, at)
    if insert_new(connection, fleet_findings, {name: getattr(row, name) for name in row.__struct_fields__}):
        if is_told:
            _tell(connection, row)
        return
    same = (_column.provider == provider, _column.kind == kind, _column.subject_id == subject_id)
    connection.execute(update(fleet_findings).where(*same).values(detail=detail, resolved_at=None))


def looks(connection: Connection) -> dict[str, Look]:
    """Return how providers were when last looked at, by name."""
    return {row.provider: Look(**row._mapping) for row in connection.execute(select(provider_looks))}


def open_counts(connection: Connection) -> dict[tuple[str, Kind], int]:
    """Return how many open findings there are, by provider and kind."""
    query = select(_column.provider, _column.kind, func.count()).where(_is_open())
    counted = connection.execute(query.group_by(_column.provider, _column.kind))
    return {(name, kind): count for name, kind, count in counted}


def page(connection: Connection, asked: Page, provider: str, kind: str, is_all: bool) -> list[Finding]:
    """Return a part of the findings, oldest first: of one provider or kind, if named; all, or only the open ones."""
    query = select(fleet_findings)
    if provider:
        query = query.where(_column.provider == provider)
    if kind:
        query = query.where(_column.kind == kind)
    if not is_all:
        query = query.where(_is_open())
    return [Finding(**row._mapping) for row in connection.execute(after(query, fleet_findings, asked))]


def acknowledge(connection: Connection, finding_id: str, at: datetime) -> Finding:
    """Close a finding: somebody has seen it. Again changes nothing. Raises GatewayError NOT_FOUND."""
    unseen = (_column.id == finding_id, _column.acknowledged_at.is_(None))
    connection.execute(update(fleet_findings).where(*unseen).values(acknowledged_at=at))
    row = connection.execute(select(fleet_findings).where(_column.id == finding_id)).first()
    if row is None:
        raise GatewayError("NOT_FOUND", f"no finding {finding_id[:100]!r}; list them to see those there are")
    return Finding(**row._mapping)


def _tell(connection: Connection, found: Finding) -> None:
    admins = select(users.c.id).where(users.c.is_admin, users.c.is_active).order_by(users.c.created_at)
    told = {"provider": found.provider, "kind": found.kind, "subject_id": found.subject_id, **found.detail}
    for user_id in connection.scalars(admins.limit(ADMINS_MAX)).all():
        record(connection, "provider.finding", user_id, {"finding_id": found.id, **told})


def _is_open() -> ColumnElement[bool]:
    return _column.resolved_at.is_(None) & _column.acknowledged_at.is_(None)


def _note(connection: Connection, provider: str, **values: Any) -> None:
    new = {name: getattr(Look(provider), name) for name in Look.__struct_fields__} | values
    if not insert_new(connection, provider_looks, new):
        connection.execute(update(provider_looks).where(_look.provider == provider).values(**values))
