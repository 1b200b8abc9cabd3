"""Writes down what happens in a run, for the report and for whoever watches."""

import threading
from collections.abc import Sequence
from typing import cast

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
    """Writes down what happens, for the report and for whoever watches.

    A listener of :class:`esper.Pipeline` by :meth:`hear`, and a callback of :class:`esper.Tolaria`
    where there is one; without it the record lacks the losses and alphas of single steps.
    """

    def __init__(
        self, model: MorphableModel, recorder: RunRecorder, progress: RunProgress | None = None
    ):
        self.model = model
        self.recorder = recorder
        self.progress = progress
        self.contributions: dict[SeedId, float] = {}  # as last measured
        self._lock = threading.Lock()
        self._noted_step = -1  # of the latest epoch
        self._occupied: set[SeedId] = set()  # after the latest step

    def hear(self, message: OonaMessage) -> None:
        """Take in a message of the bus; runs in the pipeline's thread."""
        payload = message.payload
        if isinstance(payload, LifecycleEvent):
            self.recorder.add_lifecycle(payload)
            if self.progress is not None:
                self.progress.event(
                    f"epoch {payload.epoch}: {seed_label(payload.seed_id)}: "
                    f"{payload.source.name} > {payload.target.name} ({payload.reason})"
                )
        elif isinstance(payload, EpochEvent):
            self._note_epoch(payload)
        elif isinstance(payload, FieldReport):
            self.recorder.add_field_report(payload)
        elif isinstance(payload, KernelCharacterized):
            self._note_kernel(payload)

    def on_step(self, step: int, epoch: int) -> None:
        if self.progress is not None:
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
        self._note_epoch(event)
        if self.progress is not None:
            self.progress.update_epoch(event)
            self.progress.update_seeds(self._busy_seeds())

    def _note_epoch(self, event: EpochEvent) -> None:
        """Record an epoch once, whether the loop or the bus tells of it first."""
        with self._lock:
            known, self._noted_step = event.step <= self._noted_step, event.step
        if known:
            return
        self.recorder.add_epoch(event)
        for evaluation in event.evaluations:
            self.contributions[evaluation.seed_id] = evaluation.contribution

    def _note_kernel(self, characterized: KernelCharacterized) -> None:
        library = cast(Library, self.model.kasmina.library)
        kernel = library.kernel(characterized.artifact_id)
        report = library.report(characterized.artifact_id)
        self.recorder.add_kernel(kernel, report)
        if self.progress is None:
            return
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
