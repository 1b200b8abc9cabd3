"""Tezzeret as the pipeline sees it: takes designs, and makes artifacts of blueprints.

Runs on the pipeline's event loop. Designs' code, torch.export and the rest run in warm child
processes, which are killed and replaced when they hang or crash; the library is called in threads.
What a forge works on is leased to it, so that any number of them share one library.
"""

import asyncio
import logging
import os
import time
from types import TracebackType
from typing import Self

from esper.config import ForgeSettings
from esper.contracts import (
    Blueprint,
    BlueprintStatus,
    BlueprintSubmitted,
    Compilation,
    Contract,
    Design,
    ForgeStatus,
    KernelManifest,
    KernelReady,
    Pipeline,
    SiteSignature,
    Topic,
)
from esper.errors import (
    ArtifactError,
    BlueprintError,
    EsperError,
    LeaseError,
    LibraryError,
    MachineError,
)
from esper.kasmina.kernel import GRAPH_FILE
from esper.oona import Oona
from esper.oona.attendance import Chore, attend
from esper.tezzeret.pipelines import check_available, torch_release
from esper.tezzeret.priority import Recompilation, has_budget, is_idle, recompilations
from esper.urza import Library
from esper.urza.tenure import unique_owner, while_leased
from esper.worker import WorkerProcess

logger = logging.getLogger(__name__)

_NAME = "tezzeret"
# Of these the blueprint is innocent: it is given back, and tried again later.
_NO_FAULT_OF_THE_BLUEPRINT = (LibraryError, MachineError, OSError)


