"""What a library knows of other kernels: how they were judged, and what became of them."""

import logging
import math
from collections import Counter
from dataclasses import dataclass

from esper.contracts import (
    FieldReport,
    KernelManifest,
    KernelQuery,
    KernelRecord,
    Outcome,
    UrabraskValidationReport,
)
from esper.errors import ArtifactError
from esper.urabrask.learned_risk import Lesson, Traits
from esper.urabrask.risk import WEIGHTS, Experience
from esper.urza import Library

logger = logging.getLogger(__name__)

_MOST_PEERS = 200
_SUCCESS = Outcome.FOSSILIZED
_NO_OUTCOME = Outcome.CANCELLED  # called off before anything was known
# What is damaged or gone, and so will be tomorrow; LibraryError is of a library that is away.
_UNREADABLE = (ArtifactError, ValueError)


@dataclass(frozen=True)
class Peer:
    """Another validated kernel for the same site, dtype and device."""

    manifest: KernelManifest
    report: UrabraskValidationReport


class Chronicle:
    """Reads a library, and remembers what does not change. Blocks; one thread at a time.

    What is damaged or gone is passed over, with one line in the log.
    """

    def __init__(self, urza: Library) -> None:
        self._urza = urza
        self._reports: dict[str, UrabraskValidationReport] = {}  # by digest, without checks
        self._records: dict[str, KernelRecord] = {}  # of the kernels in field reports
        self._passed_over: set[str] = set()
        self._field_reports_read = 0
        self._adaptations: Counter[str] = Counter()  # by design
        self._failures: Counter[str] = Counter()
        self.lessons: list[Lesson] = []
        """What a risk model can learn from, oldest first."""

    def peers(self, manifest: KernelManifest) -> list[Peer]:
        query = KernelQuery(
            site=manifest.site, dtype=manifest.dtype, device=manifest.device, limit=_MOST_PEERS
        )
        peers = []
        for record in self._urza.query(query):
            if record.artifact_id != manifest.artifact_id:
                try:
                    peers.append(Peer(record.manifest, self._report(record)))
                except _UNREADABLE as error:
                    self._pass_over(f"kernel {record.artifact_id}", error)
        return peers

    def experience(self, manifest: KernelManifest, peers: list[Peer]) -> Experience:
        design = manifest.design.name
        return Experience(
            kernels=sum(peer.manifest.design.name == design for peer in peers),
            adaptations=self._adaptations[design],
            failures=self._failures[design],
        )

    def read_on(self) -> None:
        """Take note of the adaptations that have ended meanwhile."""
        try:
            field_reports = self._urza.field_reports()
        except _UNREADABLE as error:
            self._pass_over("the field reports", error)
            return
        for field_report in field_reports[self._field_reports_read :]:
            if field_report.outcome is not _NO_OUTCOME:
                try:
                    self._note(field_report)
                except _UNREADABLE as error:
                    self._pass_over(f"kernel {field_report.artifact_id}", error)
            self._field_reports_read += 1

    def _note(self, field_report: FieldReport) -> None:
        record = self._record(field_report.artifact_id)
        # All that the library may fail to answer comes first: what was counted is not read again.
        report = None if record.statement is None else self._report(record)
        failed = field_report.outcome is not _SUCCESS
        self._adaptations[record.manifest.design.name] += 1
        self._failures[record.manifest.design.name] += failed
        if report is not None and _is_by_these_rules(report):
            self.lessons.append(
                Lesson(
                    blueprint_id=field_report.blueprint_id,
                    traits=traits(record.manifest, report),
                    risk_by_rules=sum(report.risk_components.values()),
                    failed=failed,
                )
            )

    def _pass_over(self, what: str, error: Exception) -> None:
        if what not in self._passed_over:
            self._passed_over.add(what)
            logger.warning("nothing is learned from %s: %s", what, error)

    def _record(self, artifact_id: str) -> KernelRecord:
        if artifact_id not in self._records:
            self._records[artifact_id] = self._urza.kernel(artifact_id)
        return self._records[artifact_id]

    def _report(self, record: KernelRecord) -> UrabraskValidationReport:
        assert record.statement is not None
        digest = record.statement.report_digest
        if digest not in self._reports:
            report = self._urza.report(record.artifact_id)
            self._reports[digest] = report.model_copy(update={"checks": ()})
        return self._reports[digest]


def _is_by_these_rules(report: UrabraskValidationReport) -> bool:
    """Whether its components are those of today: other rules' sums cannot be told from theirs."""
    return bool(report.risk_components) and report.risk_components.keys() <= WEIGHTS.keys()


def traits(manifest: KernelManifest, report: UrabraskValidationReport) -> Traits:
    """Return what a risk model is told of an assessed kernel; it learns what is missing as such."""
    numbers = {f"risk.{name}": part for name, part in report.risk_components.items()}
    numbers["parameters"] = math.log1p(manifest.num_parameters)
    numbers["flops_per_sample"] = math.log1p(manifest.flops_per_sample)
    numbers["act_channels"] = math.log1p(manifest.site.act_channels)
    numbers["inp_channels"] = math.log1p(manifest.site.inp_channels)
    numbers["half_precision"] = float(manifest.dtype in ("float16", "bfloat16"))
    if measured := report.measurement:
        numbers["speedup"] = math.log(measured.eager_forward_p50_us / measured.forward_p50_us)
        numbers["memory_bytes"] = math.log1p(measured.memory_bytes)
    return Traits(design=manifest.design.name, numbers=numbers)
