"""merges in other formats, and what was found of them"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("merges", schema=None) as batch_op:
        batch_op.add_column(sa.Column("format", sa.Text(), nullable=False, server_default="safetensors"))
        batch_op.add_column(sa.Column("content", sa.Text(), nullable=False, server_default="merged"))
        batch_op.add_column(sa.Column("repo", sa.Text(), nullable=True))
        batch_op.add_column(sa.Column("report", sa.JSON(), nullable=True))
        batch_op.alter_column("merged_path", new_column_name="result_path")


def downgrade() -> None:
    with op.batch_alter_table("merges", schema=None) as batch_op:
        batch_op.alter_column("result_path", new_column_name="merged_path")
        batch_op.drop_column("report")
        batch_op.drop_column("repo")
        batch_op.drop_column("content")
        batch_op.drop_column("format")
