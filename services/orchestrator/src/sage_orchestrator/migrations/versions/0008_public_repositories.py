"""whether an export may go to a public repository: a column, once a prefix of the repository"""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # For a while 0007 added it too.
    if "allow_public" not in {column["name"] for column in sa.inspect(op.get_bind()).get_columns("merges")}:
        op.add_column("merges", sa.Column("allow_public", sa.Boolean(), nullable=True))
    # No name of a repository has a colon.
    op.execute(
        "UPDATE merges SET allow_public = true, repo = substr(repo, length('public:') + 1)"
        " WHERE repo LIKE 'public:%'"
    )


def downgrade() -> None:
    op.execute("UPDATE merges SET repo = 'public:' || repo WHERE allow_public AND repo IS NOT NULL")
    op.drop_column("merges", "allow_public")
