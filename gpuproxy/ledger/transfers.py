"""Transfers between accounts, in whole nanodollars: the one place where balances change.

An account's ``posted_nanousd`` is what was credited to it less what was debited, so the sum over all accounts is
zero and a customer's credit account shows what is theirs. Transfers are immutable; each carries an
idempotency key, so that whoever is unsure may post again.

These functions are synchronous and work inside the caller's writing transaction: ``await
connection.run_sync(post, ...)``. Whoever changes an account locks it first, all of one transaction in one order, so
none waits in a circle (SQLite's one writer has the whole file).
"""

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from uuid import uuid4

from msgspec import Struct, field
from sqlalchemy import Connection, Table, bindparam, insert, select, update

from gpuproxy.errors import GatewayError
from gpuproxy.events.outbox import record
from gpuproxy.store.engine import insert_into
from gpuproxy.store.schema import accounts, transfers

REVENUE = "revenue"  # what calls and rentals were charged
WRITE_OFF = "write_off"  # what should have been charged but was not there
ADJUSTMENTS = "adjustments"  # credit given or taken by hand
PAYMENTS = "payments"  # money that came in
PROVIDER_COST = "provider_cost"  # what rented machines cost us
CREDIT = "credit"  # the kind of customers' accounts
AMOUNT_NANOUSD_MAX = 10**18  # a billion dollars; nine times that fits the column


# Made once: to make and look up such a statement takes SQLAlchemy as long as the database takes to do it.
_IS_ONE = accounts.c.id.in_(bindparam("ids", expanding=True))
_FIND = select(accounts.c.id).where(_IS_ONE)
_LOCK = (
    select(accounts.c.id, accounts.c.posted_nanousd, accounts.c.held_nanousd, accounts.c.overdraft_nanousd)
    .where(_IS_ONE)
    .order_by(accounts.c.id)
    .with_for_update()
)
_POST = insert(transfers)
_APPLY = (
    update(accounts)
    .where(accounts.c.id == bindparam("changed"))
    .values(
        posted_nanousd=accounts.c.posted_nanousd + bindparam("change"),
        held_nanousd=accounts.c.held_nanousd - bindparam("released"),
    )
)


class Transfer(Struct, frozen=True):
    """An amount over 0 that goes from `debit` to `credit`, for good; receipts it pays name the same `charge_id`."""

    debit: str
    credit: str
    amount_nanousd: int
    kind: str
    idempotency_key: str
    charge_id: str = ""
    id: str = field(default_factory=lambda: str(uuid4()))


class Account(Struct, frozen=True):
    """An account as it stood when it was locked."""

    id: str
    posted_nanousd: int = 0
    held_nanousd: int = 0
    overdraft_nanousd: int = 0

    @property
    def free_nanousd(self) -> int:
        """Return what may still be held or charged."""
        return max(0, self.posted_nanousd - self.held_nanousd + self.overdraft_nanousd)


def credit_account(user_id: str) -> str:
    """Return the id of the account that holds a customer's credit."""
    return f"{CREDIT}:{user_id}"


def lock(connection: Connection, account_ids: Iterable[str]) -> dict[str, Account]:
    """Return those of the accounts that exist, as nobody else can change them until the transaction ends."""
    rows = connection.execute(_LOCK, {"ids": sorted(set(account_ids))})
    return {row[0]: Account(*row) for row in rows}


def lock_made(connection: Connection, account_ids: Iterable[str]) -> dict[str, Account]:
    """Return the accounts, locked, made if they were not there."""
    wanted = set(account_ids)
    make_missing(connection, wanted)
    return lock(connection, wanted)


def make_missing(connection: Connection, account_ids: Iterable[str]) -> None:
    """Add those of the accounts that are not there, before any is locked.

    Who had locked some and then waited for one that another has just made would wait in a circle.
    """
    wanted = set(account_ids)
    if missing := wanted.difference(connection.scalars(_FIND, {"ids": sorted(wanted)})):
        open_accounts(connection, missing)


def open_accounts(connection: Connection, account_ids: Iterable[str]) -> None:
    """Add accounts with nothing on them, passing over those that exist.

    A customer's account names its owner, so it needs the user (IntegrityError).
    """
    for account_id in sorted(set(account_ids)):
        kind, _, owner = account_id.partition(":")
        row = {"id": account_id, "kind": kind, "owner_user_id": owner or None}
        insert_new(connection, accounts, {**row, "posted_nanousd": 0, "held_nanousd": 0})


