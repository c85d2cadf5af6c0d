"""Opens the database a URL names and hands out transactions that are either reading or writing.

SQLite: WAL, so that readers and the one writer do not wait for each other, and ``synchronous=FULL``: with
NORMAL a power cut takes back commits of the last moments, and a journal segment is deleted right after the
commit that holds its receipts. Writing transactions open with BEGIN IMMEDIATE: a transaction that reads first
and writes later would fail with "database is locked" at once, whatever busy_timeout says.
"""

import asyncio
import socket
import sqlite3
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, closing, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import aiosqlite
from sqlalchemy import Engine, Executable, Insert, Row, Table, create_engine, event, text
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL, Connection, Dialect, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, InternalError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import StaticPool

BUSY_TIMEOUT_MS = 5_000  # for a lock, or a connection: no transaction here takes that long
IDLE_TIMEOUT_MS = 30_000  # for the next word in a transaction: of a process that was stopped others wait for the locks
POOL_CONNECTIONS = 5  # each SQLite connection is a thread
PAGE_SIZE = "PRAGMA page_size=8192"  # of a new file; with the cache below 1.5 of 6.5 us less per receipt stored
PRAGMAS = (
    "PRAGMA cache_size=-8000",
    "PRAGMA synchronous=FULL",
    "PRAGMA foreign_keys=ON",
    f"PRAGMA busy_timeout={BUSY_TIMEOUT_MS}",
    "PRAGMA journal_size_limit=67108864",
)
# Of both ends of a connection: else who waits for a machine that is gone, with locks in hand, may wait for hours.
KEEPALIVE = {"tcp_keepalives_idle": "10", "tcp_keepalives_interval": "5", "tcp_keepalives_count": "3"}
KEEPALIVE_OPTIONS = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 25_000),
)
# SQLSTATE classes of PostgreSQL: the connection, rolled back for another, short of something, in use, being stopped
AWAY_STATES = ("08", "40", "53", "55", "57")
SSL_MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")


class Store:
    """An open database. Transactions commit when their block ends and roll back when it raises."""

    def __init__(self, engine: AsyncEngine, ssl_mode: str = "") -> None:
        self.engine = engine
        self.ssl_mode = ssl_mode  # of PostgreSQL
        self.is_sqlite = engine.dialect.name == "sqlite"
        self._writing = engine.execution_options(gpuproxy_writes=True)
        self._looking = engine.execution_options(isolation_level="AUTOCOMMIT")
        self.snapshot: str | None = None  # of PostgreSQL's transactions
        self._turn: asyncio.Lock | None = asyncio.Lock() if self.is_sqlite else None
        self._window = _window(self) if self.is_sqlite else None

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[AsyncConnection]:
        """Open a transaction that only reads."""
        async with self.engine.begin() as connection:
            yield connection

    @asynccontextmanager
    async def writing(self) -> AsyncIterator[AsyncConnection]:
        """Open a transaction that may write; on SQLite it holds the write lock from its start.

        There those of this process wait in line. SQLite's own waiting is by chance: among many that write, one was
        passed over until it gave up, so that the outcome of a webhook was lost and it was sent once more.
        """
        async with self._turn or nullcontext(), self._writing.begin() as connection:
            yield connection

    async def look(self, query: Executable) -> Sequence[Row[Any]]:
        """Return the rows of a short query by an index that comes round several times a second.

        On SQLite it is done here and now, by a connection of its own: a reader waits for nobody there, and the way
        through the driver's thread and a transaction costs 1.2 ms instead of 0.1. On PostgreSQL the query goes without
        a transaction around it, which is one round trip instead of three.
        """
        if self._window is not None:
            with self._window.connect() as window:
                rows: Sequence[Row[Any]] = window.execute(query).all()
                return rows
        async with self._looking.connect() as connection:
            return (await connection.execute(query)).all()

    def version(self) -> int | str | None:
        """Return what is another whenever somebody else has written meanwhile; None if that is not known now.

        "Somebody else" is every connection but the one of `look`, in any process. Cost: 16 µs, of a `look` 300. On
        PostgreSQL it is what the bus saw last, see `bus`.
        """
        if self._window is None:
            return self.snapshot
        with closing(self._window.raw_connection()) as window:
            version: int = window.execute("PRAGMA data_version").fetchone()[0]
            return version

    def insert_new(self, table: Table) -> Insert:
        """Return an INSERT that passes over rows that exist already."""
        return insert_into(table, self.engine.dialect).on_conflict_do_nothing()

    async def is_healthy(self) -> bool:
        """Tell whether the database answers."""
        try:
            async with self.reading() as connection:
                await connection.execute(text("SELECT 1"))
        except (SQLAlchemyError, OSError):
            return False
        return True

    async def close(self) -> None:
        """Close all connections."""
        if self._window is not None:
            self._window.dispose()
        await self.engine.dispose()


