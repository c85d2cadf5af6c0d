"""Asks payment providers, and notes what they say: charges for renewals, refunds; again if the outcome is unknown.

What is asked carries our id as the provider's idempotency key, so asking again moves no money twice. Providers keep
such keys for a day; what is unknown for longer is left to their webhooks, and renewals of that customer are switched
off, for a second charge could be one too many.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial

from sqlalchemy import Connection, and_, select, update

from gpuproxy.billing import renewals, reversals
from gpuproxy.billing.cents import to_cents
from gpuproxy.billing.payments import Payment, get, locked
from gpuproxy.billing.reversals import Reversal
from gpuproxy.billing.settle import complete, fail, forget_waiting
from gpuproxy.errors import GatewayError
from gpuproxy.observe.logs import get_logger
from gpuproxy.plugin import Order, Outcome, PaymentProvider
from gpuproxy.store.engine import Store
from gpuproxy.store.rounds import rounds
from gpuproxy.store.schema import payments, users

SWEEP_S = 1.0
AT_ONCE_MAX = 8
UNKNOWN_MAX = timedelta(hours=23)  # Stripe forgets idempotency keys after 24
STALE = timedelta(days=7)  # a checkout nobody finished, a charge nobody told of any more
TIDY_EVERY = 3_600  # sweeps

logger = get_logger(__name__)


class Cashier:
    """Runs in control, on any number of nodes at once."""

    def __init__(
        self,
        store: Store,
        providers: Mapping[str, PaymentProvider],
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._store = store
        self._providers = providers
        self._now = now
        self._round_count = 0
        self._by_hand = [name for name, provider in providers.items() if provider.is_confirmed_by_hand]

    async def sweep(self) -> int:
        """Charge who is short of credit and ask again for what is unknown; return how many were asked for.

        Raises what the store raises.
        """
        now = self._now()
        async with self._store.reading() as connection:
            short = await connection.run_sync(renewals.short_of_credit, now, AT_ONCE_MAX)
            is_due = await connection.run_sync(_is_any_due, now)
        charges = [await self._intend(user_id, now) for user_id in short]
        refunds: list[Reversal] = []
        if is_due:
            async with self._store.writing() as connection:
                charges += await connection.run_sync(renewals.claim_due, now, AT_ONCE_MAX)
                refunds = await connection.run_sync(reversals.claim_due, now, AT_ONCE_MAX)
        asked = [self.charge(payment) for payment in charges if payment is not None]
        return await _all([*asked, *(self.refund(refund) for refund in refunds)])

    async def run(self, stopping: asyncio.Event) -> None:
        """Work until `stopping` is set, through outages of the store and of providers."""
        complain = partial(logger.error, "payments cannot be looked after, will go on")
        await rounds(self._round, SWEEP_S, stopping, complain)

    async def _round(self) -> None:
        await self.sweep()
        if self._round_count % TIDY_EVERY == 0:
            await self.tidy()
        self._round_count += 1

    async def tidy(self) -> None:
        """Close what nobody will finish, drop what concerned somebody else."""
        async with self._store.reading() as connection:
            stale = await connection.run_sync(_stale, self._now(), self._by_hand)
        for payment_id in stale:  # each by itself: it locks the account of its customer
            await self._write(_close_stale, payment_id)
        await self._write(forget_waiting, self._now())

    async def charge(self, payment: Payment) -> None:
        """Charge the saved method for a stored renewal, and note the outcome."""
        try:
            outcome = await self._charged(payment)
        except Exception as error:
            _log(payment.provider, payment.id, error)
            if self._now() - payment.created_at > UNKNOWN_MAX:
                await self._write(_charge_unknown, payment.id)
            return
        await self._write(_note_charge, payment.id, outcome)

    async def refund(self, refund: Reversal) -> Reversal:
        """Have a stored refund carried out, and note the outcome. One whose outcome is unknown stays pending."""
        async with self._store.reading() as connection:
            payment = await connection.run_sync(get, refund.payment_id)
        assert payment is not None  # the refund refers to it
        try:
            outcome = await self._provider(payment.provider).refund(reversals.as_order(payment, refund))
        except Exception as error:
            _log(payment.provider, refund.id, error)
            if self._now() - refund.created_at > UNKNOWN_MAX:
                await self._write(reversals.give_up, refund, "the outcome is unknown; look at the provider's")
            return refund
        async with self._store.writing() as connection:
            return await connection.run_sync(
                reversals.settle_refund, refund.id, outcome.state, outcome.reference, outcome.reason
            )

    async def _intend(self, user_id: str, now: datetime) -> Payment | None:
        async with self._store.writing() as connection:
            return await connection.run_sync(renewals.intend, user_id, now)

    async def _charged(self, payment: Payment) -> Outcome:
        provider = self._provider(payment.provider)
        async with self._store.reading() as connection:
            order = await connection.run_sync(_order, payment)
        return await provider.charge_saved(order)

    def _provider(self, name: str) -> PaymentProvider:
        if name not in self._providers:
            raise GatewayError("UNAVAILABLE", f"payment provider {name!r} is not configured any more")
        return self._providers[name]

    async def _write(self, work: Callable[..., object], *arguments: object) -> None:
        async with self._store.writing() as connection:
            await connection.run_sync(work, *arguments)


async def _all(work: Iterable[Awaitable[object]]) -> int:
    return len(await asyncio.gather(*work))


def _log(provider: str, subject: str, error: Exception) -> None:
    told = error.message if isinstance(error, GatewayError) else f"{type(error).__name__}: {error}"
    logger.error("payment provider gave no outcome, will ask again", provider=provider, id=subject, error=told)


def _is_any_due(connection: Connection, now: datetime) -> bool:
    charge = select(payments.c.id).where(payments.c.due_at <= now).limit(1)
    return connection.scalar(charge) is not None or reversals.is_any_due(connection, now)


def _order(connection: Connection, payment: Payment) -> Order:
    email = connection.scalar(select(users.c.email).where(users.c.id == payment.user_id)) or ""
    saved = renewals.saved_method(connection, payment.user_id, payment.provider)
    return Order(payment.id, payment.user_id, email, to_cents(payment.amount_nanousd), saved_method=saved)


def _note_charge(connection: Connection, payment_id: str, outcome: Outcome) -> None:
    payment, _ = locked(connection, payment_id)
    if outcome.state == "completed":
        complete(connection, payment, payment.amount_nanousd, outcome.reference)
    elif outcome.state == "failed":
        fail(connection, payment, outcome.reason)
    elif payment.state == "pending":  # its webhook will tell
        values = {"reference": outcome.reference, "due_at": None}
        connection.execute(update(payments).where(payments.c.id == payment_id).values(**values))


def _charge_unknown(connection: Connection, payment_id: str) -> None:
    payment, _ = locked(connection, payment_id)
    if payment.state == "pending":
        fail(connection, payment, "the outcome is unknown")
        renewals.switch_off(connection, payment.user_id, "the outcome of a charge is unknown; look before you go on")


def _stale(connection: Connection, now: datetime, by_hand: Sequence[str]) -> list[str]:
    is_stale = and_(
        payments.c.state == "pending", payments.c.created_at < now - STALE, payments.c.provider.not_in(by_hand)
    )
    return list(connection.scalars(select(payments.c.id).where(is_stale).limit(1_000)))


def _close_stale(connection: Connection, payment_id: str) -> None:
    payment, _ = locked(connection, payment_id)
    fail(connection, payment, "nobody paid within 7 days")
