"""Locks on rows that stand for more than themselves."""

from sqlalchemy import Connection, select

from gpuproxy.store.schema import users


def lock_user(connection: Connection, user_id: str) -> None:
    """Let nobody else who asks for this add a thing to the user's until the transaction ends.

    Who counts what a user has and adds one more asks first, or two at once would both be the last that fits. Rows that
    only refer to the user wait for nothing.
    """
    connection.execute(select(users.c.id).where(users.c.id == user_id).with_for_update(key_share=True))
