"""A webhook's secret may be replaced again while the one before still signs."""

from base64 import b64encode

import sqlalchemy as sa
from alembic import op

from gpuproxy.store.schema import UtcTime

revision = "0024"
down_revision = "0023"
branch_labels = None
depends_on = None

HOOKS = sa.table(
    "webhooks",
    sa.column("id", sa.Text),
    sa.column("old_secret", sa.LargeBinary),
    sa.column("old_secret_until", UtcTime),
    sa.column("old_secrets", sa.JSON),
)


def upgrade() -> None:
    """Make a list of the one, and take its columns away."""
    op.add_column("webhooks", sa.Column("old_secrets", sa.JSON, nullable=False, server_default="[]"))
    for row in op.get_bind().execute(sa.select(HOOKS).where(HOOKS.c.old_secret.is_not(None))).all():
        old = {"sealed": b64encode(row.old_secret).decode(), "until": row.old_secret_until.isoformat()}
        op.execute(HOOKS.update().where(HOOKS.c.id == row.id).values(old_secrets=[old]))
    op.drop_column("webhooks", "old_secret")
    op.drop_column("webhooks", "old_secret_until")
