"""A reader misses no row, in whatever order they appear."""

from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import Column, Integer, MetaData, Table, create_engine, insert, select

from gpuproxy.store.cursor import GAP_S, Cursor

rows = Table("rows", MetaData(), Column("seq", Integer, primary_key=True))


@given(st.permutations(range(1, 9)), st.integers(1, 4))
def test_every_row_is_read_once_whatever_the_order_of_commits(order: list[int], step: int) -> None:
    cursor = Cursor(0, lambda: 0.0)
    read: list[int] = []
    engine = create_engine("sqlite://")
    with engine.connect() as connection:
        rows.create(connection)
        for start in range(0, len(order), step):
            connection.execute(insert(rows), [{"seq": seq} for seq in order[start : start + step]])
            found = list(connection.scalars(select(rows.c.seq).where(cursor.unread(rows.c.seq))))
            cursor.advance(found)
            read += found
    engine.dispose()
    assert sorted(read) == sorted(order)


def test_a_gap_that_stays_was_rolled_back_and_is_forgotten() -> None:
    now_s = 0.0
    cursor = Cursor(5, lambda: now_s)
    cursor.advance([7])
    assert "IN" in str(cursor.unread(rows.c.seq))
    now_s = GAP_S
    cursor.advance([])
    assert "IN" not in str(cursor.unread(rows.c.seq))


def test_many_gaps_at_once_are_bounded() -> None:
    cursor = Cursor(0)
    cursor.advance([1_000_000])
    assert len(cursor._gaps) == 1_000
