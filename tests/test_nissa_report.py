"""The report: true to its record, self-contained, well-formed, and the same bytes every time."""

import math
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from nissa_sample import (
    EPOCH,
    GRADIENT_REASON,
    KEPT,
    REMOVED,
    empty_record,
    field_report,
    result_rows,
    sample_record,
)

from esper.contracts import Outcome, SeedState
from esper.nissa import charts, story
from esper.nissa.adaptations import adaptations
from esper.nissa.figures import figures
from esper.nissa.record import AlphaSeries, ResultRow, RunRecord, StepLoss
from esper.nissa.report import render_report, write_report

VOID = {"meta", "br", "path", "link", "img", "input", "hr"}
HOSTILE = "<script>alert('x')</script>\"&{{ 7 * 7 }}"


class Page(HTMLParser):
    """Collects the text, the tags and the attributes, and checks that every tag is closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def replaced(record: RunRecord, **fields: object) -> RunRecord:
    return RunRecord.model_validate(record.model_dump() | fields)


@pytest.mark.parametrize("record", [sample_record(), empty_record()], ids=["sample", "empty"])
def test_the_page_is_well_formed_and_loads_nothing(record):
    html = render_report(record)
    page = Page(html)
    assert html.startswith("<!DOCTYPE html>")
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert not {"src", "href", "srcset"} & {name for name, _ in page.attributes}
    for trace in ("http:", "https:", "url(", "@import"):
        assert trace not in html


def test_the_same_record_gives_the_same_bytes(tmp_path):
    first, second = tmp_path / "first.html", tmp_path / "second.html"
    write_report(sample_record(), first)
    write_report(RunRecord.from_json(sample_record().to_json()), second)
    assert first.read_bytes() == second.read_bytes()


def test_it_shows_results_events_kernels_and_origin():
    text = Page(render_report(sample_record())).text
    for shown in (
        *("91.39 %", "0.2790", "2,342", "3.5 GFLOP", "one kernel kept"),
        *("layers.2 seed 0 germinated", "layers.2 seed 0 kept for good", "layers.1 seed 1 removed"),
        *("validation loss flat over 4 epochs", "bad_gradient", f"gradients: {GRADIENT_REASON}"),
        *("11.2 µs", "18 KiB", "1.2e-07", "+352 parameters, lowers the held-out loss by 0.1620"),
        *("esper demo --seed 0", "2023-11-14 22:13 UTC", "Tezzeret"),
    ):
        assert shown in text


def test_hostile_names_are_only_text():
    layers = [layer.model_copy(update={"fqn": HOSTILE}) for layer in sample_record().after]
    events = [
        event.model_copy(update={"seed_id": (HOSTILE, 0), "reason": HOSTILE})
        for event in sample_record().lifecycle
    ]
    report = field_report(seed_id=(HOSTILE, 0)).model_copy(update={"reason": HOSTILE})
    record = replaced(
        sample_record(),
        **dict.fromkeys(("name", "network", "command", "machine"), HOSTILE),
        after=layers,
        lifecycle=events,
        field_reports=[report],
        alphas=[AlphaSeries(seed_id=(HOSTILE, 0), points=((1, 0.5),))],
        results=[ResultRow(label=HOSTILE, parameters=1, note=HOSTILE)],
    )
    page = Page(render_report(record))
    assert "script" not in page.tags
    assert page.text.count(HOSTILE) >= 10


def test_a_diverged_run_is_drawn_with_a_gap_and_says_so():
    losses = (0.5, math.nan, 0.4, 0.3, math.inf)
    steps = [StepLoss(step=i, epoch=1, loss=loss) for i, loss in enumerate(losses)]
    epoch = EPOCH.model_copy(update={"val_loss": math.nan, "train_loss": math.inf})
    record = empty_record(step_losses=steps, epochs=[epoch])
    chart = charts.loss_chart(record, charts.step_scale(record))
    assert chart is not None
    assert chart.left_out == 4
    assert [line.path.count("M") for line in chart.lines] == [2, 0, 0]
    assert not any(word in line.path for line in chart.lines for word in ("nan", "inf"))
    assert "left out: 4 values" in Page(render_report(record)).text


def test_a_curve_without_a_finite_value_is_not_drawn():
    record = empty_record(step_losses=[StepLoss(step=1, epoch=1, loss=math.nan)])
    assert charts.loss_chart(record, charts.step_scale(record)) is None
    Page(render_report(record))


def test_a_long_curve_is_thinned_to_its_means():
    steps = [StepLoss(step=i, epoch=1, loss=i % 2) for i in range(100_000)]
    record = empty_record(step_losses=steps)
    chart = charts.loss_chart(record, charts.step_scale(record))
    assert chart is not None
    assert chart.lines[0].label == "training, mean of 250 steps"
    assert len(chart.lines[0].path) < 10_000
    assert len(render_report(record)) < 60_000


def test_an_alpha_drops_where_its_kernel_is_removed_and_no_line_bridges_the_time_without_one():
    first = [(1, 0.0), (2, 0.4), *((step, 1.0) for step in range(3, 50)), (50, 0.0)]
    second = [(80, 0.0), (81, 1.0)]
    alphas = [AlphaSeries(seed_id=KEPT, points=(*first, *second))]
    chart = charts.alpha_chart(empty_record(alphas=alphas), charts.Scale(0, 100))
    assert chart is not None
    assert chart.lines[0].path == "M1 100h0L1 100 2 60 3 0 49 0 50 100M80 100h0L80 100 81 0"


def test_the_axis_of_accuracy_is_linear_and_ends_at_100_percent():
    epochs = [
        EPOCH.model_copy(update={"val_accuracy": accuracy, "step": step})
        for step, accuracy in enumerate((0.01, 1.0))
    ]
    record = empty_record(epochs=epochs)
    chart = charts.accuracy_chart(record, charts.step_scale(record))
    assert chart is not None
    assert [tick.label for tick in chart.y_ticks] == ["0", "20", "40", "60", "80", "100"]


def test_an_event_stands_right_of_the_tick_of_its_epoch():
    record = sample_record()
    x = charts.step_scale(record)
    starts = {int(tick.label): tick.at for tick in charts.epoch_ticks(record, x)}
    for marker in charts.markers(record, x):
        epoch = marker.event.epoch
        assert starts.get(epoch, 0) <= marker.at <= starts.get(epoch + 1, 100)


def test_markers_in_a_row_do_not_touch_and_stay_in_order():
    record = sample_record()
    crowded = [
        event.model_copy(update={"seed_id": (f"layers.{i}", 0), "step": event.step + i})
        for i in range(6)
        for event in record.lifecycle
    ]
    record = replaced(record, lifecycle=crowded)
    placed = charts.markers(record, charts.step_scale(record))
    assert [marker.number for marker in placed] == list(range(1, len(placed) + 1))
    assert [marker.at for marker in placed] == sorted(marker.at for marker in placed)
    for row in {marker.row for marker in placed}:
        places = [marker.at for marker in placed if marker.row == row]
        assert all(b - a >= 6.5 for a, b in pairwise(places))


def test_a_timeline_covers_a_seed_from_waking_to_the_end():
    record = sample_record()
    lives = dict(charts.timelines(record, charts.step_scale(record)))
    assert [span.state for span in lives[KEPT]][-1] is SeedState.FOSSILIZED
    last = lives[KEPT][-1]
    assert last.left + last.width == pytest.approx(100)
    removed = lives[REMOVED][-1]
    assert removed.state is SeedState.CULLED
    assert removed.left + removed.width == pytest.approx(90)


@pytest.mark.parametrize(
    ("low", "high", "logarithmic", "labels"),
    [
        (0, 1, False, ["0", "0.2", "0.4", "0.6", "0.8", "1"]),
        (-3, 7, False, ["-2", "0", "2", "4", "6"]),
        (0.2, 2, True, ["0.2", "0.5", "1", "2"]),
        (1e-3, 1e30, True, ["0.001", "100", "1e+07", "1e+12", "1e+17", "1e+22", "1e+27"]),
    ],
)
def test_ticks_are_round_numbers(low, high, logarithmic, labels):
    ticks = charts.Scale(low, high, logarithmic).ticks()
    assert [tick.label for tick in ticks] == labels


def test_the_headline_names_what_was_kept():
    assert story.headline(sample_record()) == (
        "The network 64-24-12-10 could no longer improve at epoch 12; "
        "a `low_rank` kernel of 352 parameters was grown into `layers.2` and kept."
    )


def test_every_place_names_the_epoch_in_which_the_seed_germinated():
    decided = field_report().model_copy(update={"started_epoch": 11})
    record = replaced(sample_record(), field_reports=[decided])
    assert story.started_epoch(record, decided) == 12
    assert "at epoch 12;" in story.headline(record)
    assert "12\N{EN DASH}18" in Page(render_report(record)).text


def test_the_report_of_an_interrupted_run_says_so():
    record = replaced(sample_record(), finished=False, interrupted=True, results=())
    assert "This run was interrupted." in Page(render_report(record)).text
    assert "interrupted" not in Page(render_report(sample_record())).text


def test_it_says_when_training_ended_before_a_kernel_was_judged():
    record = empty_record(kernels=sample_record().kernels, epochs=[EPOCH], finished=True)
    said = "the pipeline had validated 2 kernels when training ended."
    assert said in Page(render_report(record)).text
    assert story.unjudged(replaced(record, finished=False)) == ""
    assert story.unjudged(sample_record()) == ""


def test_the_results_stand_before_what_was_tried():
    text = Page(render_report(sample_record())).text
    assert text.index("91.39 %") < text.index("What was tried") < text.index("How it learned")


def test_the_headline_claims_no_plateau_that_the_record_does_not_show():
    record = replaced(sample_record(), epochs=[EPOCH])
    assert story.headline(record).startswith(
        "In the network 64-24-12-10, at epoch 12, a `low_rank`"
    )


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "has not finished its first epoch yet"),
        ({"epochs": [EPOCH]}, "Nothing has grown so far: the network 4-2 has trained for 1 epoch."),
        (
            {"epochs": [EPOCH] * 2, "finished": True},
            "Nothing was grown: the network 4-2 trained for 2 epochs as it was.",
        ),
        (
            {"field_reports": [field_report(outcome=Outcome.CULLED)]},
            "was tried in `layers.2` and removed again.",
        ),
        (
            {"field_reports": [field_report(outcome=Outcome.FAILED)] * 3},
            "3 kernels were tried and all removed again.",
        ),
        ({"field_reports": [field_report()] * 2}, "and kept, and 1 more kernel after it."),
        ({"lifecycle": sample_record().lifecycle[:8]}, "has grown in `layers.2`."),
        ({"lifecycle": sample_record().lifecycle[:4]}, "is growing in `layers.2`; the verdict"),
    ],
)
def test_the_headline_of_other_outcomes(fields, said):
    assert said in story.headline(empty_record(**fields))


@pytest.mark.parametrize(
    ("static_accuracy", "said"),
    [
        (0.9222, "`large` (4,210 parameters) beats `grown by Esper` (2,342 parameters) by 0.83"),
        (0.9222, "growing did not win here."),
        (0.9, "`grown by Esper` (2,342 parameters) beats `large` (4,210 parameters) by 1.39"),
        (0.9139, "are equally good."),
    ],
)
def test_the_verdict_on_accuracy(static_accuracy, said):
    assert said in story.verdict(result_rows(static_accuracy))


def test_the_verdict_on_loss():
    grown, static = (ResultRow(label=name, parameters=1, grown=name == "g") for name in "gs")
    low, high, nan = ({"test_loss": value} for value in (0.25, 0.5, math.nan))
    won = [grown.model_copy(update=low), static.model_copy(update=high)]
    diverged = [grown.model_copy(update=nan), static.model_copy(update=high)]
    assert "`g` (1 parameter) beats `s` (1 parameter) by 0.2500 in loss." in story.verdict(won)
    assert "`g` diverged" in story.verdict(diverged)
    assert story.verdict([grown, static]) == story.verdict([]) == ""


def test_the_details_count_what_was_made():
    (text,) = story.details(sample_record())
    assert "3 kernels, 2 of them found safe and correct, 1 rejected." in text


def test_an_attempt_that_the_run_did_not_finish_is_told_of():
    whole = sample_record()
    began = [event for event in whole.lifecycle if event.seed_id == REMOVED][:4]
    record = whole.model_copy(
        update={"field_reports": whole.field_reports[:1], "lifecycle": tuple(began)}
    )
    _, unfinished = adaptations(record)
    assert (unfinished.seed_id, unfinished.design, unfinished.outcome) == (
        REMOVED,
        "gated",
        "unfinished",
    )
    assert (unfinished.started_epoch, unfinished.ended_epoch) == (20, None)
    assert unfinished.num_parameters == 352
    assert unfinished.state is SeedState.GRAFTING
    assert "Verdict none, the run ended in grafting." in Page(render_report(record)).text
    [_, going_on] = adaptations(record.model_copy(update={"finished": False}))
    assert going_on.outcome == "under way"


def test_an_attempt_that_ended_without_a_report_is_not_open():
    whole = sample_record()
    assert len(adaptations(whole.model_copy(update={"field_reports": ()}))) == 0


def test_each_attempt_says_what_where_when_why_its_cost_and_what_it_brought():
    kept, removed = adaptations(sample_record())
    assert (kept.design, kept.started_epoch, kept.num_parameters) == ("low_rank", 12, 352)
    assert "validation loss flat over 4 epochs" in kept.why
    assert (kept.state, removed.state) == (SeedState.FOSSILIZED, SeedState.CULLED)
    text = " ".join(Page(render_report(sample_record())).text.split())
    assert f"Why {kept.why}. Verdict {kept.verdict}." in text


def test_effects_are_drawn_from_one_zero_on_one_scale():
    kept, removed = (a.bar for a in adaptations(sample_record()))
    assert kept.zero == removed.zero
    assert (kept.left, kept.helps) == (kept.zero, True)
    assert (removed.left + removed.width, removed.helps) == (pytest.approx(removed.zero), False)
    # 0.162 and 0.003, each with two standard errors of 0.011 to both sides
    assert kept.width / removed.width == pytest.approx(0.162 / 0.003, rel=0.01)
    assert kept.error_width / kept.width == pytest.approx(4 * 0.011 / 0.162, rel=0.01)


@pytest.mark.parametrize("outcome", Outcome)
def test_an_attempt_with_any_outcome_is_shown(outcome):
    record = empty_record(field_reports=[field_report(outcome=outcome)])
    shown = "kept" if outcome is Outcome.FOSSILIZED else outcome.lower().replace("_", " ")
    assert shown in Page(render_report(record)).text


def test_an_effect_that_is_not_finite_has_no_bar():
    diverged = field_report(contribution=math.nan)
    assert [a.bar for a in adaptations(empty_record(field_reports=[diverged]))] == [None]
    html = render_report(empty_record(field_reports=[diverged]))
    assert "could not be measured" in Page(html).text


def test_the_figures_sum_the_run_up():
    told = {figure.label: (figure.value, figure.note) for figure in figures(sample_record())}
    assert told["grown"][0] == "+352"
    assert told["grown"][1].startswith("parameters: 1 of 2 attempts kept")
    assert told["kernels made"] == ("3", "2 validated, 1 rejected")
    assert told["trained"] == ("1 min 14 s", "30 epochs")
    assert [figure.label for figure in figures(empty_record())] == ["trained"]
