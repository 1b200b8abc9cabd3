"""A library in memory with real signatures, and designs that behave in ways tests need."""

import functools
import hashlib
from collections.abc import Callable

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from torch import Tensor, nn

from esper.contracts import (
    Design,
    KernelBundle,
    KernelManifest,
    KernelRecord,
    KernelStatement,
    KernelStatus,
    Pipeline,
    SiteSignature,
)
from esper.errors import ArtifactNotFoundError
from esper.tezzeret.trace import trace
from esper.trust import TrustedKey
from esper.urza.signing import EvaluatorKey

LINEAR_8_4 = SiteSignature(host="Linear", inp_shape=(None, 8), act_shape=(None, 4), channel_dim=1)


class Residual(nn.Module):
    """``act + up(tanh(down(inp)))`` with a branch that is not zero at the start: a bottleneck."""

    def __init__(self, site: SiteSignature, dropout: float = 0.0):
        super().__init__()
        self.down = nn.Linear(site.inp_channels, 3)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.up = nn.Linear(3, site.act_channels)

    def forward(self, inp: Tensor, act: Tensor) -> Tensor:
        return act + self.up(self.dropout(torch.tanh(self.down(inp))))


class Irregular(Residual):
    """The same function, but none that can be computed in one go."""

    def forward(self, inp: Tensor, act: Tensor) -> Tensor:
        return super().forward(inp, act) * 1


class NotANumber(Residual):
    """NaN in the first channel of every row, whatever comes in."""

    def forward(self, inp: Tensor, act: Tensor) -> Tensor:
        out = super().forward(inp, act)
        first, rest = out[:, :1], out[:, 1:]
        return torch.cat([torch.sqrt(-1 - first * first), rest], 1)


class InfiniteGradient(Residual):
    """Finite outputs, but the square root's slope at 0 makes the gradients non-finite."""

    def forward(self, inp: Tensor, act: Tensor) -> Tensor:
        out = super().forward(inp, act)
        return act + torch.sqrt((out - act) * 0)


class Root(Residual):
    """NaN for every row whose first input is negative."""

    def forward(self, inp: Tensor, act: Tensor) -> Tensor:
        return super().forward(inp, act) + 0 * torch.sqrt(inp[:, :1])


class Tracking(Residual):
    """Keeps running statistics of its branch, like the host's batch norms."""

    def __init__(self, site: SiteSignature):
        super().__init__(site)
        self.norm = nn.BatchNorm1d(site.act_channels)

    def forward(self, inp: Tensor, act: Tensor) -> Tensor:
        return act + self.norm(super().forward(inp, act) - act)


class OneBatchOnly(Residual):
    """Fails for all but a batch of 5, by adding a parameter with five rows."""

    def __init__(self, site: SiteSignature):
        super().__init__(site)
        self.rows = nn.Parameter(torch.ones(1, site.act_channels))

    def forward(self, inp: Tensor, act: Tensor) -> Tensor:
        return super().forward(inp, act) * self.rows


class Doubled(nn.Module):
    """A fixed function: no parameters, nothing to train."""

    def __init__(self, site: SiteSignature):
        super().__init__()

    def forward(self, inp: Tensor, act: Tensor) -> Tensor:
        return act * 2


class MemoryLibrary:
    """A ``KernelSource`` whose evaluator signs whatever a test asks for."""

    def __init__(self) -> None:
        self.key = EvaluatorKey(Ed25519PrivateKey.generate())
        self.bundles: dict[str, KernelBundle] = {}

    @property
    def trusted_key(self) -> TrustedKey:
        return self.key.trusted()

    def fetch_kernel(self, artifact_id: str) -> KernelBundle:
        if artifact_id not in self.bundles:
            raise ArtifactNotFoundError(f"no kernel {artifact_id}")
        return self.bundles[artifact_id]

    def add(
        self,
        builder: Callable[..., nn.Module] = Residual,
        site: SiteSignature = LINEAR_8_4,
        *,
        status: KernelStatus = KernelStatus.VALIDATED,
        device: str = "cpu",
        **hparams: float,
    ) -> str:
        """Trace a design for a site, sign it with ``status`` and return the artifact's id."""
        manifest, files = _artifact(builder, site, device, tuple(sorted(hparams.items())))
        statement = KernelStatement(
            artifact_id=manifest.artifact_id, status=status, report_digest="0" * 64
        )
        record = KernelRecord(
            artifact_id=manifest.artifact_id,
            manifest=manifest,
            status=status,
            statement=statement,
            signature=self.key.sign(statement),
        )
        self.bundles[manifest.artifact_id] = KernelBundle(record=record, files=files)
        return manifest.artifact_id


@functools.cache
def _artifact(
    builder: Callable[..., nn.Module],
    site: SiteSignature,
    device: str,
    hparams: tuple[tuple[str, float], ...],
) -> tuple[KernelManifest, dict[str, bytes]]:
    design = Design(
        name=builder.__name__,
        builder=f"{builder.__module__}:{builder.__name__}",
        hparams=dict(hparams),
    )
    blueprint, graph, params = trace(design, site, "float32")
    files = {"graph.json": graph, "params.safetensors": params}
    manifest = KernelManifest(
        blueprint_id=blueprint.blueprint_id,
        design=design,
        pipeline=Pipeline.FAST,
        site=site,
        dtype="float32",
        device=device,
        torch_version=".".join(torch.__version__.split(".")[:2]),
        num_parameters=blueprint.num_parameters,
        flops_per_sample=blueprint.flops_per_sample,
        files={name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
    )
    return manifest, files
