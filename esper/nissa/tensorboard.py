"""A run in TensorBoard: losses, seeds and adaptations by step."""

from pathlib import Path
from types import TracebackType
from typing import Self

from esper.contracts import EpochEvent, FieldReport, LifecycleEvent, OonaMessage
from esper.nissa.formats import effect, plural, seed_label, state_label

try:
    from torch.utils.tensorboard import SummaryWriter
except ImportError as error:
    raise ImportError(
        "TensorBoardWriter needs tensorboard: pip install 'esper-torch[tensorboard]'"
    ) from error


class TensorBoardWriter:
    """A listener for :class:`esper.Pipeline` that writes event files into ``folder``.

    A context manager; enter it before the pipeline. Writes from a thread of its own, in which
    TensorBoard's queue may hold up the pipeline, never the training.
    """

    def __init__(self, folder: Path | str) -> None:
        self._writer = SummaryWriter(str(folder))
        self._step = 0  # of the latest event; field reports carry none

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._writer.close()

    def __call__(self, message: OonaMessage) -> None:
        """Write a message of the bus down; runs in the pipeline's thread."""
        payload = message.payload
        if isinstance(payload, EpochEvent):
            self._epoch(payload)
        elif isinstance(payload, LifecycleEvent):
            self._lifecycle(payload)
        elif isinstance(payload, FieldReport):
            self._field_report(payload)

    def _epoch(self, event: EpochEvent) -> None:
        self._step = event.step
        self._scalar("loss/training", event.train_loss)
        self._scalar("loss/validation", event.val_loss)
        if event.val_accuracy is not None:
            self._scalar("accuracy/validation", event.val_accuracy)
        for evaluation in event.evaluations:
            self._scalar(f"contribution/{seed_label(evaluation.seed_id)}", evaluation.contribution)

    def _lifecycle(self, event: LifecycleEvent) -> None:
        self._step = event.step
        seed = seed_label(event.seed_id)
        self._scalar(f"state/{seed}", event.target.value)
        self._text(seed, f"{state_label(event.target)}: {event.reason}")

    def _field_report(self, report: FieldReport) -> None:
        text = f"{report.outcome.lower()}, {plural(report.num_parameters, 'parameter')}"
        if report.evaluation is not None:
            contribution = report.evaluation.contribution
            text += f", {effect(contribution, report.evaluation.standard_error)}"
        self._text(seed_label(report.seed_id), text)

    def _scalar(self, tag: str, value: float) -> None:
        self._writer.add_scalar(tag, value, self._step)

    def _text(self, seed: str, text: str) -> None:
        self._writer.add_text(f"seeds/{seed}", text, self._step)
