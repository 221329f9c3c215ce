"""how often the check of a job's files was begun without an end"""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("checks_begun", sa.Integer(), nullable=True))


def downgrade() -> None:
    op.drop_column("jobs", "checks_begun")
