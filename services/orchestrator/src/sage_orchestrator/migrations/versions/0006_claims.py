"""which request a piece of work was claimed with"""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for table in ("jobs", "merges"):
        op.add_column(table, sa.Column("claim_id", sa.Text(), nullable=True))


def downgrade() -> None:
    for table in ("jobs", "merges"):
        op.drop_column(table, "claim_id")
