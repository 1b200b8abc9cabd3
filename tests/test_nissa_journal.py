"""The journal: what it says at any moment is what the recorder knew, also after a kill."""

import math

import pytest
from nissa_sample import EPOCH, KEPT, field_report, kernel, sample_record

from esper.nissa.journal import FINAL_RECORD, JOURNAL, Journal, JournalReader
from esper.nissa.record import RunRecord, RunRecorder


@pytest.fixture
def recorder() -> RunRecorder:
    before = sample_record().before
    return RunRecorder(
        *("run",), network="4-2", command="train", seed=1, machine="here", torch_version="2.13",
        before=before,
    )  # fmt: skip


def feed(recorder: RunRecorder) -> None:
    recorder.add_step(1, 1, math.nan)
    recorder.add_alphas(1, {KEPT: 0.5, ("b", 1): 0.25})
    recorder.add_epoch(EPOCH.model_copy(update={"val_loss": math.inf}))
    for event in sample_record().lifecycle:
        recorder.add_lifecycle(event)
    recorder.add_kernel(kernel("gated", report=False).kernel)
    recorder.add_kernel(kernel("gated").kernel, kernel("gated").report)
    recorder.add_field_report(field_report())


def without_clock(record: RunRecord) -> str:
    return record.model_copy(update={"duration_s": 0.0}).to_json()


def test_a_reader_sees_all_that_was_recorded(recorder, tmp_path):
    with Journal(recorder, tmp_path):
        feed(recorder)
    read = JournalReader(tmp_path).record()
    assert without_clock(read) == without_clock(recorder.record())
    assert 0 < read.duration_s <= recorder.record().duration_s


def test_a_reader_follows_and_takes_whole_lines_only(recorder, tmp_path):
    with Journal(recorder, tmp_path):
        feed(recorder)
    whole = (tmp_path / JOURNAL).read_bytes()
    partial = tmp_path / "partial"
    partial.mkdir()
    reader = JournalReader(partial)
    assert reader.record() is None
    seen = []
    for end in range(0, len(whole), 97):
        (partial / JOURNAL).write_bytes(whole[:end])
        record = reader.record()
        seen.append(len(record.lifecycle) if record else -1)
    assert seen == sorted(seen)
    (partial / JOURNAL).write_bytes(whole)
    assert without_clock(reader.record()) == without_clock(recorder.record())


def test_news_are_written_while_the_run_goes_on(recorder, tmp_path):
    written = []

    class Watched(Journal):
        def _append_news(self, file):
            super()._append_news(file)
            written.append(JournalReader(tmp_path).record())
            recorder.add_step(len(written), 1, 0.5)
            self._ended.set() if len(written) == 3 else None

    with Watched(recorder, tmp_path, interval_s=0.0) as journal:
        journal._thread.join()
    assert [len(record.step_losses) for record in written] == [0, 1, 2, 3]


def test_a_final_record_takes_the_journals_place(recorder, tmp_path):
    with Journal(recorder, tmp_path):
        feed(recorder)
    (tmp_path / FINAL_RECORD).write_text(sample_record().to_json())
    assert JournalReader(tmp_path).record() == sample_record()


def test_a_disk_that_refuses_ends_the_journal_and_not_the_run(recorder, tmp_path, caplog):
    with Journal(recorder, tmp_path / "missing"):
        feed(recorder)
    assert "the run's journal ends here, and the run goes on" in caplog.text
