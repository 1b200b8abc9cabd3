"""Urabrask as the rest of Esper sees it: an async worker that turns artifacts into verdicts."""

import asyncio
import logging
from types import TracebackType
from typing import Self

from esper.config import EvaluatorSettings
from esper.contracts import (
    KernelBundle,
    KernelCharacterized,
    KernelReady,
    KernelStatement,
    KernelStatus,
    Topic,
    UrabraskValidationReport,
)
from esper.errors import ArtifactError, ArtifactIntegrityError, WorkerError
from esper.oona import Oona
from esper.urza import Urza
from esper.worker import WorkerProcess

logger = logging.getLogger(__name__)

_GROUP = "urabrask"
_OWN_TIME_S = 60.0  # to start the worker and its sandbox, and to compute the references


class Urabrask:
    """Evaluates kernels in a child process, signs the verdicts and records them in the library.

    Belongs to one event loop, whose thread only ever awaits.
    """

    def __init__(
        self, urza: Urza, bus: Oona | None = None, settings: EvaluatorSettings | None = None
    ) -> None:
        self._urza = urza
        self._bus = bus
        self._settings = settings or EvaluatorSettings()
        self._worker = WorkerProcess(
            "esper.urabrask.child",
            niceness=self._settings.niceness,
            memory_limit_bytes=self._settings.memory_limit_bytes,
        )

    async def evaluate(self, artifact_id: str) -> UrabraskValidationReport:
        """Judge an artifact, record the signed verdict and announce it.

        Raises :class:`ArtifactError` if there is nothing to judge: the artifact is unknown, its
        bytes are not those that its id names, or it is for another machine. Raises
        :class:`WorkerError` if the evaluator itself failed. Neither leaves a verdict.
        """
        bundle = await asyncio.to_thread(self._urza.fetch_kernel, artifact_id)
        report = await self._judge(artifact_id, bundle)
        statement = KernelStatement(
            artifact_id=artifact_id, status=report.status, report_digest=report.digest()
        )
        signature = self._urza.evaluator_key.sign(statement)
        await asyncio.to_thread(self._urza.record_report, report, statement, signature)
        self._announce(report)
        return report

    async def run(self) -> None:
        """Evaluate what waits in the library, and then every kernel that is announced as ready.

        Ends when the bus is closed, and without a bus when nothing waits any more. A kernel that
        cannot be judged stays PENDING_BENCHMARKING, and one log line says why.
        """
        pending = await asyncio.to_thread(self._urza.kernels, KernelStatus.PENDING_BENCHMARKING)
        for record in pending:
            await self._process(record.artifact_id)
        if self._bus is None:
            return
        async for message in self._bus.subscribe(Topic.KERNEL_READY, _GROUP):
            assert isinstance(message.payload, KernelReady)
            await self._process(message.payload.artifact_id)

    async def close(self) -> None:
        """Kill the worker process and everything that it started."""
        await self._worker.close()

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
        answer, _ = await self._worker.call(
            "evaluate",
            {
                "settings": self._settings.model_dump(mode="json"),
                "manifest": manifest.model_dump(mode="json"),
            },
            bundle.files,
            timeout_s=self._settings.timeout_s + _OWN_TIME_S,
        )
        return UrabraskValidationReport.model_validate(answer["report"])

    async def _process(self, artifact_id: str) -> None:
        """Evaluate a kernel that still waits for it; a message may come twice."""
        try:
            record = await asyncio.to_thread(self._urza.kernel, artifact_id)
            if record.status is KernelStatus.PENDING_BENCHMARKING:
                await self.evaluate(artifact_id)
        except (ArtifactError, WorkerError) as error:
            logger.warning("kernel %s was not evaluated: %s", artifact_id[:12], error)

    def _announce(self, report: UrabraskValidationReport) -> None:
        if self._bus is not None:
            payload = KernelCharacterized(
                artifact_id=report.artifact_id, status=report.status, tags=report.tags
            )
            self._bus.publish(Topic.KERNEL_CHARACTERIZED, _GROUP, payload)