class Tezzeret:
    """The compile forge. All methods belong to one event loop.

    Args:
        urza: the library that blueprints and kernels are stored in.
        bus: where new blueprints and kernels are announced, and from which :meth:`run` takes
            work; without one, the library is all that is looked at.
        settings: limits of what a design may cost, and of what compiling it may cost.
        device: kind of device that kernels are made for, ``"cpu"`` or ``"cuda"``.
    """

    def __init__(
        self,
        urza: Library,
        bus: Oona | None = None,
        settings: ForgeSettings | None = None,
        *,
        device: str = "cpu",
    ) -> None:
        self._urza = urza
        self._bus = bus
        self._settings = settings or ForgeSettings()
        self._device = device
        self.owner = unique_owner(_NAME)
        self._worker = self._make_worker()
        # Of its own, so that what waits need not wait for the slow pipelines.
        self._recompiler = self._make_worker()
        self._turn = asyncio.Lock()
        self._reported = True

    async def submit(self, design: Design, site: SiteSignature, dtype: str) -> str:
        """Trace a design for a site, store the blueprint and announce it; return its id.

        What is known already is announced only if it still has to be compiled. Raises
        :class:`BlueprintError` for a design that cannot be traced, :class:`WorkerError` for one
        that crashes or hangs. What torch.export has to say is long: the BlueprintError carries
        its first line, and all of it is logged at DEBUG.
        """
        try:
            blueprint, graph = await self._trace(design, site, dtype)
        except BlueprintError as error:
            logger.debug("%s", error)
            raise type(error)(_shortened(error)) from None
        blueprint_id = await asyncio.to_thread(self._urza.submit_blueprint, blueprint, graph)
        if await asyncio.to_thread(self._is_unfinished, blueprint_id):
            self._announce(Topic.BLUEPRINT_SUBMITTED, BlueprintSubmitted(blueprint_id=blueprint_id))
        return blueprint_id

    async def compile(self, blueprint_id: str, pipeline: Pipeline = Pipeline.FAST) -> str:
        """Make an artifact of a stored blueprint, publish and announce it; return its id.

        Where STANDARD or AGGRESSIVE bring nothing over a simpler pipeline, the artifact is that
        pipeline's, and the blueprint's log says why.

        The blueprint becomes COMPILING, then COMPILED; or INVALID with the reason as its log, if
        the fault is its own and nothing was ever made of it. The error is raised as well. Where
        the library or the machine fails, and by cancellation, it becomes what it was before.
        Raises :class:`LibraryError` if it cannot be had, :class:`LeaseError` if it was taken over
        by another forge, because this one was silent for too long.
        """
        check_available(pipeline)
        async with self._turn:
            if await self._claim(blueprint_id) is None:
                status, _ = await asyncio.to_thread(self._urza.blueprint_status, blueprint_id)
                raise LibraryError(f"blueprint {blueprint_id} is {status}; it cannot be compiled")
            return await self._compile_leased(blueprint_id, pipeline, self._worker)

    async def run(self) -> None:
        """Compile what waits in the library and what is announced, until the bus closes.

        A blueprint that fails is logged and left INVALID. When the bus closes, what is being
        compiled is finished; cancellation gives it back. Without a bus it returns when nothing
        waits any more.
        """
        if self._bus is None:
            while await self._compile_next():
                pass
            return
        chores: list[Chore] = [self._compile_next]
        if self._settings.recompiles_when_idle:
            chores.append(self._recompile_next)
        for blueprint_id in await asyncio.to_thread(
            self._urza.blueprints, BlueprintStatus.UNVALIDATED
        ):
            self._announce(Topic.BLUEPRINT_SUBMITTED, BlueprintSubmitted(blueprint_id=blueprint_id))
        await attend(
            self._bus,
            Topic.BLUEPRINT_SUBMITTED,
            _NAME,
            self._see_to,
            *chores,
            interval_s=self._settings.poll_interval_s,
        )

    async def status(self) -> ForgeStatus:
        """Return what waits in the library, and what this forge did in the last hour."""
        return await asyncio.to_thread(self._urza.forge_status, self.owner)

    async def close(self) -> None:
        """Kill the child processes. What they were doing fails with :class:`WorkerError`."""
        await self._worker.close()
        await self._recompiler.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    # ------------------------------------------------------------------ what to do next

    async def _see_to(self, submitted: Contract) -> None:
        """Compile what is wanted most, until what was announced is finished or another's."""
        assert isinstance(submitted, BlueprintSubmitted)
        blueprint_id = submitted.blueprint_id
        try:
            while await asyncio.to_thread(self._waits, blueprint_id):
                if not await self._compile_next():
                    return
            async with self._turn:  # in which whoever had it before may have finished it
                if await asyncio.to_thread(self._is_unfinished, blueprint_id):
                    await self._attempt(blueprint_id, Pipeline.FAST, self._worker)
        except (ArtifactError, *_NO_FAULT_OF_THE_BLUEPRINT) as error:
            logger.warning("blueprint %s was not compiled: %s", blueprint_id, error)

    async def _compile_next(self) -> bool:
        """Compile what is wanted most; return False if there is nothing to do."""
        async with self._turn:
            return await self._attempt(None, Pipeline.FAST, self._worker)

    async def _recompile_next(self) -> bool:
        """Make the kernel that is most worth making anew, if the machine is idle."""
        cores = os.cpu_count() or 1
        if not is_idle(os.getloadavg()[0], cores, self._settings):
            return False
        try:
            wish = await asyncio.to_thread(self._find_recompilation)
        except _NO_FAULT_OF_THE_BLUEPRINT as error:
            logger.warning("the forge cannot work: %s", error)
            return False
        if wish is None:
            await self._recompiler.close()  # a warm process that may not be needed for days
            return False
        logger.info("blueprint %s: %s again: %s", wish.blueprint_id, wish.pipeline, wish.reason)
        return await self._attempt(wish.blueprint_id, wish.pipeline, self._recompiler)

    def _find_recompilation(self) -> Recompilation | None:
        if not has_budget(self._urza.forge_status(), self._settings):
            return None
        available = [pipeline for pipeline in Pipeline if _is_available(pipeline)]
        prospects = self._urza.recompilation_prospects(self._device, torch_release(), available)
        return next(iter(recompilations(prospects, available, self._settings)), None)

    async def _attempt(
        self, blueprint_id: str | None, pipeline: Pipeline, worker: WorkerProcess
    ) -> bool:
        """Claim and compile; log what goes wrong. False says: look again later."""
        try:
            claimed = await self._claim(blueprint_id)
            if claimed is None:
                await self._report()
                return False
            self._reported = False
            await self._compile_leased(claimed, pipeline, worker)
        except LeaseError as error:
            logger.info("%s", error)  # its new owner comes to the same kernel
        except _NO_FAULT_OF_THE_BLUEPRINT as error:
            logger.warning("the forge cannot work: %s", error)
            return False
        except EsperError as error:
            logger.warning("blueprint %s was not compiled: %s", claimed, _shortened(error))
            logger.debug("blueprint %s: %s", claimed, error)
        return True

    async def _report(self) -> None:
        """Say what was done, when there is nothing left to do."""
        if not self._reported:
            self._reported = True
            status = await self.status()
            logger.info(
                "nothing waits; in the last %.0f min %s, %d failed, at work %.0f %% of the time",
                status.window_s / 60,
                ", ".join(f"{made} {name}" for name, made in status.compiled.items()) or "none",
                status.failed,
                100 * status.utilisation,
            )

    # ------------------------------------------------------------------ one blueprint

    async def _claim(self, blueprint_id: str | None) -> str | None:
        return await asyncio.to_thread(
            self._urza.claim_blueprint,
            self.owner,
            self._settings.lease_s,
            blueprint_id=blueprint_id,
        )

    async def _compile_leased(
        self, blueprint_id: str, pipeline: Pipeline, worker: WorkerProcess
    ) -> str:
        clock = _Clock(worker)
        try:
            artifact_id, remark = await while_leased(
                self._package(blueprint_id, pipeline, worker),
                lambda lease_s: self._urza.renew_lease(blueprint_id, self.owner, lease_s),
                self._settings.lease_s,
            )
        except LeaseError:
            raise
        except asyncio.CancelledError:
            await self._give_back(blueprint_id, "cancelled")
            raise
        except _NO_FAULT_OF_THE_BLUEPRINT as error:
            await self._give_back(blueprint_id, str(error))
            raise
        except Exception as error:
            log = str(error) or repr(error)
            await self._finish(blueprint_id, pipeline, clock, None, log)
            raise
        compile_s = clock.wall_s()
        await self._finish(blueprint_id, pipeline, clock, artifact_id, remark)
        self._announce(
            Topic.KERNEL_READY, KernelReady(artifact_id=artifact_id, compile_s=compile_s)
        )
        return artifact_id

    async def _package(
        self, blueprint_id: str, pipeline: Pipeline, worker: WorkerProcess
    ) -> tuple[str, str]:
        """Have the artifact made and publish it.

        Returns its id, and why it is of a simpler pipeline if it is.
        """
        blueprint = await asyncio.to_thread(self._urza.blueprint, blueprint_id)
        graph = await asyncio.to_thread(self._urza.graph, blueprint_id)
        settings = self._settings
        header, files = await worker.call(
            "package",
            {
                "blueprint": blueprint.model_dump(mode="json"),
                "device": self._device,
                "pipeline": pipeline,
            },
            {GRAPH_FILE: graph},
            timeout_s=(
                settings.timeout_s if pipeline is Pipeline.FAST else settings.optimizing_timeout_s
            ),
        )
        manifest = KernelManifest.model_validate(header["manifest"])
        artifact_id = await asyncio.to_thread(self._urza.publish_kernel, manifest, files)
        if header["remark"]:
            logger.info("blueprint %s: %s", blueprint_id, header["remark"])
        return artifact_id, header["remark"]

    async def _finish(
        self,
        blueprint_id: str,
        pipeline: Pipeline,
        clock: "_Clock",
        artifact_id: str | None,
        log: str = "",
    ) -> None:
        compilation = Compilation(
            blueprint_id=blueprint_id,
            pipeline=pipeline,
            device=self._device,
            torch_version=torch_release(),
            owner=self.owner,
            artifact_id=artifact_id,
            log=log,
            wall_s=clock.wall_s(),
            cpu_s=clock.cpu_s(),
        )
        await asyncio.to_thread(self._urza.finish_compilation, compilation)

    async def _give_back(self, blueprint_id: str, log: str) -> None:
        try:
            await asyncio.to_thread(self._urza.release_blueprint, blueprint_id, self.owner, log)
        except (LibraryError, OSError) as error:
            # Nobody is harmed: the lease runs out, and another forge takes it over.
            logger.warning("blueprint %s was not given back: %s", blueprint_id, error)

    async def _trace(
        self, design: Design, site: SiteSignature, dtype: str
    ) -> tuple[Blueprint, bytes]:
        header, blobs = await self._worker.call(
            "trace",
            {
                "design": design.model_dump(mode="json"),
                "site": site.model_dump(mode="json"),
                "dtype": dtype,
                "settings": self._settings.model_dump(mode="json"),
            },
            {},
            timeout_s=self._settings.timeout_s,
        )
        return Blueprint.model_validate(header["blueprint"]), blobs[GRAPH_FILE]

    def _make_worker(self) -> WorkerProcess:
        return WorkerProcess(
            "esper.tezzeret.child",
            niceness=self._settings.niceness,
            memory_limit_bytes=self._settings.memory_limit_bytes,
        )

    def _announce(self, topic: Topic, payload: Contract) -> None:
        if self._bus is not None:
            self._bus.publish(topic, _NAME, payload)

    def _waits(self, blueprint_id: str) -> bool:
        return self._urza.blueprint_status(blueprint_id)[0] is BlueprintStatus.UNVALIDATED

    def _is_unfinished(self, blueprint_id: str) -> bool:
        """Tell whether it waits, is worked on, or was not tried for this device and torch."""
        status, _ = self._urza.blueprint_status(blueprint_id)
        if status is BlueprintStatus.COMPILED:
            return not self._urza.was_tried(
                blueprint_id, Pipeline.FAST, self._device, torch_release()
            )
        return status is not BlueprintStatus.INVALID


class _Clock:
    """The time since it was made: that has passed, and that a worker has computed."""

    def __init__(self, worker: WorkerProcess) -> None:
        self._worker = worker
        self._began_s = time.monotonic()
        self._spent_s = worker.cpu_time_s()

    def wall_s(self) -> float:
        return time.monotonic() - self._began_s

    def cpu_s(self) -> float:
        return max(0.0, self._worker.cpu_time_s() - self._spent_s)


def _is_available(pipeline: Pipeline) -> bool:
    try:
        check_available(pipeline)
    except ValueError:
        return False
    return True


def _shortened(error: Exception) -> str:
    head, _, rest = str(error).partition("\n")
    return f"{head} (the rest is logged at DEBUG)" if rest else head
