"""A run of your own, recorded in a folder that ``esper watch`` shows while it goes on."""

import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from esper.contracts import EpochEvent, OonaMessage
from esper.kasmina.model import MorphableModel
from esper.nissa.journal import FINAL_RECORD, JOURNAL, Journal
from esper.nissa.network import summarize_network
from esper.nissa.record import RunRecorder
from esper.nissa.report import write_report
from esper.nissa.scribe import Scribe


class Run:
    """A context manager around the pipeline, its listener and, with Tolaria, a callback::

        with esper.nissa.Run(model, "runs/mine") as run:
            with esper.Pipeline(model, library, listener=run) as pipeline:
                ...

    ``folder`` gets ``journal.jsonl`` while the run goes on; at the end ``report.html`` and
    ``run.json``, marked as interrupted if an exception ended it. ``name`` is by default the
    folder's, ``network`` the model's class. Nothing here reads the device.

    Raises ``FileExistsError`` if the folder holds a run already. In a distributed run, for rank 0.
    """

    def __init__(
        self,
        model: MorphableModel,
        folder: Path | str,
        *,
        name: str | None = None,
        network: str | None = None,
    ) -> None:
        self.model = model
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        for file in (JOURNAL, FINAL_RECORD):
            if (self.folder / file).exists():
                raise FileExistsError(f"{self.folder} holds a run already: {file}")
        recorder = RunRecorder(
            name or self.folder.resolve().name,
            network=network or type(model).__name__,
            command=shlex.join(sys.argv),
            seed=torch.initial_seed(),
            machine=f"{platform.machine()}, {platform.system()}",
            torch_version=torch.__version__,
            before=summarize_network(model),
        )
        self._scribe = Scribe(model, recorder)
        self._journal = Journal(recorder, self.folder)

    def __enter__(self) -> Self:
        self._journal.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._journal.__exit__(kind, error, trace)
        recorder = self._scribe.recorder
        after = summarize_network(self.model, self._scribe.contributions)
        recorder.finish(after=after, interrupted=error is not None)
        record = recorder.record()
        write_report(record, self.folder / "report.html")
        (self.folder / FINAL_RECORD).write_text(record.to_json(), encoding="utf-8")

    def __call__(self, message: OonaMessage) -> None:
        """Take in a message of the bus; runs in the pipeline's thread."""
        self._scribe.hear(message)

    def on_step(self, step: int, epoch: int) -> None:
        """Record the alphas of the seeds with kernels."""
        self._scribe.on_step(step, epoch)

    def on_epoch(self, event: EpochEvent, step_losses: Sequence[float]) -> None:
        """Record the losses of the epoch's steps."""
        self._scribe.on_epoch(event, step_losses)
