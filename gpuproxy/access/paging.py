"""Long lists in pages: oldest first, each page beginning after the last row of the one before."""

from typing import Any

from msgspec import Struct
from sqlalchemy import Select, Table, and_, or_, select

ROWS_MAX = 1_000
ROWS_DEFAULT = 100


class Page(Struct, frozen=True):
    """Which part of a list: up to `limit` rows after the row with the id `cursor`; "" begins at the first."""

    limit: int = ROWS_DEFAULT
    cursor: str = ""


def after(query: Select[Any], table: Table, page: Page) -> Select[Any]:
    """Narrow a query over `table`, which has ``created_at`` and ``id``, to a page. An unknown cursor finds nothing."""
    order = (table.c.created_at, table.c.id)
    if page.cursor:
        begin = select(table.c.created_at).where(table.c.id == page.cursor).scalar_subquery()
        is_later = and_(order[0] == begin, order[1] > page.cursor)
        query = query.where(or_(order[0] > begin, is_later))
    return query.order_by(*order).limit(page.limit)
