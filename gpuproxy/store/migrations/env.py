"""Alembic's entry: runs the migrations on the connection that `gpuproxy.store.migrate` holds."""

from alembic import context

from gpuproxy.store.schema import metadata

connection = context.config.attributes["connection"]
# The transaction is the caller's: it spans all migrations and holds the lock against other processes.
context.configure(connection=connection, target_metadata=metadata, transactional_ddl=False)
context.run_migrations()
