"""What holds for one account beside its credit: a markup on prices, how far below nothing it may go.

Functions work inside the caller's writing transaction, see `transfers`.
"""

from datetime import UTC, datetime

from sqlalchemy import Connection, select, update

from gpuproxy.errors import GatewayError
from gpuproxy.ledger.transfers import credit_account, insert_new, lock, open_accounts
from gpuproxy.store.schema import account_terms, accounts


def markup_of(connection: Connection, user_id: str) -> int:
    """Return what is added to prices for a user, in hundredths of a percent."""
    query = select(account_terms.c.markup_bps).where(account_terms.c.user_id == user_id)
    return connection.scalar(query) or 0


def set_markup(connection: Connection, user_id: str, markup_bps: int) -> None:
    """Let calls that workers admit from now on cost a user so much more; they hear of it within a second."""
    row = {"markup_bps": markup_bps, "changed_at": datetime.now(UTC)}
    if not insert_new(connection, account_terms, {"user_id": user_id, **row}):
        connection.execute(update(account_terms).where(account_terms.c.user_id == user_id).values(**row))


def set_overdraft(connection: Connection, user_id: str, overdraft_nanousd: int) -> None:
    """Let an account go so far below nothing. Raises GatewayError CONFLICT if it is further below already."""
    account_id = credit_account(user_id)
    open_accounts(connection, [account_id])
    account = lock(connection, [account_id])[account_id]
    if account.posted_nanousd - account.held_nanousd < -overdraft_nanousd:
        raise GatewayError("CONFLICT", "the account is further below 0 than that; add credit first")
    connection.execute(update(accounts).where(accounts.c.id == account_id).values(overdraft_nanousd=overdraft_nanousd))
