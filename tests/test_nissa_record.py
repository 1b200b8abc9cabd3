"""The record of a run: collected from several threads, and the same after JSON."""

import math
import threading

import pytest
from nissa_sample import EPOCH, field_report, kernel, sample_record
from pydantic import ValidationError

from esper.contracts import LifecycleEvent, SeedState
from esper.nissa.record import LayerSummary, ResultRow, RunRecord, RunRecorder


@pytest.fixture
def recorder() -> RunRecorder:
    return RunRecorder(
        "run", network="4-2", command="train", seed=1, machine="here", torch_version="2.13"
    )


def test_a_full_record_survives_json():
    record = sample_record()
    assert RunRecord.from_json(record.to_json()) == record


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_diverged_loss_survives_json(recorder, value):
    recorder.add_step(1, 1, value)
    recorder.add_epoch(EPOCH.model_copy(update={"val_loss": value}))
    record = RunRecord.from_json(recorder.record().to_json())
    for restored in (record.step_losses[0].loss, record.epochs[0].val_loss):
        assert repr(restored) == repr(value)


def test_an_unknown_field_is_refused():
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        RunRecord.from_json(sample_record().to_json().replace('"name"', '"nickname"', 1))


def test_the_recorder_keeps_what_it_was_given(recorder):
    edge = LifecycleEvent(
        seed_id=("a", 0), source=SeedState.DORMANT, target=SeedState.GERMINATED, epoch=1, step=2
    )
    recorder.add_step(1, 1, 0.5)
    recorder.add_alphas(1, {("a", 0): 0.1, ("b", 1): 0.2})
    recorder.add_alphas(2, {("a", 0): 0.3})
    recorder.add_epoch(EPOCH)
    recorder.add_lifecycle(edge)
    recorder.add_field_report(field_report())
    record = recorder.record()
    assert [(entry.step, entry.epoch, entry.loss) for entry in record.step_losses] == [(1, 1, 0.5)]
    assert {series.seed_id: series.points for series in record.alphas} == {
        ("a", 0): ((1, 0.1), (2, 0.3)),
        ("b", 1): ((1, 0.2),),
    }
    assert record.epochs == (EPOCH,)
    assert record.lifecycle == (edge,)
    assert record.field_reports == (field_report(),)


def test_a_kernel_is_listed_once_with_its_latest_report(recorder):
    pending, judged = kernel("gated", report=False), kernel("gated")
    recorder.add_kernel(pending.kernel)
    recorder.add_kernel(judged.kernel, judged.report)
    assert recorder.record().kernels == (judged,)


def test_a_running_record_is_a_snapshot(recorder):
    before = recorder.record()
    recorder.add_step(1, 1, 0.5)
    assert before.step_losses == ()
    assert not before.finished
    assert recorder.record().duration_s > before.duration_s


def test_finishing_stops_the_clock(recorder):
    layer = LayerSummary(
        fqn="a", type="Linear", output_shape=(None, 2), channels=2, host_parameters=10
    )
    row = ResultRow(label="grown", parameters=10, grown=True)
    recorder.finish(after=[layer], results=[row], audit_head="0" * 64)
    record = recorder.record()
    assert record.finished
    assert (record.after, record.results, record.audit_head) == ((layer,), (row,), "0" * 64)
    assert recorder.record() == record


def test_what_follows_training_does_not_count_as_its_duration(recorder):
    recorder.stop_clock()
    trained = recorder.record()
    assert not trained.finished
    recorder.finish(interrupted=True)
    record = recorder.record()
    assert record.duration_s == trained.duration_s
    assert (record.finished, record.interrupted) == (False, True)


def test_appends_from_two_threads_are_all_kept(recorder):
    def feed(seed: int) -> None:
        for step in range(2000):
            recorder.add_step(step, 1, 0.0)
            recorder.add_alphas(step, {("a", seed): 0.5})

    threads = [threading.Thread(target=feed, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        recorder.record()
    record = recorder.record()
    assert len(record.step_losses) == 4000
    assert [len(series.points) for series in record.alphas] == [2000, 2000]
