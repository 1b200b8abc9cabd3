"""From an artifact id to a kernel that is verified, built and on its device.

Runs in a background thread: reading, hashing and building never happen on the training thread.
Building a kernel executes Python source that is generated from the artifact's whitelisted graph,
which is why digest and signature are checked first, over the very bytes that are built.
"""

import copy
from typing import Protocol

import torch

from esper.contracts import KernelBundle, KernelManifest, SiteSignature
from esper.errors import ArtifactMismatchError
from esper.kasmina.cache import KernelCache
from esper.kasmina.compiled import build
from esper.kasmina.kernel import Kernel
from esper.trust import TrustedKey, verify_bundle


class KernelSource(Protocol):
    """All that Kasmina knows of a library."""

    @property
    def trusted_key(self) -> TrustedKey: ...

    def fetch_kernel(self, artifact_id: str) -> KernelBundle: ...


class KernelLoader:
    """Prepares kernels from ``source``; every method may be called from any thread."""

    def __init__(self, source: KernelSource, cache: KernelCache):
        self.source = source
        self.cache = cache

    def prepare(
        self, artifact_id: str, site: SiteSignature, dtype: torch.dtype, device: torch.device
    ) -> Kernel:
        """Return a fresh kernel for one seed.

        Raises :class:`ArtifactError` or one of its subclasses if the artifact is unknown, not
        VALIDATED, tampered with, or made for another site, dtype, device kind or torch version.
        """
        prototype = self.cache.get(artifact_id)
        if prototype is None:
            bundle = self.source.fetch_kernel(artifact_id)
            verify_bundle(bundle, self.source.trusted_key)
            manifest = bundle.record.manifest
            check_fit(manifest, site, dtype, device)
            prototype = build(manifest, bundle.files).to(device)
            self.cache.put(prototype)
        else:
            check_fit(prototype.manifest, site, dtype, device)
        return copy.deepcopy(prototype)


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
    if manifest.site not in (site, flattened(site)):
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
