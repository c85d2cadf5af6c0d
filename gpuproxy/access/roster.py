"""All users and their keys, part by part, for whoever must see all of them in little memory."""

from collections.abc import AsyncIterator, Iterable

from sqlalchemy import select

from gpuproxy.access.accounts import KEY_COLUMNS, Key, User, key_from
from gpuproxy.store.engine import Store
from gpuproxy.store.schema import api_keys, users

USERS_AT_ONCE = 100


async def user_pages(store: Store) -> AsyncIterator[list[User]]:
    """Yield all users by id. Each part is a transaction of its own: a slow reader holds no connection."""
    query = select(*(users.c[name] for name in User.__struct_fields__)).order_by(users.c.id).limit(USERS_AT_ONCE)
    last = ""
    while True:
        async with store.reading() as connection:
            rows = await connection.execute(query.where(users.c.id > last))
            page = [User(**row._mapping) for row in rows]
        if page:
            yield page
            last = page[-1].id
        if len(page) < USERS_AT_ONCE:
            return


async def keys_of(store: Store, user_ids: Iterable[str]) -> dict[str, list[Key]]:
    """Return the keys of each of some users, oldest first."""
    wanted = list(user_ids)
    query = select(*KEY_COLUMNS).where(api_keys.c.user_id.in_(wanted))
    found: dict[str, list[Key]] = {user_id: [] for user_id in wanted}
    async with store.reading() as connection:
        for row in await connection.execute(query.order_by(api_keys.c.created_at, api_keys.c.id)):
            found[row.user_id].append(key_from(row))
    return found
