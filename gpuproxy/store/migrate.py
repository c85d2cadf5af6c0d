"""Brings a store to the schema this version needs, once, whoever asks and however many ask at once.

Alembic costs a third of a second to import, so the stored revision is read first and Alembic is left alone
when it is the newest already.
"""

from pathlib import Path

from sqlalchemy import Connection, inspect, text

from gpuproxy.errors import GatewayError
from gpuproxy.store.engine import Store, open_store

NEWEST = "0025"  # the last revision in migrations/versions; a test compares
LOCK_ID = 7_305_819_211  # any number, the same for every gpuproxy on one PostgreSQL


async def migrate(url: str) -> bool:
    """Bring the store at `url` to the newest schema. Return whether anything had to be done.

    Raises ValueError for an unusable URL, GatewayError for a store made by a newer gpuproxy.
    """
    store = open_store(url)
    try:
        return await upgrade(store)
    finally:
        await store.close()


async def upgrade(store: Store) -> bool:
    """Bring an open store to the newest schema. Return whether anything had to be done."""
    async with store.reading() as connection:
        if await connection.run_sync(_revision) == NEWEST:
            return False
    async with store.writing() as connection:
        if not store.is_sqlite:
            await connection.execute(text("SET LOCAL lock_timeout = 0"))  # another's migration may take its time
            await connection.execute(text(f"SELECT pg_advisory_xact_lock({LOCK_ID})"))
        return await connection.run_sync(_upgrade)


def _revision(connection: Connection) -> str | None:
    if not inspect(connection).has_table("alembic_version"):
        return None
    revision: str | None = connection.scalar(text("SELECT version_num FROM alembic_version"))
    return revision


def _upgrade(connection: Connection) -> bool:
    """Run the missing migrations inside the caller's transaction, under its lock."""
    revision = _revision(connection)
    if revision == NEWEST:
        return False  # another process was faster
    from alembic import command  # slow to import, see above
    from alembic.config import Config
    from alembic.script import ScriptDirectory
    from alembic.util import CommandError

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    try:
        ScriptDirectory.from_config(config).get_revision(revision or "base")
    except CommandError:
        raise GatewayError(
            "CONFLICT",
            f"the store is at schema {revision}, newer than {NEWEST} of this gpuproxy; update gpuproxy",
        ) from None
    command.upgrade(config, "head")
    return True
