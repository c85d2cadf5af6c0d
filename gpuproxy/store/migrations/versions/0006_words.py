"""Words on PostgreSQL that there are new changes and events, see `gpuproxy.store.bus`."""

from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

FUNCTION = """
CREATE FUNCTION gpuproxy_tell() RETURNS trigger LANGUAGE plpgsql AS
$$ BEGIN PERFORM pg_notify('gpuproxy', TG_TABLE_NAME); RETURN NULL; END $$
"""
TRIGGER = "CREATE TRIGGER {0}_tell AFTER INSERT ON {0} FOR EACH STATEMENT EXECUTE FUNCTION gpuproxy_tell()"


def upgrade() -> None:
    """Make the triggers; equal words of one transaction are one."""
    if op.get_bind().dialect.name != "postgresql":
        return
    op.execute(FUNCTION)
    for table in ("changes", "events"):
        op.execute(TRIGGER.format(table))