def insert_into(table: Table, dialect: Dialect) -> "sqlite.Insert | postgresql.Insert":
    """Return an INSERT in the words of a database that has ON CONFLICT."""
    return sqlite.insert(table) if dialect.name == "sqlite" else postgresql.insert(table)


def fault_of(error: Exception) -> str:
    """Return the one line of a database's error that says what is wrong, without statement and values."""
    cause = error.__cause__ if isinstance(error, SQLAlchemyError) and error.__cause__ is not None else error
    lines = str(cause).splitlines()
    return lines[0] if lines else type(cause).__name__


def is_away(error: Exception) -> bool:
    """Tell whether the database could not be asked or broke off, so that it may do later what it did not do now."""
    if isinstance(error, (OperationalError, InterfaceError, InternalError, PoolTimeoutError, OSError)):
        return True
    return isinstance(error, DBAPIError) and (getattr(error.orig, "sqlstate", None) or "")[:2] in AWAY_STATES


def open_store(url: str) -> Store:
    """Return the Store at `url`: ``sqlite:///PATH`` or ``postgresql://…?sslmode=…``; connects on first use.

    Raises ValueError for a URL that cannot be used, with the remedy.
    """
    parsed = _parse(url)
    if parsed.get_backend_name() == "sqlite":
        return Store(_sqlite_engine(parsed))
    query = dict(parsed.query)
    ssl_mode = query.pop("sslmode", "prefer")
    if ssl_mode not in SSL_MODES:
        raise ValueError(f"store url has sslmode={ssl_mode!r}; known: {', '.join(SSL_MODES)}")
    if query:
        raise ValueError(f"store url has the parameters {', '.join(sorted(query))}; only sslmode is understood")
    return Store(_postgresql_engine(parsed, str(ssl_mode)), str(ssl_mode))


def shown(url: str) -> str:
    """Return the URL of a store as it may be told: without password and parameters."""
    return _parse(url).set(query={}).render_as_string(hide_password=True)


def _parse(url: str) -> URL:
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise ValueError(
            "store url cannot be read; write sqlite:///./gpuproxy.db or postgresql://user:password@host:5432/name"
        ) from None
    if parsed.get_backend_name() not in ("sqlite", "postgresql", "postgres"):
        raise ValueError(
            f"store url names the database {parsed.get_backend_name()!r}; known: sqlite:///PATH, "
            "postgresql://user:password@host:5432/name"
        )
    return parsed


def _sqlite_engine(url: URL) -> AsyncEngine:
    if not url.database or url.database == ":memory:":
        raise ValueError("store url names no file; write sqlite:///./gpuproxy.db")
    if url.query:
        raise ValueError(f"store url has the parameters {', '.join(sorted(url.query))}; sqlite takes none")
    path = Path(url.database)
    path.parent.mkdir(parents=True, exist_ok=True)
    engine = create_async_engine(
        url.set(drivername="sqlite+aiosqlite"),
        pool_size=POOL_CONNECTIONS,
        max_overflow=0,
        hide_parameters=True,  # errors are logged, what is stored is not
        async_creator=partial(_connect_sqlite, path),
    )
    event.listen(engine.sync_engine, "connect", _prepare_sqlite)
    event.listen(engine.sync_engine, "begin", _begin_sqlite)
    return engine


