"""Accounts with a password: register, log in, change it."""

from datetime import UTC, datetime

from msgspec import Struct
from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from gpuproxy.access.accounts import User, add_user, find_user
from gpuproxy.access.passwords import Hasher, check_password
from gpuproxy.access.sessions import Session, end_sessions_of, start_session
from gpuproxy.errors import GatewayError
from gpuproxy.store.engine import Store, insert_into
from gpuproxy.store.schema import passwords, users

WRONG = "the e-mail address or the password is wrong"


class Login(Struct, frozen=True):
    """A user and the session they have just begun."""

    user: User
    session: Session


async def register(store: Store, hasher: Hasher, email: str, password: str, lifetime_s: float) -> Login:
    """Add a user with a password and begin a session of `lifetime_s`.

    Raises GatewayError UNPROCESSABLE for a bad address or password, CONFLICT for a known address, UNAVAILABLE.
    """
    check_password(password, email)
    hashed = await hasher.hash(password)
    async with store.writing() as connection:
        user = await add_user(connection, email, is_admin=False)
        await _put(connection, user.id, hashed)
        return Login(user, await start_session(connection, user.id, hashed, lifetime_s))


async def log_in(store: Store, hasher: Hasher, email: str, password: str, lifetime_s: float) -> Login:
    """Begin a session. Takes as long for an unknown address as for a wrong password.

    Raises GatewayError UNAUTHORIZED, FORBIDDEN for a blocked user who knows their password, UNAVAILABLE.
    """
    user, stored = await _known(store, email)
    if not await hasher.is_right(stored, password) or user is None or stored is None:
        raise GatewayError("UNAUTHORIZED", WRONG)
    if not user.is_active:
        raise GatewayError("FORBIDDEN", "this account is blocked; ask the operator")
    if hasher.is_outdated(stored):
        stored = await _renewed(store, hasher, user.id, stored, password)
    async with store.writing() as connection:
        return Login(user, await start_session(connection, user.id, stored, lifetime_s))


async def change_password(
    store: Store, hasher: Hasher, email: str, current: str, wished: str, lifetime_s: float
) -> Login:
    """Set a new password, end all sessions of the user, begin one. Raises as `log_in` and `register` do."""
    check_password(wished, email)
    user = (await log_in(store, hasher, email, current, lifetime_s)).user
    hashed = await hasher.hash(wished)
    async with store.writing() as connection:
        await _put(connection, user.id, hashed)
        await end_sessions_of(connection, user.id)
        return Login(user, await start_session(connection, user.id, hashed, lifetime_s))


async def set_password(store: Store, email: str, password: str) -> None:
    """Set the password of a user as the operator, and end their sessions.

    Raises GatewayError NOT_FOUND for an unknown address, UNPROCESSABLE for a bad password.
    """
    user = await find_user(store, email)
    check_password(password, email)
    hasher = Hasher()
    hashed = await hasher.hash(password)
    hasher.close()
    async with store.writing() as connection:
        await _put(connection, user.id, hashed)
        await end_sessions_of(connection, user.id)


async def _known(store: Store, email: str) -> tuple[User | None, str | None]:
    shown = [users.c[field] for field in User.__struct_fields__]
    query = (
        select(*shown, passwords.c.hash)
        .select_from(users.outerjoin(passwords, passwords.c.user_id == users.c.id))
        .where(users.c.email == email.lower())
    )
    async with store.reading() as connection:
        row = (await connection.execute(query)).first()
    if row is None:
        return None, None
    fields = dict(row._mapping)
    stored = fields.pop("hash")
    return User(**fields), stored


async def _renewed(store: Store, hasher: Hasher, user_id: str, stored: str, password: str) -> str:
    """Hash a right password anew; return the hash that holds now, of whoever was faster if it is of this password."""
    better = await hasher.hash(password)
    whose = passwords.c.user_id == user_id
    async with store.writing() as connection:
        values = {"hash": better, "changed_at": datetime.now(UTC)}
        done = await connection.execute(update(passwords).where(whose, passwords.c.hash == stored).values(**values))
        if done.rowcount:
            return better
        found: str | None = await connection.scalar(select(passwords.c.hash).where(whose))
    return found if found is not None and await hasher.is_right(found, password) else stored


async def _put(connection: AsyncConnection, user_id: str, hashed: str) -> None:
    """Replace the hash; first of all in a change, for a session that begins meanwhile waits at this row."""
    row = {"user_id": user_id, "hash": hashed, "changed_at": datetime.now(UTC)}
    wanted = insert_into(passwords, connection.dialect).values(**row)
    await connection.execute(wanted.on_conflict_do_update(index_elements=["user_id"], set_=row))
