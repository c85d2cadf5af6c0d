"""Adds the calls of a batch to the sums that are told, see `events.usage`; nothing for who is not listened to."""

from collections.abc import Iterable, Mapping

from sqlalchemy import Connection

from gpuproxy.events import usage
from gpuproxy.events.usage import TOKENS_MAX, Charged
from gpuproxy.ledger.batch import Batch
from gpuproxy.types import Receipt


def add_used(connection: Connection, batch: Batch, charged: Iterable[tuple[str, int]]) -> None:
    """Add what was charged; `charged` are the customers and days of `settle`."""
    user_ids = {user_id for user_id, _ in charged}
    wanted = usage.wanted(connection, user_ids) if user_ids else []
    if wanted:
        usage.add(connection, _summed(batch, wanted))


def _summed(batch: Batch, wanted: Iterable[str]) -> Mapping[str, Charged]:
    sums = dict.fromkeys(wanted, Charged(0, 0, 0, 0))
    for row, cost, payer in zip(batch.rows, batch.costs, batch.payers, strict=True):
        if payer is not None and (sum_so_far := sums.get(payer.user_id)) is not None:
            calls, inputs, outputs, nanousd = sum_so_far
            more_in, more_out = (min(max(0, row[column]), TOKENS_MAX) for column in (_INPUT, _OUTPUT))
            sums[payer.user_id] = Charged(calls + 1, inputs + more_in, outputs + more_out, nanousd + cost)
    return sums


_INPUT, _OUTPUT = (Receipt.__struct_fields__.index(name) for name in ("input_tokens", "output_tokens"))
