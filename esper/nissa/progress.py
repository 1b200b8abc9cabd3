"""A run in the terminal: live while someone watches, plain lines when the output is a file."""

from collections import deque
from collections.abc import Iterable
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from esper.contracts import EpochEvent, SeedId, SeedState
from esper.nissa.formats import count, flops, loss, percent, plural, seed_label, state_label
from esper.nissa.record import ResultRow

_SHOWN_EVENTS = 6
_PRINTED_EPOCHS = 10  # without a terminal, one in so many epochs gets a line
_STYLES = {
    SeedState.FOSSILIZED: "green",
    SeedState.CULLED: "red",
    SeedState.CANCELLED: "red",
    SeedState.ROLLED_BACK: "red",
}


class RunProgress:
    """Shows epochs, seeds that are not dormant, and the latest events of the pipeline.

    A context manager. Its methods may be called from any thread; a terminal is redrawn by a thread
    of its own, so they only wait for the output where it is not a terminal.
    """

    def __init__(self, total_epochs: int, *, console: Console | None = None) -> None:
        self._console = console or Console()
        self._total_epochs = total_epochs
        self._bar = Progress(
            TextColumn("epoch"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        )
        self._task = self._bar.add_task("epochs", total=total_epochs)
        self._epoch_line = ""
        self._waiting = False
        self._num_kernels = self._num_rejected = 0
        self._seeds: list[tuple[SeedId, SeedState, float, str | None]] = []
        self._events: deque[str] = deque(maxlen=_SHOWN_EVENTS)
        self._live = Live(console=self._console, get_renderable=self._render)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._waiting = False
        self._live.stop()

    def update_epoch(self, event: EpochEvent) -> None:
        """Show an epoch's end; until :meth:`resume`, the pipeline decides what comes next."""
        self._waiting = True
        self._bar.advance(self._task)
        self._epoch_line = _epoch_line(event)
        done = int(self._bar.tasks[self._task].completed)
        if done % _PRINTED_EPOCHS == 0 or done == self._total_epochs:
            self._print(
                f"epoch {event.epoch} ({done} of {self._total_epochs} done): {self._epoch_line}"
            )

    def resume(self) -> None:
        """Training goes on."""
        self._waiting = False

    def update_seeds(self, seeds: Iterable[tuple[SeedId, SeedState, float, str | None]]) -> None:
        """Show ``(id, state, alpha, design)`` of these seeds instead; dormant ones are left out."""
        self._seeds = [seed for seed in seeds if seed[1] is not SeedState.DORMANT]

    def event(self, text: str) -> None:
        self._events.append(text)
        self._print(text)

    def kernel(self, text: str, *, rejected: bool) -> None:
        """Count a kernel that was tried out; a terminal shows only the rejected ones by name."""
        self._num_kernels += 1
        self._num_rejected += rejected
        if rejected:
            self.event(text)
        else:
            self._print(text)

    def _print(self, line: str) -> None:
        if not self._console.is_terminal:
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _render(self) -> RenderableType:
        parts: list[RenderableType] = [self._bar, Text(self._epoch_line)]
        if self._num_kernels:
            tried = plural(self._num_kernels, "kernel")
            parts.append(Text(f"{tried} tried, {self._num_rejected} rejected"))
        if self._waiting:
            parts.append(Text("deciding, waiting for the pipeline", style="yellow"))
        if self._seeds:
            parts.append(self._seed_table())
        parts += [
            Text(text, style="dim", overflow="ellipsis", no_wrap=True)
            for text in list(self._events)
        ]
        return Group(*parts)

    def _seed_table(self) -> Table:
        table = Table("seed", "state", "alpha", "design", box=None, header_style="dim")
        for seed_id, state, alpha, design in self._seeds:
            table.add_row(
                Text(seed_label(seed_id)),
                Text(state_label(state), style=_STYLES.get(state, "yellow")),
                f"{alpha:.2f}",
                Text(design or ""),
            )
        return table


def result_table(rows: Iterable[ResultRow]) -> Table:
    """Return the final comparison on the test set; the network of this run is set in bold."""
    table = Table("network")
    for heading in ("accuracy", "loss", "parameters", "training"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            Text(f"{row.label} ({row.note})" if row.note else row.label),
            percent(row.test_accuracy),
            loss(row.test_loss),
            count(row.parameters),
            flops(row.training_flops),
            style="bold" if row.grown else None,
        )
    return table


def _epoch_line(event: EpochEvent) -> str:
    line = f"training loss {loss(event.train_loss)}, validation loss {loss(event.val_loss)}"
    if event.val_accuracy is not None:
        line += f", accuracy {percent(event.val_accuracy)}"
    return line