def post(connection: Connection, wanted: Sequence[Transfer]) -> list[Transfer]:
    """Post transfers; return those that were not posted before under the same key.

    Raises GatewayError UNPROCESSABLE for an amount out of range, CONFLICT for a key used for something else,
    INSUFFICIENT_CREDITS when a customer would end under their overdraft; the transaction must end then.
    """
    found = _touched(connection, wanted)
    new = [each for each in wanted if _insert(connection, each)]
    _move(connection, found, new)
    return new


def post_locked(connection: Connection, wanted: Sequence[Transfer], released: Mapping[str, int]) -> None:
    """Post charges whose keys nobody can have used, all at once; `released` is what was held for them, by account.

    The accounts exist and are locked, and customers are charged no more than they may be: the caller has seen to that,
    and the database refuses the rest. Raises GatewayError UNPROCESSABLE for an amount out of range.
    """
    changes: dict[str, int] = {}
    for each in wanted:
        _check_amount(each)
        changes[each.debit] = changes.get(each.debit, 0) - each.amount_nanousd
        changes[each.credit] = changes.get(each.credit, 0) + each.amount_nanousd
    if wanted:
        connection.execute(_POST, [_row(each) for each in wanted])
        _apply(connection, changes, released)


def _touched(connection: Connection, wanted: Iterable[Transfer]) -> dict[str, Account]:
    """Return the accounts of transfers, locked, made if they were not there."""
    return lock_made(connection, {account_id for each in wanted for account_id in (each.debit, each.credit)})


def _move(connection: Connection, found: Mapping[str, Account], posted: Sequence[Transfer]) -> None:
    """Change the balances."""
    changes = dict.fromkeys(found, 0)
    for each in posted:
        changes[each.debit] -= each.amount_nanousd
        changes[each.credit] += each.amount_nanousd
    for account_id, change in changes.items():
        account = found[account_id]
        if change < 0 and is_customers(account_id) and -change > account.free_nanousd:
            raise GatewayError("INSUFFICIENT_CREDITS", "the account has not enough credit left")
    _apply(connection, changes, {})
    for each in posted:
        if is_customers(each.credit):
            _tell_added(connection, each)


def _tell_added(connection: Connection, given: Transfer) -> None:
    """Tell a customer of credit that came in, from wherever; that it was low may be told again."""
    user_id, amount = given.credit.removeprefix(f"{CREDIT}:"), given.amount_nanousd
    data = {"amount": amount / 1e9, "amount_nanousd": amount, "kind": given.kind, "transaction_id": given.id}
    record(connection, "credits.added", user_id, data)
    was_low = (accounts.c.id == given.credit) & accounts.c.is_low_told
    connection.execute(update(accounts).where(was_low).values(is_low_told=False))


def is_customers(account_id: str) -> bool:
    """Tell whether the account is one that may not be overspent."""
    return account_id.startswith(f"{CREDIT}:")


def _apply(connection: Connection, changes: Mapping[str, int], released: Mapping[str, int]) -> None:
    rows = [
        {"changed": account_id, "change": change, "released": released.get(account_id, 0)}
        for account_id, change in sorted(changes.items())
        if change
    ]
    if rows:
        connection.execute(_APPLY, rows)


def _insert(connection: Connection, wanted: Transfer) -> bool:
    """Add the row; False if its key was used for the same transfer before."""
    _check_amount(wanted)
    if insert_new(connection, transfers, _row(wanted)):
        return True
    _check_same(connection, wanted)
    return False


def _check_amount(wanted: Transfer) -> None:
    if not 0 < wanted.amount_nanousd <= AMOUNT_NANOUSD_MAX:
        raise GatewayError("UNPROCESSABLE", f"{wanted.amount_nanousd} nanodollars is out of range", param="amount")


def _row(wanted: Transfer) -> dict[str, object]:
    return {
        "id": wanted.id,
        "debit_account_id": wanted.debit,
        "credit_account_id": wanted.credit,
        "amount_nanousd": wanted.amount_nanousd,
        "kind": wanted.kind,
        "idempotency_key": wanted.idempotency_key,
        "created_at": datetime.now(UTC),
        "charge_id": wanted.charge_id,
    }


def _check_same(connection: Connection, wanted: Transfer) -> None:
    key = wanted.idempotency_key
    row = connection.execute(select(transfers).where(transfers.c.idempotency_key == key)).one()
    before = (row.debit_account_id, row.credit_account_id, row.amount_nanousd)
    if before != (wanted.debit, wanted.credit, wanted.amount_nanousd):
        raise GatewayError("CONFLICT", f"idempotency key {key!r} belongs to another transfer")


def insert_new(connection: Connection, table: Table, row: Mapping[str, object]) -> bool:
    """Add a row; False if one with the same key exists."""
    added = insert_into(table, connection.dialect).values(**row).on_conflict_do_nothing()
    return bool(connection.execute(added).rowcount)
