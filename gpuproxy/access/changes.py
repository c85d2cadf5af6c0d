"""The change feed: whose right was taken away or given back, or is on other terms, for control to tell the workers.

A row is written in the transaction of the change, so it does not matter which process made it.
"""

from datetime import UTC, datetime

from msgspec import Struct
from sqlalchemy import ColumnElement, and_, delete, insert, or_, select
from sqlalchemy.ext.asyncio import AsyncConnection

from gpuproxy.store.cursor import Cursor
from gpuproxy.store.engine import Store
from gpuproxy.store.schema import api_keys, changes, users

KEY_REVOKED = "key_revoked"  # as the kind of a change; the subject is a key
USER_BLOCKED = "user_blocked"  # the subject is a user
USER_UNBLOCKED = "user_unblocked"
INSTANCES_CHANGED = "instances_changed"
TERMS_CHANGED = "terms_changed"  # the subject is a user, whose grants are to be asked for anew
CHANGES_AT_ONCE = 1_000


class ChangedKeys(Struct, frozen=True):
    """Keys whose right changed, by what they may do now.

    `renters` are users whose rented machines have changed. Keys `renewed` may do the same, on other terms.
    """

    lost: tuple[str, ...] = ()
    restored: tuple[str, ...] = ()
    renters: tuple[str, ...] = ()
    renewed: tuple[str, ...] = ()


async def announce(connection: AsyncConnection, kind: str, subject_id: str) -> None:
    """Write a row, in the transaction of the change."""
    await connection.execute(insert(changes).values(kind=kind, subject_id=subject_id, at=datetime.now(UTC)))


async def newest_change(store: Store) -> int:
    """Return the number of the newest row, 0 if there is none."""
    async with store.reading() as connection:
        query = select(changes.c.seq).order_by(changes.c.seq.desc()).limit(1)
        return (await connection.scalar(query)) or 0


async def unread_changes(store: Store, cursor: Cursor) -> tuple[list[int], ChangedKeys]:
    """Read what is new; return the numbers of its rows too, for `cursor.advance`."""
    query = select(changes.c.seq).where(cursor.unread(changes.c.seq)).order_by(changes.c.seq).limit(CHANGES_AT_ONCE)
    rows = [row.seq for row in await store.look(query)]
    if not rows:
        return rows, ChangedKeys()
    async with store.reading() as connection:
        return rows, await _changed(connection, changes.c.seq.in_(rows))


async def revoked_keys_since(store: Store, since: datetime) -> tuple[str, ...]:
    """Return the ids of all keys that lost their right since the time `since` and have not got it back."""
    async with store.reading() as connection:
        return (await _changed(connection, changes.c.at >= since)).lost


async def forget_changes(store: Store, before: datetime) -> int:
    """Delete rows from before a time, CHANGES_AT_ONCE at most; return how many."""
    oldest = select(changes.c.seq).where(changes.c.at < before).order_by(changes.c.at).limit(CHANGES_AT_ONCE)
    if not await store.look(oldest.limit(1)):
        return 0
    async with store.writing() as connection:
        # Another node may be at it. A subquery that locks may be run again and again, each time with other rows.
        chosen = (await connection.scalars(oldest.with_for_update(skip_locked=True))).all()
        return (await connection.execute(delete(changes).where(changes.c.seq.in_(chosen)))).rowcount


async def _changed(connection: AsyncConnection, chosen: ColumnElement[bool]) -> ChangedKeys:
    """Say what the keys these changes are about may do now, which is not what each change said."""
    subjects = select(changes.c.subject_id).where(chosen)
    of_keys = subjects.where(changes.c.kind == KEY_REVOKED)
    of_users = subjects.where(changes.c.kind.in_((USER_BLOCKED, USER_UNBLOCKED)))
    on_other_terms = subjects.where(changes.c.kind == TERMS_CHANGED)
    is_live = and_(api_keys.c.revoked_at.is_(None), users.c.is_active).label("is_live")
    is_right = or_(api_keys.c.id.in_(of_keys), api_keys.c.user_id.in_(of_users)).label("is_right")
    query = (
        select(api_keys.c.id, is_live, is_right)
        .select_from(api_keys.join(users, users.c.id == api_keys.c.user_id))
        .where(or_(is_right, and_(is_live, api_keys.c.user_id.in_(on_other_terms))))
        .order_by(api_keys.c.created_at, api_keys.c.id)
    )
    rows = (await connection.execute(query)).all()
    of_right = [row for row in rows if row.is_right]
    lost, restored = (tuple(row.id for row in of_right if row.is_live == wanted) for wanted in (False, True))
    renewed = tuple(row.id for row in rows if not row.is_right)
    of_renters = select(changes.c.subject_id).where(chosen, changes.c.kind == INSTANCES_CHANGED).distinct()
    return ChangedKeys(lost, restored, tuple(await connection.scalars(of_renters)), renewed)
