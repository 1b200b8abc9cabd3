"""From an artifact id to a kernel that is verified, built, on its device and warm.

Runs in background threads: reading, hashing and building never happen on the training thread, and
on CUDA the copies run on a stream of their own.
Building a kernel executes Python source that is generated from the artifact's whitelisted graph,
which is why digest and signature are checked first, over the very bytes that are built.
"""

import contextlib
import ctypes
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Protocol

import torch

from esper.contracts import KernelBundle, KernelManifest, SiteSignature
from esper.errors import ArtifactMismatchError
from esper.kasmina.cache import KernelCache
from esper.kasmina.compiled import build
from esper.kasmina.example import example_inputs
from esper.kasmina.kernel import Kernel
from esper.trust import TrustedKey, verify_bundle


class KernelSource(Protocol):
    """All that Kasmina knows of a library."""

    @property
    def trusted_key(self) -> TrustedKey: ...

    def fetch_kernel(self, artifact_id: str) -> KernelBundle: ...


class KernelLoader:
    """Prepares kernels from ``source``; every method may be called from any thread.

    Of several threads that want the same artifact at once one loads it, and the others wait for it.
    """

    def __init__(self, source: KernelSource, cache: KernelCache):
        self.source = source
        self.cache = cache
        self._under_way: dict[_Request, Future[Kernel]] = {}
        self._turn = threading.Lock()  # held for a few look-ups at a time

    def prepare(
        self, artifact_id: str, site: SiteSignature, dtype: torch.dtype, device: torch.device
    ) -> Kernel:
        """Return a fresh kernel for one seed. Waits for the copies to ``device``.

        Raises :class:`ArtifactError` or one of its subclasses if the artifact is unknown, not
        VALIDATED, tampered with, or made for another site, dtype, device kind or torch version.
        """
        prototype = self._prototype((artifact_id, site, dtype, device))
        check_fit(prototype.manifest, site, dtype, device)
        with _own_stream(device) as hand_over:
            return hand_over(prototype.replica())

    def _prototype(self, request: "_Request") -> Kernel:
        with self._turn:
            cached = self.cache.get(request[0])
            if cached is not None:
                return cached
            other = self._under_way.get(request)
            if other is None:
                mine = self._under_way[request] = Future[Kernel]()
        if other is not None:
            return other.result()
        try:
            prototype = self._load(*request)
        except BaseException as error:
            self._end(request)
            mine.set_exception(error)
            raise
        self.cache.put(prototype)
        self._end(request)
        mine.set_result(prototype)
        return prototype

    def _end(self, request: "_Request") -> None:
        with self._turn:
            del self._under_way[request]

    def _load(
        self, artifact_id: str, site: SiteSignature, dtype: torch.dtype, device: torch.device
    ) -> Kernel:
        bundle = self.source.fetch_kernel(artifact_id)
        verify_bundle(bundle, self.source.trusted_key)
        manifest = bundle.record.manifest
        check_fit(manifest, site, dtype, device)
        kernel = build(manifest, bundle.files)
        with _own_stream(device) as hand_over:
            kernel = hand_over(kernel.to(device))
            warm_up(kernel, device)
        return kernel


def compute_alone() -> None:
    """Have the calling thread compute without helpers: for a thread that loads, when it begins.

    A thread new to OpenMP brings a pool of its own, which spins on the trainer's cores: a warm-up
    of 0.06 ms took 9 ms of CPU time. ``torch.set_num_threads`` would speak for the trainer, too.
    """
    torch.get_num_threads()  # sets the thread up as the trainer's are; later it would undo this:
    with contextlib.suppress(AttributeError):  # a torch without OpenMP
        ctypes.CDLL(None).omp_set_num_threads(1)


_Request = tuple[str, SiteSignature, torch.dtype, torch.device]


def warm_up(kernel: Kernel, device: torch.device) -> None:
    """Run a copy of ``kernel`` forward and backward once, on random inputs of its site.

    What is looked up and loaded at a first call is then there: that costs up to a millisecond on
    the CPU. Draws from a generator of its own; kernels that draw random numbers in training are
    run in evaluation only, as the trainer's random numbers are not to be touched.
    """
    random = torch.Generator().manual_seed(0)
    manifest = kernel.manifest
    inp, act = (
        tensor.to(device)
        for tensor in example_inputs(manifest.site, manifest.dtype, 2, generator=random)
    )
    replica = kernel.replica().train(not kernel.stochastic)
    with torch.enable_grad():
        out = replica(inp, act.requires_grad_())
        if out.requires_grad:
            torch.autograd.grad(out, (act, *replica.weights()), out.detach(), allow_unused=True)


@contextlib.contextmanager
def _own_stream(device: torch.device) -> Iterator[Callable[[Kernel], Kernel]]:
    """On CUDA run the block on a stream of its own, and wait for it at the end in this thread.

    What the block yields is given a kernel whose memory the training stream will use: the
    allocator then keeps it from others until that stream is done with it, too.
    """
    if device.type != "cuda":
        yield lambda kernel: kernel
        return
    training_stream = torch.cuda.default_stream(device)
    stream = torch.cuda.Stream(device)

    def hand_over(kernel: Kernel) -> Kernel:
        for tensor in (*kernel.parameters(), *kernel.buffers()):
            tensor.record_stream(training_stream)
        return kernel

    with torch.cuda.stream(stream):
        yield hand_over
    stream.synchronize()


def check_fit(
    manifest: KernelManifest, site: SiteSignature, dtype: torch.dtype, device: torch.device
) -> None:
    """Raise :class:`ArtifactMismatchError` unless the kernel was validated for exactly this."""
    release = ".".join(torch.__version__.split(".")[:2])
    wanted = {
        "dtype": str(dtype).removeprefix("torch."),
        "device": device.type,
        "torch_version": release,
    }
    for field, expected in wanted.items():
        found = getattr(manifest, field)
        if found != expected:
            raise ArtifactMismatchError(
                f"kernel {manifest.artifact_id[:12]} ({manifest.design.name}) was validated for "
                f"{field} {found}, the layer needs {expected}"
            )
    if manifest.site != site and manifest.site != flattened(site):
        raise ArtifactMismatchError(
            f"kernel {manifest.artifact_id[:12]} ({manifest.design.name}) was made for site "
            f"{manifest.site}, the layer has {site}"
        )


def flattened(site: SiteSignature) -> SiteSignature:
    """The rank-2 form of a site with channels last: all leading dimensions taken as the batch.

    A kernel that treats rows independently serves such a layer at every rank.
    """
    rank = len(site.act_shape)
    if rank <= 2 or site.channel_dim != rank - 1 or len(site.inp_shape) != rank:
        return site
    return site.model_copy(
        update={
            "inp_shape": (None, site.inp_shape[-1]),
            "act_shape": (None, site.act_shape[-1]),
            "channel_dim": 1,
            "batch_dim": 0,
        }
    )
