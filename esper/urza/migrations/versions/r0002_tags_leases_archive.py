"""Tags in a table of their own, leases and interest of blueprints, archived kernels.

It follows on the first schema, which alembic did not number. Tables are written out, not taken
from ``esper.urza.schema``, which will go on.
"""

import json

import rfc8785
import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = None

RANK = (
    "status",
    "archived",
    "site_digest",
    "dtype",
    "device",
    "risk_score",
    "num_parameters",
    "artifact_id",
    "latency_us",
    "memory_bytes",
    "tag_set",
)


def upgrade() -> None:
    for column in (
        sa.Column("tamiyo_interest", sa.Float, nullable=False, server_default="0"),
        sa.Column("urabrask_interest", sa.Float, nullable=False, server_default="0"),
        sa.Column("lease_owner", sa.String),
        sa.Column("lease_expires_at", sa.Float),
        sa.Column("leased_from", sa.String),
    ):
        op.add_column("blueprints", column)
    op.create_index("blueprints_by_status", "blueprints", ["status"])
    op.add_column(
        "kernels", sa.Column("archived", sa.Boolean, nullable=False, server_default=sa.false())
    )
    tag_sets, members = _create_tag_sets()
    # By alembic's own means SQLite would copy the table, from under those that refer to it.
    op.execute("ALTER TABLE kernels ADD COLUMN tag_set INTEGER REFERENCES tag_sets (position)")
    _fill_tag_sets(tag_sets, members)
    op.drop_index("kernels_by_fit", "kernels")
    op.create_index("kernels_by_rank", "kernels", RANK)
    op.create_table(
        "evolutions",
        _reference("blueprint_id", "blueprints.blueprint_id"),
        _reference("report_digest", "field_reports.report_digest"),
    )
    op.execute("UPDATE schema_version SET version = 2")


def _reference(name: str, target: str) -> sa.Column[str]:
    return sa.Column(name, sa.String(64), sa.ForeignKey(target), primary_key=True)


def _create_tag_sets() -> tuple[sa.Table, sa.Table]:
    return (
        op.create_table(
            "tag_sets",
            sa.Column("position", sa.Integer, primary_key=True),
            sa.Column("tags", sa.Text, nullable=False, unique=True),
        ),
        op.create_table(
            "tag_set_members",
            sa.Column("tag", sa.String, primary_key=True),
            sa.Column("tag_set", sa.Integer, sa.ForeignKey("tag_sets.position"), primary_key=True),
            sqlite_with_rowid=False,
        ),
    )


def _fill_tag_sets(tag_sets: sa.Table, members: sa.Table) -> None:
    connection = op.get_bind()
    judged = connection.execute(
        sa.text("SELECT position, tags FROM kernels WHERE report_digest IS NOT NULL")
    )
    kernels_by_tags: dict[tuple[str, ...], list[int]] = {}
    for kernel, tags in judged:
        kernels_by_tags.setdefault(tuple(sorted(set(json.loads(tags)))), []).append(kernel)
    for tag_set, (tags, kernels) in enumerate(kernels_by_tags.items(), start=1):
        op.bulk_insert(tag_sets, [{"position": tag_set, "tags": rfc8785.dumps(tags).decode()}])
        op.bulk_insert(members, [{"tag": tag, "tag_set": tag_set} for tag in tags])
        connection.execute(
            sa.text("UPDATE kernels SET tag_set = :tag_set WHERE position = :kernel"),
            [{"tag_set": tag_set, "kernel": kernel} for kernel in kernels],
        )
