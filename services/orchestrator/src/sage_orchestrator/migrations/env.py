"""Runs inside the orchestrator, on the connection that `Database.upgrade` hands over under its lock."""

from alembic import context

from sage_orchestrator.rows import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    # SQLite cannot alter most things in place: Alembic copies the table instead.
    render_as_batch=True,
    transaction_per_migration=True,
)
with context.begin_transaction():
    context.run_migrations()
