"""A customer with payments, and what the book says of them."""

from typing import Any

from sqlalchemy import select

from gpuproxy.billing import payments
from gpuproxy.billing.payments import Payment, new_payment
from gpuproxy.billing.settle import take
from gpuproxy.ledger.verify import verify
from gpuproxy.plugin import PaymentEvent
from gpuproxy.store.engine import Store
from gpuproxy.store.schema import accounts, events, transfers

USD = 1_000_000_000


class Book:
    """One store, read and written as tests like it."""

    def __init__(self, store: Store, user_id: str) -> None:
        self.store = store
        self.user_id = user_id

    async def do(self, work: Any, *arguments: Any) -> Any:
        """Do synchronous work in a writing transaction."""
        async with self.store.writing() as connection:
            return await connection.run_sync(work, *arguments)

    async def pay(self, usd: int = 25, provider: str = "stripe") -> Payment:
        """Store a payment that waits."""
        payment = new_payment(self.user_id, provider, "checkout", usd * USD)
        assert await self.do(payments.add, payment)
        return payment

    async def tell(self, event: PaymentEvent, provider: str = "stripe") -> bool:
        """Deliver an event."""
        done: bool = await self.do(take, provider, event)
        return done

    async def state(self, payment: Payment) -> tuple[str, int, int]:
        """Return a payment's state, the dollars it brought and the dollars that went back."""
        found = await self.do(payments.get, payment.id)
        return found.state, found.paid_nanousd // USD, found.refunded_nanousd // USD

    async def usd(self) -> float:
        """Return the customer's credit in dollars."""
        return await self.balance(f"credit:{self.user_id}") / USD

    async def balance(self, account_id: str) -> int:
        """Return what is on an account, in nanodollars."""
        async with self.store.reading() as connection:
            query = select(accounts.c.posted_nanousd).where(accounts.c.id == account_id)
            return await connection.scalar(query) or 0

    async def postings(self) -> list[tuple[str, int]]:
        """Return the kinds and cents of all transfers, oldest first."""
        async with self.store.reading() as connection:
            query = select(transfers.c.kind, transfers.c.amount_nanousd).order_by(transfers.c.created_at)
            return [(row[0], row[1] // 10_000_000) for row in await connection.execute(query)]

    async def told(self) -> list[str]:
        """Return the names of all events, oldest first."""
        async with self.store.reading() as connection:
            return list(await connection.scalars(select(events.c.name).order_by(events.c.seq)))

    async def is_sound(self) -> bool:
        """Tell whether the ledger finds nothing wrong with itself."""
        return await verify(self.store) == []
