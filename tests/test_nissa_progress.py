"""The progress display: plain lines for a file, a live picture for a person."""

import io
import math

import pytest
from nissa_sample import EPOCH, result_rows
from rich.console import Console

from esper.contracts import SeedState, SiteSignature
from esper.nissa import formats
from esper.nissa.progress import RunProgress, result_table
from esper.nissa.record import ResultRow

TIMES = "\N{MULTIPLICATION SIGN}"
LINEAR = SiteSignature(host="Linear", inp_shape=(None, 12), act_shape=(None, 5), channel_dim=1)
CONVOLUTION = SiteSignature(
    host="Conv2d",
    inp_shape=(None, 3, None, None),
    act_shape=(None, 2, None, None),
    channel_dim=1,
    kernel_size=(3, 3),
    stride=(1, 1),
    padding=(0, 0),
    dilation=(1, 1),
)


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


def test_without_a_terminal_it_prints_events_every_tenth_epoch_and_the_last():
    plain, output = console(terminal=False)
    with RunProgress(12, console=plain) as progress:
        feed(progress)
        progress.kernel("gated: VALIDATED", rejected=False)
        for epoch in range(1, 12):
            progress.update_epoch(EPOCH.model_copy(update={"epoch": epoch}))
    numbers = "training loss 0.5000, validation loss 0.6000, accuracy 87.50 %"
    assert output.getvalue().splitlines() == [
        "Urabrask rejected bad_gradient: [red] gradients are off",
        "gated: VALIDATED",
        f"epoch 9 (10 of 12 done): {numbers}",
        f"epoch 11 (12 of 12 done): {numbers}",
    ]


def test_on_a_terminal_it_shows_what_is_not_dormant():
    live, output = console(terminal=True)
    with RunProgress(30, console=live) as progress:
        feed(progress)
    shown = output.getvalue()
    for text in ("1/30", "validation loss 0.6000", "layers.2 seed 1", "0.42", "low_rank", "[red]"):
        assert text in shown
    assert "layers.1" not in shown


def test_a_terminal_counts_kernels_and_names_the_rejected_ones():
    live, output = console(terminal=True)
    with RunProgress(30, console=live) as progress:
        progress.kernel("gated: VALIDATED", rejected=False)
        progress.kernel("exploding: REJECTED", rejected=True)
    assert "2 kernels tried, 1 rejected" in output.getvalue()
    assert "exploding: REJECTED" in output.getvalue()
    assert "gated: VALIDATED" not in output.getvalue()


def test_between_an_epoch_and_the_next_step_it_says_that_it_waits():
    live, _ = console(terminal=True)

    def shown() -> str:
        picture = io.StringIO()
        Console(file=picture, width=90).print(progress._render())
        return picture.getvalue()

    progress = RunProgress(30, console=live)
    assert "waiting" not in shown()
    progress.update_epoch(EPOCH)
    assert "waiting for the pipeline" in shown()
    progress.resume()
    assert "waiting" not in shown()


def test_it_leaves_the_terminal_alone_after_an_error():
    live, output = console(terminal=True)
    with pytest.raises(RuntimeError, match="stop"), RunProgress(3, console=live):
        raise RuntimeError("stop")
    assert output.getvalue().endswith("\x1b[?25h")  # the cursor is visible again


def test_the_result_table_fits_a_terminal_of_80_columns():
    row = ResultRow(
        label="static, same size",
        note="width 13",
        parameters=1_234_567,
        test_accuracy=1.0,
        test_loss=0.0859,
        training_flops=1.25e9,
    )
    narrow = Console(file=io.StringIO(), width=80)
    assert narrow.measure(result_table([row])).maximum <= 80


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
        (formats.effect(0.00029), "lowers the held-out loss by 0.0003"),
        (formats.effect(-0.0016, 0.0012), "raises the held-out loss by 0.0016 ± 0.0012"),
        (
            formats.effect(math.nan, 1.0),
            "has an effect on the held-out loss that could not be measured",
        ),
        (formats.site_label(LINEAR), "Linear 12 → 5"),
        (
            formats.site_label(CONVOLUTION),
            "Conv2d 3*any*any → 2*any*any, kernel 3*3".replace("*", f" {TIMES} "),
        ),
        (formats.plural(1, "epoch"), "1 epoch"),
        (formats.plural(1200, "epoch"), "1,200 epochs"),
        (formats.state_label(SeedState.FINE_TUNING), "fine tuning"),
    ],
)
def test_numbers_are_written_as_people_read_them(written, expected):
    assert written == expected
