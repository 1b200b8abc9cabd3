"""Leases of kernels, and an account of what the forges have tried.

Kernels of before count as tried, at no cost. Tables are written out, not taken from
``esper.urza.schema``, which will go on.
"""

import json

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.create_index("ix_kernels_blueprint_id", "kernels", ["blueprint_id"])
    op.create_table(
        "kernel_leases",
        sa.Column(
            "artifact_id", sa.String(64), sa.ForeignKey("kernels.artifact_id"), primary_key=True
        ),
        sa.Column("owner", sa.String, nullable=False),
        sa.Column("expires_at", sa.Float, nullable=False),
    )
    _fill(_create_compilations())


def _create_compilations() -> sa.Table:
    compilations = op.create_table(
        "compilations",
        sa.Column("position", sa.Integer, primary_key=True),
        sa.Column(
            "blueprint_id", sa.String(64), sa.ForeignKey("blueprints.blueprint_id"), nullable=False
        ),
        sa.Column("pipeline", sa.String, nullable=False),
        sa.Column("device", sa.String, nullable=False),
        sa.Column("torch_version", sa.String, nullable=False),
        sa.Column("owner", sa.String, nullable=False),
        sa.Column("artifact_id", sa.String(64), sa.ForeignKey("kernels.artifact_id")),
        sa.Column("recompiled", sa.Boolean, nullable=False),
        sa.Column("wall_s", sa.Float, nullable=False),
        sa.Column("cpu_s", sa.Float, nullable=False),
        sa.Column("finished_at", sa.Float, nullable=False),
    )
    op.create_index("ix_compilations_finished_at", "compilations", ["finished_at"])
    op.create_index(
        "compilations_by_target",
        "compilations",
        ["blueprint_id", "device", "torch_version", "pipeline"],
    )
    return compilations


def _fill(compilations: sa.Table) -> None:
    published = op.get_bind().execute(
        sa.text("SELECT artifact_id, blueprint_id, manifest FROM kernels ORDER BY position")
    )
    attempts = [
        {
            "blueprint_id": blueprint_id,
            **{name: manifest[name] for name in ("pipeline", "device", "torch_version")},
            "owner": "",
            "artifact_id": artifact_id,
            "recompiled": False,
            "wall_s": 0.0,
            "cpu_s": 0.0,
            "finished_at": 0.0,
        }
        for artifact_id, blueprint_id, text in published
        for manifest in [json.loads(text)]
    ]
    op.bulk_insert(compilations, attempts)
