"""Who looks for kernels that wait for a verdict, leases them, and has them judged one by one."""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from esper.config import EvaluatorSettings
from esper.contracts import Contract, KernelReady, KernelStatus, Topic, UrabraskValidationReport
from esper.errors import ArtifactError, LeaseError, LibraryError, MachineError, WorkerError
from esper.oona import Oona
from esper.oona.attendance import attend
from esper.tezzeret.pipelines import torch_release
from esper.urabrask.turn import device_to_itself
from esper.urza import Library
from esper.urza.tenure import unique_owner, while_leased

logger = logging.getLogger(__name__)

GROUP = "urabrask"

Evaluate = Callable[[str], Coroutine[Any, Any, UrabraskValidationReport]]


class UrabraskWorker:
    """Gives an evaluator its work; any number of them share a library, on any machines.

    ``evaluate`` judges the kernel of an id and records the verdict. On one machine one of them
    measures at a time on each device, whatever process it is in. Belongs to one event loop.
    """

    def __init__(
        self,
        evaluate: Evaluate,
        urza: Library,
        bus: Oona | None,
        settings: EvaluatorSettings,
        *,
        device: str,
    ) -> None:
        self._evaluate = evaluate
        self._urza = urza
        self._bus = bus
        self._settings = settings
        self._device = device
        self._turn = asyncio.Lock()
        self.owner = unique_owner(GROUP)

    async def process_pending_kernels(self) -> int:
        """Evaluate what waits in the library until nothing does; return how many were taken on.

        A kernel that cannot be judged stays PENDING_BENCHMARKING, and one log line says why; it is
        tried again when its lease ran out, and one that is UNDECIDED when its own, longer one did.
        Cancellation gives the kernel back.
        """
        count = 0
        while await self._evaluate_next():
            count += 1
        return count

    async def run(self) -> None:
        """Evaluate what waits and what is announced as ready, until the bus closes.

        The verdict at hand is then finished. Without a bus it returns when nothing waits any more.
        """
        if self._bus is None:
            await self.process_pending_kernels()
            return
        await attend(
            self._bus,
            Topic.KERNEL_READY,
            GROUP,
            self._see_to,
            self._evaluate_next,
            interval_s=self._settings.poll_interval_s,
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
                self._evaluate(artifact_id),
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
