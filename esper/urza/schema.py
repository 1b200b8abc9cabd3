"""The library's tables as they are now; ``migrations`` leads here from every older schema."""

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Connection,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    event,
    false,
)

from esper.contracts import BlueprintStatus, KernelStatus

REVISION = "0003"  # of alembic, the newest in ``migrations/versions``

# Told to the first Esper, which knew nothing of revisions and refuses all numbers but 1.
SUPERSEDED = 2

_LARGE = BigInteger().with_variant(Integer, "sqlite")  # where every integer has 64 bits

metadata = MetaData()

alembic_version = Table(
    "alembic_version", metadata, Column("version_num", String(32), primary_key=True)
)
schema_version = Table("schema_version", metadata, Column("version", Integer, primary_key=True))

# ``position`` counts in the order of arrival: rows are listed oldest first.
blueprints = Table(
    "blueprints",
    metadata,
    Column("position", Integer, primary_key=True),
    Column("blueprint_id", String(64), nullable=False, unique=True),
    Column("contract", Text, nullable=False),
    Column("status", String, nullable=False, default=BlueprintStatus.UNVALIDATED),
    Column("log", Text, nullable=False, default=""),
    Column("tamiyo_interest", Float, nullable=False, server_default="0"),
    Column("urabrask_interest", Float, nullable=False, server_default="0"),
    # While it is COMPILING: who compiles it, until when, and what it was before.
    Column("lease_owner", String),
    Column("lease_expires_at", Float),  # seconds since the Unix epoch
    Column("leased_from", String),
    Index("blueprints_by_status", "status"),
)

# Kernels have few tags, and many have the same: what a query wants of tags is settled once for
# each set of them that there is, not for each kernel.
tag_sets = Table(
    "tag_sets",
    metadata,
    Column("position", Integer, primary_key=True),
    Column("tags", Text, nullable=False, unique=True),  # canonical JSON, sorted
)

tag_set_members = Table(
    "tag_set_members",
    metadata,
    Column("tag", String, primary_key=True),
    Column("tag_set", ForeignKey(tag_sets.c.position), primary_key=True),
    sqlite_with_rowid=False,
)

kernels = Table(
    "kernels",
    metadata,
    Column("position", Integer, primary_key=True),
    Column("artifact_id", String(64), nullable=False, unique=True),
    Column("blueprint_id", ForeignKey(blueprints.c.blueprint_id), nullable=False, index=True),
    Column("manifest", Text, nullable=False),
    Column("site_digest", String(64), nullable=False),
    Column("dtype", String, nullable=False),
    Column("device", String, nullable=False),
    Column("num_parameters", _LARGE, nullable=False),
    # From here on the current verdict, copied from its report.
    Column("status", String, nullable=False, default=KernelStatus.PENDING_BENCHMARKING),
    Column("report_digest", String(64)),
    Column("signature", String),
    Column("tags", Text, nullable=False, default="[]"),
    Column("latency_us", Float),
    Column("memory_bytes", _LARGE),
    Column("risk_score", Float),
    Column("archived", Boolean, nullable=False, server_default=false()),
    Column("tag_set", ForeignKey(tag_sets.c.position)),
    # See ``query``.
    Index(
        "kernels_by_rank",
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
    ),
)

# Every verdict that was ever recorded; the newest of an artifact is also in its ``kernels`` row.
reports = Table(
    "reports",
    metadata,
    Column("position", Integer, primary_key=True),
    Column("artifact_id", ForeignKey(kernels.c.artifact_id), nullable=False, index=True),
    Column("status", String, nullable=False),
    Column("report_digest", String(64), nullable=False),
    Column("signature", String, nullable=False),
)

# Who judges a kernel, and until when nobody else does. A row whose time is over says nothing.
kernel_leases = Table(
    "kernel_leases",
    metadata,
    Column("artifact_id", ForeignKey(kernels.c.artifact_id), primary_key=True),
    Column("owner", String, nullable=False),
    Column("expires_at", Float, nullable=False),  # seconds since the Unix epoch
)

# Every attempt of a forge, those that failed among them: what was tried is not tried again.
compilations = Table(
    "compilations",
    metadata,
    Column("position", Integer, primary_key=True),
    Column("blueprint_id", ForeignKey(blueprints.c.blueprint_id), nullable=False),
    Column("pipeline", String, nullable=False),
    Column("device", String, nullable=False),
    Column("torch_version", String, nullable=False),
    Column("owner", String, nullable=False),
    Column("artifact_id", ForeignKey(kernels.c.artifact_id)),
    Column("recompiled", Boolean, nullable=False),
    Column("wall_s", Float, nullable=False),
    Column("cpu_s", Float, nullable=False),
    Column("finished_at", Float, nullable=False, index=True),  # seconds since the Unix epoch
    Index("compilations_by_target", "blueprint_id", "device", "torch_version", "pipeline"),
)

field_reports = Table(
    "field_reports",
    metadata,
    Column("position", Integer, primary_key=True),
    Column("report_digest", String(64), nullable=False, unique=True),
    Column("artifact_id", ForeignKey(kernels.c.artifact_id), nullable=False),
    Column("blueprint_id", ForeignKey(blueprints.c.blueprint_id), nullable=False),
    Column("contract", Text, nullable=False),
)

# Which adaptations gave rise to a blueprint.
evolutions = Table(
    "evolutions",
    metadata,
    Column("blueprint_id", ForeignKey(blueprints.c.blueprint_id), primary_key=True),
    Column("report_digest", ForeignKey(field_reports.c.report_digest), primary_key=True),
)

audit_log = Table(
    "audit_log",
    metadata,
    Column("seq", Integer, primary_key=True, autoincrement=False),
    Column("timestamp", Float, nullable=False),
    Column("actor", String, nullable=False),
    Column("event", String, nullable=False),
    Column("subject", String, nullable=False),
    Column("details", Text, nullable=False),
    Column("previous_hash", String(64), nullable=False),
    Column("hash", String(64), nullable=False),
)

_APPEND_ONLY = {
    "sqlite": [
        f"CREATE TRIGGER audit_log_refuses_{verb} BEFORE {verb} ON audit_log "
        "BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END"
        for verb in ("UPDATE", "DELETE")
    ],
    "postgresql": [
        "CREATE FUNCTION audit_log_refuses() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN RAISE EXCEPTION 'the audit log is append-only'; END $$",
        "CREATE TRIGGER audit_log_refuses BEFORE UPDATE OR DELETE OR TRUNCATE ON audit_log "
        "EXECUTE FUNCTION audit_log_refuses()",
    ],
}


def _make_append_only(_table: Table, connection: Connection, **_: object) -> None:
    for statement in _APPEND_ONLY[connection.dialect.name]:
        connection.exec_driver_sql(statement)


event.listen(audit_log, "after_create", _make_append_only)
