"""Tezzeret as the pipeline sees it: takes designs, and makes artifacts of blueprints.

Runs on the pipeline's event loop. Designs' code, torch.export and the rest run in one warm child
process, which is killed and replaced when it hangs or crashes; the library is called in threads.
"""

import asyncio
import logging
from contextlib import suppress
from types import TracebackType
from typing import Self

from esper.config import ForgeSettings
from esper.contracts import (
    Blueprint,
    BlueprintStatus,
    BlueprintSubmitted,
    Contract,
    Design,
    KernelManifest,
    KernelReady,
    Pipeline,
    SiteSignature,
    Topic,
)
from esper.errors import BlueprintError, EsperError, LibraryError
from esper.kasmina.kernel import GRAPH_FILE
from esper.oona import Oona
from esper.tezzeret.pipelines import check_available, torch_release
from esper.urza import Urza
from esper.worker import WorkerProcess

logger = logging.getLogger(__name__)

_NAME = "tezzeret"


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
        urza: Urza,
        bus: Oona | None = None,
        settings: ForgeSettings | None = None,
        *,
        device: str = "cpu",
    ) -> None:
        self._urza = urza
        self._bus = bus
        self._settings = settings or ForgeSettings()
        self._device = device
        self._worker = WorkerProcess(
            "esper.tezzeret.child",
            niceness=self._settings.niceness,
            memory_limit_bytes=self._settings.memory_limit_bytes,
        )

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
            raise BlueprintError(_shortened(error)) from None
        blueprint_id = await asyncio.to_thread(self._urza.submit_blueprint, blueprint, graph)
        if await asyncio.to_thread(self._is_due, blueprint_id):
            self._announce(Topic.BLUEPRINT_SUBMITTED, BlueprintSubmitted(blueprint_id=blueprint_id))
        return blueprint_id

    async def compile(self, blueprint_id: str, pipeline: Pipeline = Pipeline.FAST) -> str:
        """Make an artifact of a stored blueprint, publish and announce it; return its id.

        Where STANDARD or AGGRESSIVE bring nothing over a simpler pipeline, the artifact is that
        pipeline's, and the blueprint's log says why.

        The blueprint becomes COMPILING, then COMPILED, or INVALID with the reason as its log; the
        error is raised as well. Cancellation makes it UNVALIDATED again. Raises
        :class:`LibraryError` if another forge has it.
        """
        check_available(pipeline)
        await asyncio.to_thread(
            self._urza.set_blueprint_status, blueprint_id, BlueprintStatus.COMPILING
        )
        try:
            artifact_id, remark = await self._package(blueprint_id, pipeline)
        except asyncio.CancelledError:
            await self._settle(blueprint_id, BlueprintStatus.UNVALIDATED, "cancelled")
            raise
        except Exception as error:
            await self._settle(blueprint_id, BlueprintStatus.INVALID, str(error) or repr(error))
            raise
        await self._settle(blueprint_id, BlueprintStatus.COMPILED, remark)
        self._announce(Topic.KERNEL_READY, KernelReady(artifact_id=artifact_id))
        return artifact_id

    async def run(self) -> None:
        """Compile what waits in the library, and what is announced until the bus closes.

        A blueprint that fails is logged and left INVALID. Without a bus it returns when nothing
        waits any more.
        """
        if self._bus is None:
            for blueprint_id in await asyncio.to_thread(self._left_behind):
                await self._compile_if_due(blueprint_id)
            return
        submitted = self._bus.subscribe(Topic.BLUEPRINT_SUBMITTED, group=_NAME)
        for blueprint_id in await asyncio.to_thread(self._left_behind):
            self._announce_blueprint(blueprint_id)
        async for message in submitted:
            assert isinstance(message.payload, BlueprintSubmitted)
            await self._compile_if_due(message.payload.blueprint_id)

    async def close(self) -> None:
        """Kill the child process. What it was doing fails with :class:`WorkerError`."""
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

    async def _compile_if_due(self, blueprint_id: str) -> None:
        if not await asyncio.to_thread(self._is_due, blueprint_id):
            return
        try:
            await self.compile(blueprint_id)
        except EsperError as error:
            logger.warning("blueprint %s was not compiled: %s", blueprint_id, _shortened(error))
            logger.debug("blueprint %s: %s", blueprint_id, error)

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

    async def _package(self, blueprint_id: str, pipeline: Pipeline) -> tuple[str, str]:
        """Return the artifact's id, and why it is of a simpler pipeline if it is."""
        blueprint = await asyncio.to_thread(self._urza.blueprint, blueprint_id)
        graph = await asyncio.to_thread(self._urza.graph, blueprint_id)
        header, files = await self._worker.call(
            "package",
            {
                "blueprint": blueprint.model_dump(mode="json"),
                "device": self._device,
                "pipeline": pipeline,
            },
            {GRAPH_FILE: graph},
            timeout_s=self._timeout_s(pipeline),
        )
        manifest = KernelManifest.model_validate(header["manifest"])
        if header["remark"]:
            logger.info("blueprint %s: %s", blueprint_id, header["remark"])
        artifact_id = await asyncio.to_thread(self._urza.publish_kernel, manifest, files)
        return artifact_id, header["remark"]

    def _timeout_s(self, pipeline: Pipeline) -> float:
        settings = self._settings
        return settings.timeout_s if pipeline is Pipeline.FAST else settings.native_timeout_s

    async def _settle(self, blueprint_id: str, status: BlueprintStatus, log: str = "") -> None:
        try:
            await asyncio.to_thread(self._urza.set_blueprint_status, blueprint_id, status, log)
        except LibraryError as error:
            # Another forge took us for lost. It comes to the same artifact.
            logger.info("%s: %s", _NAME, error)

    def _announce_blueprint(self, blueprint_id: str) -> None:
        self._announce(Topic.BLUEPRINT_SUBMITTED, BlueprintSubmitted(blueprint_id=blueprint_id))

    def _announce(self, topic: Topic, payload: Contract) -> None:
        if self._bus is not None:
            self._bus.publish(topic, _NAME, payload)

    def _left_behind(self) -> list[str]:
        """Return what is waiting, with what a forge was compiling when it was lost."""
        for blueprint_id in self._urza.blueprints(BlueprintStatus.COMPILING):
            with suppress(LibraryError):  # it was not lost, and has just finished
                self._urza.set_blueprint_status(
                    blueprint_id, BlueprintStatus.UNVALIDATED, "its forge was lost"
                )
        return self._urza.blueprints(BlueprintStatus.UNVALIDATED)

    def _is_due(self, blueprint_id: str) -> bool:
        """Tell whether the library has no kernel of it for this device and release of torch."""
        status, _ = self._urza.blueprint_status(blueprint_id)
        if status is not BlueprintStatus.COMPILED:
            return status is BlueprintStatus.UNVALIDATED
        wanted = (blueprint_id, self._device, torch_release())
        made = (record.manifest for record in self._urza.kernels())
        return wanted not in {(m.blueprint_id, m.device, m.torch_version) for m in made}


def _shortened(error: Exception) -> str:
    head, _, rest = str(error).partition("\n")
    return f"{head} (the rest is logged at DEBUG)" if rest else head
