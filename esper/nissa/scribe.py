"""Writes down what happens in a run, for the report and for whoever watches."""

from collections.abc import Sequence

from esper.contracts import (
    EpochEvent,
    FieldReport,
    KernelCharacterized,
    KernelStatus,
    LifecycleEvent,
    OonaMessage,
    SeedId,
    SeedState,
)
from esper.kasmina.lifecycle import OCCUPIED
from esper.kasmina.model import MorphableModel
from esper.nissa.formats import seed_label, site_label
from esper.nissa.progress import RunProgress
from esper.nissa.record import RunRecorder
from esper.urza import Library


class Scribe:
    """Writes down what happens, for the report and for whoever watches."""

    def __init__(
        self,
        model: MorphableModel,
        urza: Library,
        recorder: RunRecorder,
        progress: RunProgress,
        contributions: dict[SeedId, float],
    ):
        self.model = model
        self.urza = urza
        self.recorder = recorder
        self.progress = progress
        self.contributions = contributions
        self._occupied: set[SeedId] = set()  # after the latest step

    def hear(self, message: OonaMessage) -> None:
        """Take in a message of the bus; runs in the pipeline's thread."""
        payload = message.payload
        if isinstance(payload, LifecycleEvent):
            self.recorder.add_lifecycle(payload)
            self.progress.event(
                f"epoch {payload.epoch}: {seed_label(payload.seed_id)}: "
                f"{payload.source.name} > {payload.target.name} ({payload.reason})"
            )
        elif isinstance(payload, FieldReport):
            self.recorder.add_field_report(payload)
        elif isinstance(payload, KernelCharacterized):
            self._note_kernel(payload)

    def on_step(self, step: int, epoch: int) -> None:
        self.progress.resume()
        alphas = {
            (name, seed_idx): self.model.kasmina.layer(name).state_layout.value(
                "alpha_blend", seed_idx
            )
            for name, seed_idx in self.model.kasmina.seeds_in(OCCUPIED)
        }
        vacated = dict.fromkeys(self._occupied - alphas.keys(), 0.0)
        self.recorder.add_alphas(step, alphas | vacated)
        self._occupied = set(alphas)

    def on_epoch(self, event: EpochEvent, step_losses: Sequence[float]) -> None:
        first = event.step - len(step_losses) + 1
        for offset, loss in enumerate(step_losses):
            self.recorder.add_step(first + offset, event.epoch, loss)
        self.recorder.add_epoch(event)
        for evaluation in event.evaluations:
            self.contributions[evaluation.seed_id] = evaluation.contribution
        self.progress.update_epoch(event)
        self.progress.update_seeds(self._busy_seeds())

    def _note_kernel(self, characterized: KernelCharacterized) -> None:
        kernel = self.urza.kernel(characterized.artifact_id)
        report = self.urza.report(characterized.artifact_id)
        self.recorder.add_kernel(kernel, report)
        failed = next((check for check in report.checks if not check.passed), None)
        verdict = f"{kernel.status}: {failed.reason}" if failed else str(kernel.status)
        manifest = kernel.manifest
        self.progress.kernel(
            f"Urabrask: {manifest.design.name} for {site_label(manifest.site)}: {verdict}",
            rejected=kernel.status is KernelStatus.REJECTED,
        )

    def _busy_seeds(self) -> list[tuple[SeedId, SeedState, float, str | None]]:
        kasmina = self.model.kasmina
        busy = []
        for name, seed_idx in kasmina.seeds_in(frozenset(SeedState) - {SeedState.DORMANT}):
            layer = kasmina.layer(name)
            kernel = layer.kernel(seed_idx)
            alpha = layer.state_layout.value("alpha_blend", seed_idx)
            design = kernel.manifest.design.name if kernel else None
            busy.append(((name, seed_idx), layer.state(seed_idx), alpha, design))
        return busy
