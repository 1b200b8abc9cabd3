"""Urabrask as the rest of Esper sees it: an async worker that turns artifacts into verdicts."""

import asyncio
import logging
import time
from types import TracebackType
from typing import Self

import esper.urabrask.tags as tags
from esper.config import EvaluatorSettings
from esper.contracts import (
    Contract,
    KernelBundle,
    KernelCharacterized,
    KernelManifest,
    KernelQuery,
    KernelReady,
    KernelStatement,
    KernelStatus,
    Topic,
    UrabraskValidationReport,
)
from esper.errors import (
    ArtifactError,
    ArtifactIntegrityError,
    LeaseError,
    LibraryError,
    MachineError,
    WorkerError,
)
from esper.oona import Oona
from esper.oona.attendance import attend
from esper.tezzeret.pipelines import torch_release
from esper.urabrask.turn import device_to_itself
from esper.urza import Library
from esper.urza.tenure import unique_owner, while_leased
from esper.worker import WorkerProcess

logger = logging.getLogger(__name__)

_GROUP = "urabrask"
_MOST_PEERS = 200
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
        self._device = device
        self.owner = unique_owner(_GROUP)
        self._turn = asyncio.Lock()
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
        began_s = time.monotonic()
        bundle = await asyncio.to_thread(self._urza.fetch_kernel, artifact_id)
        report = await self._judge(artifact_id, bundle)
        report = await asyncio.to_thread(self._tagged, report, bundle.record.manifest)
        statement = KernelStatement(
            artifact_id=artifact_id, status=report.status, report_digest=report.digest()
        )
        signature = self._urza.evaluator_key.sign(statement)
        await asyncio.to_thread(self._urza.record_report, report, statement, signature)
        self._announce(report, time.monotonic() - began_s)
        return report

    async def run(self) -> None:
        """Evaluate what waits in the library and what is announced as ready, until the bus closes.

        Without a bus it returns when nothing waits any more. A kernel that cannot be judged stays
        PENDING_BENCHMARKING, and one log line says why; it is tried again when its lease ran out,
        and one that is UNDECIDED when its own, longer one did. When the bus closes, the verdict at
        hand is finished; cancellation gives the kernel back.
        """
        if self._bus is None:
            while await self._evaluate_next():
                pass
            return
        await attend(
            self._bus,
            Topic.KERNEL_READY,
            _GROUP,
            self._see_to,
            self._evaluate_next,
            interval_s=self._settings.poll_interval_s,
        )

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

    def _tagged(
        self, report: UrabraskValidationReport, manifest: KernelManifest
    ) -> UrabraskValidationReport:
        """Give a measured kernel its place among those for its site that this machine measured."""
        if report.measurement is None:
            return report
        query = KernelQuery(
            site=manifest.site, dtype=manifest.dtype, device=manifest.device, limit=_MOST_PEERS
        )
        others = (record.artifact_id for record in self._urza.query(query))
        reports = [self._urza.report(other) for other in others if other != report.artifact_id]
        peers = [
            peer.measurement
            for peer in reports
            if peer.measurement is not None and peer.machine == report.machine
        ]
        return report.model_copy(
            update={"tags": tags.among_peers(report.tags, peers, report.measurement)}
        )

    async def _see_to(self, ready: Contract) -> None:
        assert isinstance(ready, KernelReady)
        await self._evaluate_next(ready.artifact_id)

    async def _evaluate_next(self, artifact_id: str | None = None) -> bool:
        """Evaluate the oldest kernel that waits, or a certain one if it does.

        Logs what goes wrong. False says: look again later.
        """
        async with self._turn, device_to_itself(self._device):
            claimed = artifact_id
            try:
                claimed = await self._claim(artifact_id)
                if claimed is None:
                    return False
                await self._evaluate_leased(claimed)
            except LeaseError as error:
                logger.info("%s", error)
            except (LibraryError, MachineError, OSError) as error:
                logger.warning("the evaluator cannot work: %s", error)
                return False
            except (ArtifactError, WorkerError) as error:
                assert claimed is not None
                logger.warning("kernel %s was not evaluated: %s", claimed[:12], error)
        return True

    async def _claim(self, artifact_id: str | None) -> str | None:
        return await asyncio.to_thread(
            self._urza.claim_kernel,
            self.owner,
            self._settings.lease_s,
            device=self._device,
            torch_version=torch_release(),
            artifact_id=artifact_id,
        )

    async def _evaluate_leased(self, artifact_id: str) -> None:
        try:
            report = await while_leased(
                self.evaluate(artifact_id),
                lambda lease_s: self._urza.renew_kernel_lease(artifact_id, self.owner, lease_s),
                self._settings.lease_s,
            )
        except (asyncio.CancelledError, LibraryError, MachineError, OSError):
            await self._give_back(artifact_id)
            raise
        if report.status is not KernelStatus.UNDECIDED:
            await self._give_back(artifact_id)
            return
        again_in_s = self._settings.undecided_for_s  # until then nobody else need try, either
        await asyncio.to_thread(self._urza.renew_kernel_lease, artifact_id, self.owner, again_in_s)

    async def _give_back(self, artifact_id: str) -> None:
        try:
            await asyncio.to_thread(self._urza.release_kernel, artifact_id, self.owner)
        except (LibraryError, OSError) as error:
            logger.debug("%s", error)  # it was taken over, or will be when the lease runs out

    def _announce(self, report: UrabraskValidationReport, evaluation_s: float) -> None:
        if self._bus is not None:
            payload = KernelCharacterized(
                artifact_id=report.artifact_id,
                status=report.status,
                tags=report.tags,
                evaluation_s=evaluation_s,
            )
            self._bus.publish(Topic.KERNEL_CHARACTERIZED, _GROUP, payload)
