"""How a kernel comes from the library to its seat: prepared in the background, seated by a step."""

import concurrent.futures
import contextlib
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import esper.kasmina.morph as morph
from esper.contracts import SeedState
from esper.errors import EsperError
from esper.kasmina.bank import SeedCells
from esper.kasmina.kernel import Kernel
from esper.kasmina.layer import KasminaLayer
from esper.kasmina.loader import KernelLoader, KernelSource, compute_alone
from esper.kasmina.prepared import Prepared, prepare
from esper.kasmina.seat import Seat
from esper.kasmina.tenancy import Tenancy

if TYPE_CHECKING:
    from esper.kasmina.execution import Kasmina

_TO_COME = (SeedState.GERMINATED, SeedState.LOADING)
_THREADS = 2  # while one waits for the library, the other builds


class Loads:
    """Kernels on their way. Training thread, unless a method says otherwise."""

    def __init__(self, kasmina: "Kasmina"):
        self._kasmina = kasmina
        self._loader: KernelLoader | None = None
        self._executor: ThreadPoolExecutor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "Loads":
        """Return those of a copied model: none, from the same library."""
        twin = Loads(memo[id(self._kasmina)])
        if self._loader is not None:
            twin.connect(self._loader.source)
        return twin

    def connect(self, library: KernelSource) -> None:
        """Let kernels be loaded from ``library``."""
        self._loader = KernelLoader(library, self._kasmina.cache)

    @property
    def library(self) -> KernelSource | None:
        """The library that kernels are loaded from, or None."""
        return None if self._loader is None else self._loader.source

    def check_connected(self) -> None:
        """Raise :class:`EsperError` while there is no library. Any thread."""
        if self._loader is None:
            raise EsperError(
                "no library is connected: call model.connect(esper.Urza(folder)), or start a "
                "Pipeline, first"
            )

    def under_way(self) -> list[Tenancy]:
        """Return the tenancies whose kernel is still to come, in the order of their admission."""
        states = self._kasmina.bank.mirror["lifecycle_states"]
        tenancies = self._kasmina.tenancies.values()
        return [t for t in tenancies if states[t.layer.first_seed + t.seed_idx] in _TO_COME]

    def pursue(self) -> None:
        """Begin the loads that are wanted and settle those that are done."""
        for tenancy in self.under_way():
            prepared = tenancy.prepared or self.prepare(tenancy)
            if self._kasmina.deterministic:
                concurrent.futures.wait([prepared])
            if prepared.done():
                self.settle(tenancy)

    def prepare(self, tenancy: Tenancy) -> "Future[Prepared]":
        """GERMINATED > LOADING: have a seat with the kernel prepared in the background."""
        if self._executor is None:
            self._executor = ThreadPoolExecutor(
                _THREADS, thread_name_prefix="esper-loader", initializer=compute_alone
            )
        if tenancy.layer.state(tenancy.seed_idx) is SeedState.GERMINATED:
            tenancy.layer.await_kernel(tenancy.seed_idx)
        tenancy.prepared = self._executor.submit(self._prepare, tenancy, tenancy.layer.make_room())
        return tenancy.prepared

    def _prepare(self, tenancy: Tenancy, cells: SeedCells) -> Prepared:
        """Do all that can be done before the step that seats the kernel. Loading thread."""
        layer, seed_idx = tenancy.layer, tenancy.seed_idx
        kernel = self.load(layer, seed_idx, tenancy.artifact_id)
        # The training thread asks again, and is told at once. RuntimeError: it changed a module's
        # children while they were looked through here.
        with contextlib.suppress(EsperError, RuntimeError):
            self._kasmina.enrollment.check(layer, kernel)
        morph.active_class(morph.own_class(type(layer.default_transform)))  # made once, in 0.1 ms
        seat = layer.make_seat(seed_idx, kernel, cells)
        seat.train(layer.default_transform.training)
        return prepare(seat, isolated=_trains(tenancy, seat))

    def load(self, layer: KasminaLayer, seed_idx: int, artifact_id: str) -> Kernel:
        """Return a fresh, verified kernel for a seed; see :meth:`KernelLoader.prepare`. Any thread."""
        self.check_connected()
        assert self._loader is not None
        device = self._kasmina.bank.device
        if layer.device != device:
            raise EsperError(
                f"layer '{layer.name}' is on {layer.device}, the seeds on {device}: "
                "move the wrapped model as a whole"
            )
        site = layer.site(seed_idx)
        return self._loader.prepare(artifact_id, site, layer.dtype, layer.device)

    def settle(self, tenancy: Tenancy) -> None:
        """LOADING > TRAINING, GRAFTING or CULLED, by what came of the preparation."""
        if tenancy.layer.state(tenancy.seed_idx) is SeedState.LOADING:  # not culled meanwhile
            self.conclude(tenancy, self.obstacle(tenancy))

    def obstacle(self, tenancy: Tenancy) -> BaseException | None:
        """Return why the kernel whose preparation has ended cannot take its seat, if so."""
        assert tenancy.prepared is not None
        try:
            prepared = tenancy.prepared.result()
        except concurrent.futures.CancelledError:
            return _given_up()
        except BaseException as error:
            return error
        return _given_up() if tenancy.settled.done() else self._misfit(tenancy.layer, prepared)

    def conclude(self, tenancy: Tenancy, error: BaseException | None) -> None:
        """LOADING > TRAINING or GRAFTING with the prepared kernel, or > CULLED for an error."""
        prepared, tenancy.prepared, tenancy.fits = tenancy.prepared, None, False
        assert prepared is not None
        if error is None:
            _take(tenancy, prepared.result())
        else:
            tenancy.layer.reject_kernel(tenancy.seed_idx, error)
        tenancy.answer(error is None)

    def close(self) -> None:
        """Give up what is under way and stop the threads."""
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)
            self._executor = None

    def _misfit(self, layer: KasminaLayer, prepared: Prepared) -> EsperError | None:
        """Return what layer or optimizers have against the seat, if they do."""
        if "forward" in layer.default_transform.__dict__:
            return EsperError(
                f"layer '{layer.name}' has a forward of its own on the instance, which an active "
                "class cannot reach"
            )
        if prepared.kinds - {(layer.dtype, layer.device)}:
            kinds = " and ".join(f"{dtype} on {device}" for dtype, device in prepared.kinds)
            return EsperError(
                f"layer '{layer.name}' has become {layer.dtype} on {layer.device} while its kernel "
                f"was prepared as {kinds}"
            )
        try:
            self._kasmina.enrollment.check(layer, prepared.seat.kernel)
        except EsperError as error:
            return error
        return None


def _given_up() -> EsperError:
    return EsperError("the load was given up")


def _trains(tenancy: Tenancy, seat: Seat) -> bool:
    """Whether the seat is for TRAINING: fixed functions, and what is loaded by hand, are not."""
    return tenancy.strategy is not None and bool(seat.kernel.weights())


def _take(tenancy: Tenancy, prepared: Prepared) -> None:
    seat, formed = prepared.seat, prepared.formed()
    if _trains(tenancy, seat):
        tenancy.layer.train(seat, formed)
    else:
        tenancy.layer.graft_new(seat, tenancy.strategy, tenancy.alpha, formed)