def _window(store: Store) -> Engine:
    """Return what `Store.look` looks through; it connects on first use."""
    return create_engine(
        "sqlite://", creator=partial(connect_plain, store), poolclass=StaticPool, isolation_level="AUTOCOMMIT"
    )


def connect_plain(store: Store) -> sqlite3.Connection:
    """Return a connection of its own to a SQLite store, for bulk writes; any one thread at a time may use it."""
    connection = sqlite3.connect(
        str(store.engine.url.database), timeout=BUSY_TIMEOUT_MS / 1_000, check_same_thread=False
    )
    try:
        _prepare_sqlite(connection, None)
    except BaseException:
        connection.close()
        raise
    return connection


async def _connect_sqlite(path: Path) -> aiosqlite.Connection:
    """Open the file. After a failure wait for the driver's thread, which else speaks to a closed event loop."""
    connection = aiosqlite.connect(path, timeout=BUSY_TIMEOUT_MS / 1_000)
    connection._thread.daemon = True  # as SQLAlchemy does: a thread must not keep the process
    try:
        return await connection
    except BaseException:
        connection._thread.join()
        raise


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # the driver must not open transactions by itself; `_begin_sqlite` does
    cursor = connection.cursor()
    cursor.execute(PAGE_SIZE)
    _switch_to_wal(cursor)
    for pragma in PRAGMAS:
        cursor.execute(pragma)
    cursor.close()


def _switch_to_wal(cursor: Any) -> None:
    """Switch a new file; connections that do so at once wait for each other in a circle, so for a moment only."""
    cursor.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_MS // 100}")
    for attempts_left in range(100, -1, -1):
        try:
            cursor.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError:
            if not attempts_left:
                raise
        else:
            return


def _begin_sqlite(connection: Connection) -> None:
    writes = connection.get_execution_options().get("gpuproxy_writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


async def connect_postgresql(store: Store) -> Any:
    """Return an asyncpg connection of its own to a PostgreSQL store, for what a pool cannot do: LISTEN, locks that
    last. The server notices within half a minute that this machine has gone.
    """
    import asyncpg  # type: ignore[import-untyped]  # 50 ms that a SQLite store does not need

    url = store.engine.url
    return await asyncpg.connect(
        host=url.host, port=url.port, user=url.username, password=url.password, database=url.database,
        ssl=store.ssl_mode, timeout=BUSY_TIMEOUT_MS / 1_000, server_settings=KEEPALIVE,
    )  # fmt: skip


def _postgresql_engine(url: URL, ssl_mode: str) -> AsyncEngine:
    engine = create_async_engine(
        url.set(drivername="postgresql+asyncpg", query={}),
        pool_size=POOL_CONNECTIONS,
        max_overflow=0,
        pool_timeout=BUSY_TIMEOUT_MS / 1_000,
        hide_parameters=True,
        connect_args={"ssl": ssl_mode, "timeout": BUSY_TIMEOUT_MS / 1_000},
    )
    event.listen(engine.sync_engine, "connect", _prepare_postgresql)
    return engine


def _prepare_postgresql(connection: Any, _record: Any) -> None:
    waits = {"lock_timeout": BUSY_TIMEOUT_MS, "idle_in_transaction_session_timeout": IDLE_TIMEOUT_MS}
    words = "; ".join(f"SET {name} = {value}" for name, value in {**KEEPALIVE, **waits}.items())
    connection.run_async(lambda driver: driver.execute(words))  # a pooler takes no settings with the first word
    opened = connection.driver_connection._transport.get_extra_info("socket")  # asyncpg has no door to it
    for option in KEEPALIVE_OPTIONS if opened.family != socket.AF_UNIX else ():
        opened.setsockopt(*option)
