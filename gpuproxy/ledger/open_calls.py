"""Calls that are not over: their last checkpoints, so that a worker that is killed takes none of them with it.

A checkpoint is the receipt a call would have if it ended now, under the id it will have, with the outcome OPEN. It is
kept until the receipt itself comes. If the worker is gone and its journal is read to the end, the last checkpoint
becomes the receipt. Whichever comes twice counts once: receipts are known by their id.
"""

from collections.abc import Iterable, Sequence

import msgspec
from msgspec import Struct
from sqlalchemy import Connection, delete, insert, select

from gpuproxy.ledger.segment import Row
from gpuproxy.store.schema import open_calls
from gpuproxy.types import Receipt

OPEN = "open"
WORKER_LOST = "WORKER_LOST"  # as the error of a receipt: the worker was killed, this is what it had noted
LOST_S = 0.5  # a worker without a journal for so long is gone; between two segments it has none for a moment
IDS_AT_ONCE = 500  # parameters of one query

_decode = msgspec.msgpack.Decoder(Receipt).decode
_ID, _OUTCOME = (Receipt.__struct_fields__.index(name) for name in ("id", "outcome"))


class Notes(Struct, frozen=True):
    """What a batch says of open calls: new checkpoints, encoded, by id and owner, and those that are over."""

    opened: dict[str, tuple[str, bytes]] = {}
    ended: Sequence[str] = ()


def sort_out(
    parts: Iterable[tuple[str, Sequence[Row]]], known: Iterable[str]
) -> tuple[list[tuple[str, Sequence[Row]]], Notes]:
    """Part the receipts of owners from the checkpoints among them; `known` are the ids of calls that are open."""
    receipts: list[tuple[str, Sequence[Row]]] = []
    opened: dict[str, tuple[str, bytes]] = {}
    for owner, rows in parts:
        if any(row[_OUTCOME] == OPEN for row in rows):
            noted = [row for row in rows if row[_OUTCOME] == OPEN]
            opened.update((row[_ID], (owner, msgspec.msgpack.encode(Receipt(*row)))) for row in noted)
            receipts.append((owner, [row for row in rows if row[_OUTCOME] != OPEN]))
        else:
            receipts.append((owner, rows))
    if not opened and not known:
        return receipts, Notes()
    over = {row[_ID] for _, rows in receipts for row in rows}
    return receipts, Notes(
        {call_id: note for call_id, note in opened.items() if call_id not in over},
        sorted(over.intersection(known)),
    )


def keep(connection: Connection, notes: Notes) -> None:
    """Store what a batch says, in its transaction."""
    gone = [*notes.ended, *notes.opened]
    for start in range(0, len(gone), IDS_AT_ONCE):
        chosen = open_calls.c.id.in_(gone[start : start + IDS_AT_ONCE])
        connection.execute(delete(open_calls).where(chosen))
    if notes.opened:
        rows = [{"id": call_id, "owner": owner, "receipt": note} for call_id, (owner, note) in notes.opened.items()]
        connection.execute(insert(open_calls), rows)


def load(connection: Connection, prefix: str) -> dict[str, str]:
    """Return the owners of all open calls of a node, by id."""
    mine = open_calls.c.owner.startswith(prefix, autoescape=True)
    return {row.id: row.owner for row in connection.execute(select(open_calls.c.id, open_calls.c.owner).where(mine))}


def lost(connection: Connection, owner: str, count_max: int) -> list[Row]:
    """Return what becomes the receipts of calls whose worker is gone."""
    found = connection.scalars(select(open_calls.c.receipt).where(open_calls.c.owner == owner).limit(count_max))
    ends = {"outcome": "upstream_failed", "error": WORKER_LOST}
    return [msgspec.structs.astuple(msgspec.structs.replace(_decode(note), **ends)) for note in found]
