"""Urza, the library: blueprints, artifacts, reports, lineage, audit; the only store."""

from esper.urza.audit import GENESIS, AuditEntry, AuditLog
from esper.urza.connection import connect
from esper.urza.library import Urza
from esper.urza.protocol import Library
from esper.urza.signing import EvaluatorKey

__all__ = ["GENESIS", "AuditEntry", "AuditLog", "EvaluatorKey", "Library", "Urza", "connect"]
