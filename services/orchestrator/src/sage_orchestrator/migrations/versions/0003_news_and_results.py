"""which news of an attempt is known, and the file of its step metrics"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # Plain additions: the table is not copied, so nothing that points at it is touched.
    op.add_column("jobs", sa.Column("events_heard", sa.Integer(), nullable=True))
    op.add_column("jobs", sa.Column("result_file", sa.Text(), nullable=True))


def downgrade() -> None:
    op.drop_column("jobs", "result_file")
    op.drop_column("jobs", "events_heard")
