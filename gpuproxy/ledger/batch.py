"""What goes into the store in one transaction: receipts, what each costs and who pays it, and how far was read.

Calls are added up here by payer, so that what is paid by them costs as many statements as there are payers.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import itemgetter

from msgspec import Struct
from msgspec.structs import fields

from gpuproxy.ledger.open_calls import Notes
from gpuproxy.ledger.segment import Row
from gpuproxy.ledger.settle import DAY_NS, Payer
from gpuproxy.pricing import Catalogue, cost_of, marked_up
from gpuproxy.types import NOT_STORED, TOOL_CALL, Receipt

INT64_MAX = 2**63 - 1

_NAMES = Receipt.__struct_fields__
_ID = _NAMES.index("id")
_REQUIRED = sum(field.required for field in fields(Receipt))  # they come first
_OPTIONAL = [at for at in range(_REQUIRED, len(_NAMES)) if _NAMES[at] not in NOT_STORED]
assert not any(fields(Receipt)[at].default for at in _OPTIONAL)  # what is 0 or empty need not be written
_CHARGE = ("cost_nanousd", "charge_id")


class Batch(Struct, frozen=True):
    """Receipts in field order; beside each what it costs and who pays that, both empty if nothing costs anything."""

    rows: list[Row]
    costs: list[int] = []
    payers: list[Payer | None] = []
    offsets: Mapping[str, int] = {}
    notes: Notes = Notes()

    def owed(self) -> dict[Payer, int]:
        """Return what each payer owes."""
        found: dict[Payer, int] = {}
        for payer, cost in zip(self.payers, self.costs, strict=True):
            if payer is not None:
                found[payer] = found.get(payer, 0) + cost
        return found

    def completed(self, charge_ids: Mapping[tuple[str, int], str]) -> tuple[tuple[str, ...], list[Row]]:
        """Return columns and rows to store; columns of which no receipt tells anything are left to their defaults.

        A column less is a tenth of a microsecond less for each row, and most calls tell nothing in a third of them.
        """
        told = [at for at in _OPTIONAL if any(map(itemgetter(at), self.rows))]
        names = (*_NAMES[:_REQUIRED], *(_NAMES[at] for at in told))
        pick: Callable[[Row], Row] = itemgetter(*range(_REQUIRED), *told)
        if not charge_ids:
            return names, list(map(pick, self.rows))
        charged = zip(self.rows, self.costs, self.payers, strict=True)
        return (*names, *_CHARGE), [
            (*pick(row), *((0, "") if payer is None else (cost, charge_ids[payer.user_id, payer.day])))
            for row, cost, payer in charged
        ]

    def without(self, known: Callable[[Sequence[Row]], set[str]]) -> "Batch":
        """Return the batch with the first of each receipt only, and none that `known` says is stored."""
        seen = known(self.rows)
        kept = [at for at, row in enumerate(self.rows) if not (row[_ID] in seen or seen.add(row[_ID]))]  # type: ignore[func-returns-value]
        rows = [self.rows[at] for at in kept]
        if not self.costs:
            return Batch(rows, [], [], self.offsets, self.notes)
        costs, payers = [self.costs[at] for at in kept], [self.payers[at] for at in kept]
        return Batch(rows, costs, payers, self.offsets, self.notes)

    def storable(self) -> "Batch":
        """Return the batch with what no database column takes made fit."""
        rows = [tuple(map(_storable, row)) for row in self.rows]
        return Batch(rows, self.costs, self.payers, self.offsets, self.notes)


def priced(
    catalogue: Catalogue, parts: Iterable[tuple[str, Sequence[Row]]], offsets: Mapping[str, int], notes: Notes
) -> Batch:
    """Return the batch of the receipts of some owners, see `leases`. About 2 us a receipt, nothing without prices."""
    if not catalogue:
        return Batch([row for _, rows in parts for row in rows], [], [], offsets, notes)
    batch = Batch([], [], [], offsets, notes)
    for owner, rows in parts:
        receipts = [Receipt(*row) for row in rows]
        batch.rows.extend(rows)
        batch.costs.extend(_cost(catalogue, receipt) for receipt in receipts)
        batch.payers.extend(Payer(owner, each.user_id, each.key_id, each.started_ns // DAY_NS) for each in receipts)
    batch.payers[:] = [payer if cost else None for payer, cost in zip(batch.payers, batch.costs, strict=True)]
    return batch


def _cost(catalogue: Catalogue, receipt: Receipt) -> int:
    tool = receipt.rpc_name if receipt.rpc_method == TOOL_CALL else ""
    price = catalogue.find(receipt.model, receipt.upstream, receipt.started_ns, tool)
    return cost_of(receipt, marked_up(price, receipt.markup_bps) if receipt.markup_bps else price)


def _storable(value: object) -> object:
    if isinstance(value, str):
        return value.replace("\x00", "\ufffd")  # PostgreSQL takes no NUL in text
    return max(-INT64_MAX, min(value, INT64_MAX)) if type(value) is int else value
