"""The whole pipeline beside a training loop: all workers on one event loop in one thread.

The training thread only appends (to the bus, to Kasmina's inbox) and goes on. Compiling and
benchmarking happen in child processes; this thread awaits them.
"""

import asyncio
import concurrent.futures
import contextlib
import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import esper.blueprints as blueprints
import esper.oona as oona
import esper.urza as urza
from esper.config import EvaluatorSettings, ForgeSettings, TamiyoSettings
from esper.contracts import (
    Contract,
    Design,
    EpochEvent,
    KasminaControlCommand,
    KernelCharacterized,
    KernelQuery,
    KernelStatus,
    LifecycleEvent,
    OonaMessage,
    SeedId,
    SiteSignature,
    Topic,
)
from esper.errors import EsperError
from esper.kasmina.health import health_batch_beside
from esper.kasmina.layer import KasminaLayer
from esper.kasmina.model import MorphableModel
from esper.kasmina.observation import Observation
from esper.oona import Oona
from esper.oona.bus import TELEMETRY
from esper.tamiyo import Policy, Tamiyo
from esper.tezzeret import Tezzeret
from esper.tolaria import measure_epoch
from esper.tolaria.evaluation import Batch, LossPerSample
from esper.urabrask import Urabrask
from esper.urza import Library

if TYPE_CHECKING:
    from esper.nissa.metrics import Metrics

logger = logging.getLogger(__name__)

# Designs that are nonlinear in the layer's input. On a Linear or convolution a linear one computes
# nothing that the host could not learn by itself.
NONLINEAR_DESIGNS = frozenset({"residual_mlp", "gated", "conv_bottleneck"})

_PATIENCE = 200  # observed steps without the end of an epoch, until a warning
_ACCOUNTS = (Topic.LIFECYCLE, Topic.EPOCH, Topic.FIELD_REPORTS)
_SETTLING_TIME_S = 10.0


class _Threads(concurrent.futures.ThreadPoolExecutor):
    """Threads that the end of the loop does not wait for: a library's server may not answer one."""

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        super().shutdown(wait=False, cancel_futures=cancel_futures)


Listener = Callable[[OonaMessage], None]
DesignsFor = Callable[[SiteSignature], Iterable[Design]]


