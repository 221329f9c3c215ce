"""Alembic's scripts; run by `Database.upgrade`."""
