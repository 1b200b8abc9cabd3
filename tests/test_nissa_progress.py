"""The progress display: plain lines for a file, a live picture for a person."""

import io
import math

import pytest
from nissa_sample import EPOCH, result_rows
from rich.console import Console

from esper.contracts import SeedState
from esper.nissa import formats
from esper.nissa.progress import RunProgress, result_table


def console(*, terminal: bool) -> tuple[Console, io.StringIO]:
    output = io.StringIO()
    return Console(file=output, force_terminal=terminal, width=90), output


def feed(progress: RunProgress) -> None:
    progress.event("Urabrask rejected bad_gradient: [red] gradients are off")
    progress.update_seeds(
        [
            (("layers.1", 0), SeedState.DORMANT, 0.0, None),
            (("layers.2", 1), SeedState.GRAFTING, 0.42, "low_rank"),
        ]
    )
    progress.update_epoch(EPOCH)


def test_without_a_terminal_it_prints_one_line_per_epoch_and_event():
    plain, output = console(terminal=False)
    with RunProgress(30, console=plain) as progress:
        feed(progress)
    assert output.getvalue().splitlines() == [
        "Urabrask rejected bad_gradient: [red] gradients are off",
        "epoch 1 of 30: training loss 0.5000, validation loss 0.6000, accuracy 87.50 %",
    ]


def test_on_a_terminal_it_shows_what_is_not_dormant():
    live, output = console(terminal=True)
    with RunProgress(30, console=live) as progress:
        feed(progress)
    shown = output.getvalue()
    for text in ("1/30", "validation loss 0.6000", "layers.2 seed 1", "0.42", "low_rank", "[red]"):
        assert text in shown
    assert "layers.1" not in shown


def test_it_leaves_the_terminal_alone_after_an_error():
    live, output = console(terminal=True)
    with pytest.raises(RuntimeError, match="stop"), RunProgress(3, console=live):
        raise RuntimeError("stop")
    assert output.getvalue().endswith("\x1b[?25h")  # the cursor is visible again


def test_the_result_table_has_the_numbers_of_the_rows():
    plain, output = console(terminal=False)
    plain.print(result_table(result_rows()))
    for text in ("grown by Esper", "91.39 %", "0.2790", "2,342", "3.5 GFLOP"):
        assert text in output.getvalue()


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (formats.percent(None), formats.MISSING),
        (formats.loss(math.nan), "nan"),
        (formats.loss(math.inf), "inf"),
        (formats.loss(3e7), "3.0e+07"),
        (formats.count(1234567), "1,234,567"),
        (formats.number(0.03125), "0.0312"),
        (formats.number(1.2e-7), "1.2e-07"),
        (formats.number(0), "0"),
        (formats.microseconds(11.24), "11.2 µs"),
        (formats.microseconds(2500), "2.5 ms"),
        (formats.flops(999), "999 FLOP"),
        (formats.flops(3.5e9), "3.5 GFLOP"),
        (formats.bytes_(512), "512 B"),
        (formats.bytes_(18432), "18 KiB"),
        (formats.duration(3.21), "3.2 s"),
        (formats.duration(74.2), "1 min 14 s"),
        (formats.duration(7500), "2 h 5 min"),
        (formats.plural(1, "epoch"), "1 epoch"),
        (formats.plural(1200, "epoch"), "1,200 epochs"),
        (formats.state_label(SeedState.FINE_TUNING), "fine tuning"),
    ],
)
def test_numbers_are_written_as_people_read_them(written, expected):
    assert written == expected