class Pipeline:
    """Runs Urza's clients, Tezzeret, Urabrask and Tamiyo beside the training of ``model``.

    A context manager, and a callback for :class:`esper.Tolaria`: the loop's epoch events go to
    the bus. ``library`` is a library, or what :func:`esper.urza.connect` takes: a folder, the URL of
    a server, or None for what the environment says. ``designs`` says what is compiled for a
    site (by default every built-in design that fits), ``policy`` decides (by default a
    :class:`esper.tamiyo.PlateauPolicy`), and ``controller`` sets limits to any policy. What decisions
    depend on is written to ``journal``, for :func:`esper.tamiyo.replay`. ``listener``, one or several,
    is called with every message but telemetry, in the pipeline's thread. With ``metrics_port``
    Prometheus is served there, on ``metrics_host``, while the pipeline runs; port 0 is a free one, see
    ``metrics.port``, and the extra ``metrics`` is needed. With ``synchronous`` the end of an epoch waits
    until every worker has
    nothing left to do, so that two runs take the same decisions at the same steps; otherwise
    training never waits. Without ``local_workers`` blueprints are only submitted here, and forges
    and evaluators elsewhere make kernels of them; it then needs the trusted key alone.

    In a distributed run (:func:`esper.distribute`) each rank makes one, alike. That of rank 0 does
    the work; the others only let kernels be loaded from the library and take part in measuring.
    """

    def __init__(
        self,
        model: MorphableModel,
        library: Library | Path | str | None = None,
        *,
        designs: DesignsFor = blueprints.designs_for,
        preferred_tags: frozenset[str] = NONLINEAR_DESIGNS,
        policy: Policy | None = None,
        controller: TamiyoSettings | None = None,
        journal: Path | None = None,
        forge: ForgeSettings | None = None,
        evaluator: EvaluatorSettings | None = None,
        bus: Oona | None = None,
        listener: Listener | Sequence[Listener] = (),
        metrics_port: int | None = None,
        metrics_host: str = "127.0.0.1",
        synchronous: bool = False,
        local_workers: bool = True,
        timeout_s: float = 300.0,
    ):
        if not isinstance(model, MorphableModel):
            raise TypeError(f"{type(model).__name__} is not wrapped; call esper.wrap first")
        if bus is not None and not isinstance(bus, Oona):
            raise TypeError(f"bus must be an Oona, as esper.oona.connect(url) gives, got {bus!r}")
        self.model = model
        self._owns_library = library is None or isinstance(library, Path | str)
        self.urza: Library = (
            urza.connect(library) if library is None or isinstance(library, Path | str) else library
        )
        self.bus = bus or oona.connect()
        device = model.kasmina.bank.device.type
        self.tezzeret = Tezzeret(self.urza, self.bus, forge or ForgeSettings(), device=device)
        self.urabrask = Urabrask(
            self.urza, self.bus, evaluator or EvaluatorSettings(), device=device
        )
        self.tamiyo = Tamiyo(
            self.bus, self.urza, self._query_for, policy, settings=controller, journal=journal
        )
        self._designs = designs
        self._preferred_tags = preferred_tags
        self._listeners = (listener,) if callable(listener) else tuple(listener)
        self._synchronous = synchronous
        self._local_workers = local_workers
        self._timeout_s = timeout_s
        self._thread = threading.Thread(target=self._serve, name="esper-pipeline", daemon=True)
        self._started = threading.Event()
        self._closed = False
        self._failure: BaseException | None = None
        self._unheard_observations = 0
        self._last_step = model.kasmina.step_count  # at the last end of an epoch
        self._observations: asyncio.Queue[Observation] = asyncio.Queue()
        self._foresight = asyncio.Lock()
        self._metrics_address = metrics_host, metrics_port
        self.metrics: Metrics | None = None
        if metrics_port is not None and not model.kasmina.follows:
            self._measure()

    def _measure(self) -> None:
        from esper.nissa.metrics import Metrics

        self.metrics = Metrics(self.model, self.bus)
        self._listeners += (self.metrics.hear,)

    # ------------------------------------------------------------------ the training thread

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def start(self) -> None:
        """Connect the model and start the thread."""
        kasmina = self.model.kasmina
        if kasmina.emit_lifecycle is not None or self._started.is_set() or self._closed:
            raise EsperError("a pipeline is started once, and a model has one at a time")
        self.model.connect(self.urza)
        kasmina.deterministic |= self._synchronous
        if kasmina.follows:
            return
        if self.metrics is not None:
            host, port = self._metrics_address
            self.metrics.serve(host, port or 0)
        self._loop = asyncio.new_event_loop()
        kasmina.emit_lifecycle = self._publish_lifecycle
        kasmina.emit_observation = self._hand_over_observation
        self._thread.start()
        self._started.wait()

    def drain(self) -> None:
        """Wait until every worker has dealt with all that was published.

        Raises :class:`EsperError` if a worker has failed, ``TimeoutError`` after ``timeout_s``.
        """
        self._raise_failure()
        if self.model.kasmina.follows:
            return
        if not self._thread.is_alive():
            raise EsperError("the pipeline is not running")
        future = asyncio.run_coroutine_threadsafe(self._drained(), self._loop)
        try:
            future.result(self._timeout_s)
        except TimeoutError:
            future.cancel()
            raise TimeoutError(
                f"the pipeline has not settled in {self._timeout_s:g} s: {self.bus.stats()}"
            ) from None
        except concurrent.futures.CancelledError:
            pass  # the loop ended under it, for the reason that is raised now
        self._raise_failure()

    def close(self) -> None:
        """Stop all workers; what is compiling or being evaluated is given up.

        Raises :class:`EsperError` if a worker had failed: training went on without it.
        """
        self._closed = True
        self._detach()
        if self._thread.is_alive():
            self._settle_accounts()
            self.bus.close()
            with contextlib.suppress(RuntimeError):  # the loop is closed: a worker had failed
                self._loop.call_soon_threadsafe(self._stop)
            self._thread.join(self._timeout_s)
        if self.metrics is not None:
            self.metrics.close()
        if self._owns_library:
            self.urza.close()
        self._raise_failure()

    def state_dict(self) -> dict[str, Any]:
        """Return what Tamiyo remembers, in JSON types: for ``esper.save(..., extra=...)``.

        Waits until she has heard of all that has happened, and decided on it; not for workers.
        Training thread. Raises :class:`EsperError` if a worker has failed.
        """
        self._raise_failure()
        if not self._thread.is_alive():
            return self.tamiyo.state_dict()
        future = asyncio.run_coroutine_threadsafe(self._remembered(), self._loop)
        return future.result(self._timeout_s)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let Tamiyo go on from :meth:`state_dict`. Before the pipeline is started.

        Raises ``ValueError`` for anything else, and :class:`EsperError` once it has started;
        nothing is changed then.
        """
        if self._started.is_set():
            raise EsperError("a pipeline takes on a state before it is started")
        self.tamiyo.load_state_dict(state)

    def end_epoch(
        self, val_loader: Iterable[Batch], loss_fn: LossPerSample, *, train_loss: float
    ) -> EpochEvent:
        """Measure the held-out losses and have Tamiyo decide: for training loops of one's own.

        To be called at regular intervals, on the training thread. ``loss_fn(output, target)``
        returns one loss per sample, ``(B,)``. Waits for the device.
        """
        kasmina = self.model.kasmina
        event = measure_epoch(
            self.model, val_loader, loss_fn, epoch=kasmina.epoch, train_loss=train_loss
        )
        self.on_epoch(event, ())
        kasmina.epoch += 1
        return event

    def on_step(self, step: int, epoch: int) -> None:
        """Nothing to do: ``model.step()`` has done it."""

    def on_epoch(self, event: EpochEvent, step_losses: Sequence[float]) -> None:
        """Publish the end of an epoch; Tamiyo decides on it."""
        if self.model.kasmina.follows:
            return
        if not self._started.is_set():
            raise EsperError(
                "the pipeline was not started: use it in a `with` block, or start() it"
            )
        if event.step == self._last_step:
            logger.warning(
                "no model.step() since the last end of an epoch (step %d): without it seeds neither "
                "load kernels nor move",
                event.step,
            )
        self._last_step = event.step
        self._unheard_observations = 0
        if self._synchronous:
            self.drain()
        self.bus.publish(Topic.EPOCH, "tolaria", event)
        if self._synchronous:
            self.drain()

    def _detach(self) -> None:
        """Leave the model to itself, and free for another pipeline."""
        kasmina = self.model.kasmina
        if kasmina.follows:
            kasmina.close()
        elif kasmina.emit_lifecycle == self._publish_lifecycle:
            kasmina.emit_lifecycle = None
            kasmina.emit_observation = None
            kasmina.close()

    def _publish_lifecycle(self, event: LifecycleEvent) -> None:
        self.bus.publish(Topic.LIFECYCLE, f"kasmina-{event.seed_id[0]}", event)

    def _hand_over_observation(self, observation: Observation) -> None:
        self._unheard_observations += 1
        if self._unheard_observations == _PATIENCE:
            logger.warning(
                "%d observed steps without the end of an epoch: the controller decides on "
                "held-out losses only; call pipeline.end_epoch() or train with esper.Tolaria",
                _PATIENCE,
            )
        with contextlib.suppress(RuntimeError):  # the loop is closed: a worker has failed
            self._loop.call_soon_threadsafe(self._observations.put_nowait, observation)

    def _settle_accounts(self) -> None:
        """Let what has happened reach the audit log, Tamiyo and the library before all ends."""
        if self._failure is not None:
            return
        with contextlib.suppress(RuntimeError, TimeoutError, concurrent.futures.CancelledError):
            drained = asyncio.run_coroutine_threadsafe(self.bus.drained(_ACCOUNTS), self._loop)
            drained.result(_SETTLING_TIME_S)

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise EsperError(f"a worker of the pipeline failed: {self._failure!r}") from (
                self._failure
            )

    # ------------------------------------------------------------------ the pipeline's thread

    def _serve(self) -> None:
        # The runner goes on until everything that is cancelled has come to its end.
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.get_loop().set_default_executor(_Threads())
            try:
                with contextlib.suppress(asyncio.CancelledError):
                    runner.run(self._work())
            except Exception as failure:
                self._failure = failure
                self.bus.close()
                logger.exception("a worker of the pipeline failed; training goes on without it")
            finally:
                self._started.set()
                runner.run(self._end_workers())

    def _stop(self) -> None:
        self._main.cancel()

    async def _work(self) -> None:
        main = asyncio.current_task()
        assert main is not None
        self._main = main
        async with asyncio.TaskGroup() as tasks:
            if self._local_workers:
                tasks.create_task(self.tezzeret.run())
                tasks.create_task(self.urabrask.run())
            tasks.create_task(self.tamiyo.run())
            tasks.create_task(self._relay_commands())
            tasks.create_task(self._archive_lifecycle())
            tasks.create_task(self._publish_health())
            tasks.create_task(self._stock_library())
            for topic in (Topic.EPOCH, Topic.KERNEL_CHARACTERIZED):
                tasks.create_task(self._look_ahead(topic))
            if self._listeners:
                for topic in sorted(set(Topic) - TELEMETRY):
                    tasks.create_task(self._listen(topic))
            await asyncio.sleep(0)  # every task has joined its group before training goes on
            self._started.set()

    async def _end_workers(self) -> None:
        await self.tezzeret.close()
        await self.urabrask.close()

    async def _drained(self) -> None:
        await self._observations.join()
        await self.bus.drained()

    async def _remembered(self) -> dict[str, Any]:
        await self.bus.drained((*_ACCOUNTS, Topic.TAMIYO_REQUESTS))
        return self.tamiyo.state_dict()

    async def _relay_commands(self) -> None:
        async for message in self.bus.subscribe(Topic.KASMINA_COMMANDS, "kasmina"):
            assert isinstance(message.payload, KasminaControlCommand)
            self.model.kasmina.submit(message.payload)

    async def _listen(self, topic: Topic) -> None:
        async for message in self.bus.subscribe(topic, "listener"):
            for listener in self._listeners:
                try:
                    listener(message)
                except Exception:
                    logger.exception("a listener failed on %s", message.topic)

    async def _archive_lifecycle(self) -> None:
        async for message in self.bus.subscribe(Topic.LIFECYCLE, "urza"):
            assert isinstance(message.payload, LifecycleEvent)
            await asyncio.to_thread(self.urza.record_lifecycle, message.payload)

    async def _publish_health(self) -> None:
        while True:
            observation = await self._observations.get()
            batch = await health_batch_beside(observation)
            self.bus.publish(Topic.SEED_HEALTH, "kasmina", batch)
            self._observations.task_done()

    async def _stock_library(self) -> None:
        """Have kernels made for every site of the model, once the first observation shows them.

        The observation counts as dealt with only when the last design was submitted.
        """
        stocked = False
        async for _ in self.bus.subscribe(Topic.SEED_HEALTH, "stock"):
            if not stocked:
                await self._submit_designs()
                stocked = True

    async def _submit_designs(self) -> None:
        for (site, dtype), layer_names in self._sites().items():
            for design in self._designs(site):
                try:
                    await self.tezzeret.submit(design, site, dtype)
                except EsperError as error:  # also of a design that crashed or hung its process
                    logger.warning("design %s for %s: %s", design.name, layer_names, error)

    async def _look_ahead(self, topic: Topic) -> None:
        """Have blocks that are compiled in the background prepare for what may germinate next."""
        async for message in self.bus.subscribe(topic, "compiler"):
            blocks = self.model.kasmina.compiled_blocks
            if any(block.looks_ahead() for block in blocks) and not _is_refusal(message.payload):
                async with self._foresight:
                    await self._foresee()

    async def _foresee(self) -> None:
        try:
            for offer in await self.tamiyo.prospects():
                await asyncio.to_thread(
                    self.model.kasmina.foresee, offer.seed_id, offer.kernel.artifact_id
                )
        except EsperError as error:  # of a library that is away: it is no more than foresight
            logger.warning("nothing is compiled ahead: %s", error)

    def _sites(self) -> dict[tuple[SiteSignature, str], list[str]]:
        """Return the distinct sites of the model, and which layers have them."""
        sites: dict[tuple[SiteSignature, str], list[str]] = {}
        for layer in self.model.kasmina_layers.values():
            for seed_idx in range(layer.num_seeds if layer.shapes is not None else 0):
                key = (layer.site(seed_idx), _dtype_name(layer))
                sites.setdefault(key, []).append(layer.name)
        return sites

    def _query_for(self, seed_id: SeedId) -> KernelQuery | None:
        layer = self.model.kasmina_layers[seed_id[0]]
        if layer.shapes is None or seed_id[1] >= layer.num_seeds:
            return None
        return KernelQuery(
            site=layer.site(seed_id[1]),
            dtype=_dtype_name(layer),
            device=self.model.kasmina.bank.device.type,
            preferred_tags=self._preferred_tags,
        )


def _is_refusal(payload: Contract) -> bool:
    """Whether it tells of a kernel that Urabrask did not validate."""
    return isinstance(payload, KernelCharacterized) and payload.status is not KernelStatus.VALIDATED


def _dtype_name(layer: KasminaLayer) -> str:
    return str(layer.dtype).removeprefix("torch.")
