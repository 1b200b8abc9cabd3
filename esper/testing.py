"""Test doubles for your own tests: a bus, a library and a policy that do as they are told.

None of them starts a thread, opens a file or needs a compiler, and all may be asked afterwards what
was done with them.
"""

import functools
import hashlib
from collections.abc import Callable, Iterable, Sequence

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from torch import nn

from esper.blueprints.residual_mlp import ResidualMLP
from esper.contracts import (
    Contract,
    Design,
    FieldReport,
    KasminaControlCommand,
    KernelBundle,
    KernelManifest,
    KernelQuery,
    KernelRecord,
    KernelStatement,
    KernelStatus,
    OonaMessage,
    Pipeline,
    SiteSignature,
    Topic,
)
from esper.errors import ArtifactNotFoundError
from esper.oona import MemoryBus
from esper.tamiyo import ModelView
from esper.tezzeret.trace import trace
from esper.trust import TrustedKey
from esper.urza.signing import EvaluatorKey

LINEAR_8_4 = SiteSignature(host="Linear", inp_shape=(None, 8), act_shape=(None, 4), channel_dim=1)


class FakeBus(MemoryBus):
    """The embedded bus, which remembers in ``sent`` all that was sent, in order. Any thread."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[OonaMessage] = []

    def send(self, message: OonaMessage) -> None:
        self.sent.append(message)
        super().send(message)

    def payloads(self, topic: Topic) -> list[Contract]:
        """Return what was sent on a topic."""
        return [message.payload for message in self.sent if message.topic is topic]

    def message(self, topic: Topic, payload: Contract) -> OonaMessage:
        """Return a message that is not sent, to be handed to a consumer directly."""
        return OonaMessage(topic=topic, sender_id="test", payload=payload)


class FakeLibrary:
    """A library in memory whose evaluator signs whatever a test asks for.

    Serves as what a model is connected to (kernels made by :meth:`add`, with real signatures) and as
    what Tamiyo asks: ``query`` offers every VALIDATED kernel, in the order they came, for any site.
    Field reports are kept in ``reports``.
    """

    def __init__(self, records: Iterable[KernelRecord] = ()) -> None:
        self.key = EvaluatorKey(Ed25519PrivateKey.generate())
        self.bundles = {r.artifact_id: KernelBundle(record=r, files={}) for r in records}
        self.reports: list[FieldReport] = []

    @property
    def trusted_key(self) -> TrustedKey:
        return self.key.trusted()

    def fetch_kernel(self, artifact_id: str) -> KernelBundle:
        if artifact_id not in self.bundles:
            raise ArtifactNotFoundError(f"no kernel {artifact_id}")
        return self.bundles[artifact_id]

    def kernel(self, artifact_id: str) -> KernelRecord:
        return self.fetch_kernel(artifact_id).record

    def query(self, query: KernelQuery) -> list[KernelRecord]:
        records = [bundle.record for bundle in self.bundles.values()]
        return [record for record in records if record.status is KernelStatus.VALIDATED]

    def record_field_report(self, report: FieldReport) -> None:
        self.reports.append(report)

    def add(
        self,
        builder: Callable[..., nn.Module] = ResidualMLP,
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


class FixedPolicy:
    """Issues the given commands at the end of the epoch that each names, whatever happens.

    ``views`` keeps what it was shown, one for each epoch.
    """

    def __init__(self, commands: Sequence[KasminaControlCommand] = ()) -> None:
        self.commands = tuple(commands)
        self.views: list[ModelView] = []

    def decide(self, view: ModelView) -> list[KasminaControlCommand]:
        self.views.append(view)
        return [command for command in self.commands if command.epoch == view.epoch]


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
