"""Urabrask as the rest of Esper sees it: an async worker that turns artifacts into verdicts."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

from esper.config import EvaluatorSettings
from esper.contracts import (
    KernelBundle,
    KernelCharacterized,
    KernelManifest,
    KernelStatement,
    KernelStatus,
    Topic,
    UrabraskValidationReport,
)
from esper.errors import ArtifactIntegrityError
from esper.oona import Oona
from esper.urabrask import risk, tags
from esper.urabrask.assessor import Assessor
from esper.urabrask.chronicle import Chronicle, Peer, traits
from esper.urabrask.interest import interest
from esper.urabrask.worker import GROUP, UrabraskWorker
from esper.urza import Library
from esper.worker import Blobs, Header, WorkerProcess

_OWN_TIME_S = 60.0  # to start the worker and its sandbox, and to compute the references


class Urabrask:
    """Evaluates kernels in a child process, signs the verdicts and records them in the library.

    Belongs to one event loop, whose thread only ever awaits. :meth:`run` looks after kernels for
    one kind of device; any number of evaluators share them.
    """

    def __init__(
        self,
        urza: Library,
        bus: Oona | None = None,
        settings: EvaluatorSettings | None = None,
        *,
        device: str = "cpu",
    ) -> None:
        self._urza = urza
        self._bus = bus
        self._settings = settings or EvaluatorSettings()
        self._process = WorkerProcess(
            "esper.urabrask.child",
            niceness=self._settings.niceness,
            memory_limit_bytes=self._settings.memory_limit_bytes,
        )
        self._chronicle = Chronicle(urza)
        self._assessor = Assessor(self._ask)
        self._placing = asyncio.Lock()
        self.worker = UrabraskWorker(self.evaluate, urza, bus, self._settings, device=device)

    async def evaluate(self, artifact_id: str) -> UrabraskValidationReport:
        """Judge an artifact, record the signed verdict and announce it.

        Raises :class:`ArtifactError` if there is nothing to judge: the artifact is unknown, its
        bytes are not those that its id names, or it is for another machine. Raises
        :class:`WorkerError` if the evaluator itself failed. Neither leaves a verdict.
        """
        began_s = time.monotonic()
        bundle = await asyncio.to_thread(self._urza.fetch_kernel, artifact_id)
        manifest = bundle.record.manifest
        report = await self._placed(await self._judge(artifact_id, bundle), manifest)
        await asyncio.to_thread(self._record, report, manifest.blueprint_id)
        self._announce(report, time.monotonic() - began_s)
        return report

    async def run(self) -> None:
        """Evaluate what waits in the library and what is announced; see ``UrabraskWorker.run``."""
        await self.worker.run()

    async def close(self) -> None:
        """Kill the worker process and everything that it started."""
        await self._process.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def _judge(self, artifact_id: str, bundle: KernelBundle) -> UrabraskValidationReport:
        manifest = bundle.record.manifest
        if manifest.artifact_id != artifact_id:
            raise ArtifactIntegrityError(
                f"kernel {artifact_id}: its manifest is that of artifact {manifest.artifact_id}"
            )
        asked = {
            "settings": self._settings.model_dump(mode="json"),
            "manifest": manifest.model_dump(mode="json"),
        }
        answer, _ = await self._ask("evaluate", asked, bundle.files)
        return UrabraskValidationReport.model_validate(answer["report"])

    async def _placed(
        self, report: UrabraskValidationReport, manifest: KernelManifest
    ) -> UrabraskValidationReport:
        """Return the report with the kernel's place among others: tags, risk and interest."""
        if report.status is KernelStatus.REJECTED:
            return report
        async with self._placing:
            reach = report.confidence
            report = await asyncio.to_thread(self._place, report, manifest)
            lessons = self._chronicle.lessons
            return await self._assessor.assessed(report, traits(manifest, report), lessons, reach)

    def _place(
        self, report: UrabraskValidationReport, manifest: KernelManifest
    ) -> UrabraskValidationReport:
        self._chronicle.read_on()
        peers = self._chronicle.peers(manifest)
        experience = self._chronicle.experience(manifest, peers)
        report = risk.assessed(report, manifest, experience)
        if report.status is KernelStatus.UNDECIDED:
            return report
        return _among_peers(report, peers, experience.novelty)

    def _record(self, report: UrabraskValidationReport, blueprint_id: str) -> None:
        statement = KernelStatement(
            artifact_id=report.artifact_id, status=report.status, report_digest=report.digest()
        )
        self._urza.record_report(report, statement, self._urza.evaluator_key.sign(statement))
        # A blueprint is as unusual as the most unusual of its kernels: one that was rejected, could
        # not be measured or had no peers on its machine says nothing against the others.
        if report.urabrask_interest > self._urza.blueprint_record(blueprint_id).urabrask_interest:
            self._urza.set_interest(blueprint_id, "urabrask", report.urabrask_interest)

    async def _ask(
        self, method: str, header: Header, blobs: Mapping[str, bytes]
    ) -> tuple[Header, Blobs]:
        timeout_s = self._settings.timeout_s + _OWN_TIME_S
        return await self._process.call(method, header, blobs, timeout_s=timeout_s)

    def _announce(self, report: UrabraskValidationReport, evaluation_s: float) -> None:
        if self._bus is not None:
            payload = KernelCharacterized(
                artifact_id=report.artifact_id,
                status=report.status,
                tags=report.tags,
                evaluation_s=evaluation_s,
            )
            self._bus.publish(Topic.KERNEL_CHARACTERIZED, GROUP, payload)


def _among_peers(
    report: UrabraskValidationReport, peers: Sequence[Peer], novelty: float
) -> UrabraskValidationReport:
    """Return the report with tags and interest as its peers' measurements on this machine have it."""
    reports = [peer.report for peer in peers if peer.report.machine == report.machine]
    measured = [peer.measurement for peer in reports if peer.measurement is not None]
    assert report.measurement is not None
    return report.model_copy(
        update={
            "tags": tags.among_peers(report.tags, measured, report.measurement),
            "urabrask_interest": interest(report, reports, novelty),
        }
    )
