"""A run of one's own: recorded live, closed at the end, never written over."""

import pytest
import torch
from nissa_sample import EPOCH
from torch import nn

import esper
from esper.contracts import OonaMessage, Topic
from esper.nissa import Run
from esper.nissa.journal import JournalReader
from esper.nissa.record import RunRecord


@pytest.fixture
def model():
    model = esper.wrap(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)))
    model(torch.zeros(1, 4))
    return model


def record(folder):
    return RunRecord.from_json((folder / "run.json").read_text())


def say(run, step):
    event = EPOCH.model_copy(update={"step": step})
    run(OonaMessage(topic=Topic.EPOCH, sender_id="test", payload=event))
    return event


def test_a_run_leaves_its_record_and_report(model, tmp_path):
    folder = tmp_path / "runs" / "mine"
    with Run(model, folder, network="4-4-2") as run:
        event = say(run, 40)
    kept = record(folder)
    assert (kept.name, kept.network, kept.finished) == ("mine", "4-4-2", True)
    assert kept.epochs == (event,)
    assert [layer.fqn for layer in kept.before] == ["0", "1", "2"] == [x.fqn for x in kept.after]
    assert "4-4-2 trained for 1 epoch as it was" in (folder / "report.html").read_text()


def test_an_epoch_counts_once_whoever_tells_of_it_first(model, tmp_path):
    with Run(model, tmp_path) as run:
        first = say(run, 40)
        run.on_epoch(first, [0.1] * 40)
        second = EPOCH.model_copy(update={"step": 80})
        run.on_epoch(second, [0.1] * 40)
        say(run, 80)
    assert [epoch.step for epoch in record(tmp_path).epochs] == [40, 80]
    assert [entry.step for entry in record(tmp_path).step_losses] == list(range(1, 81))


def test_an_exception_marks_the_run_and_goes_on(model, tmp_path):
    def train():
        with Run(model, tmp_path) as run:
            say(run, 40)
            raise RuntimeError("the loop broke")

    with pytest.raises(RuntimeError, match="the loop broke"):
        train()
    assert (record(tmp_path).finished, record(tmp_path).interrupted) == (False, True)


def test_a_run_is_never_written_over(model, tmp_path):
    with Run(model, tmp_path):
        pass
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(FileExistsError, match=r"holds a run already: journal\.jsonl"):
        Run(model, tmp_path)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_a_pipeline_tells_it_of_its_epochs(model, tmp_path):
    def loss(output, target):
        return nn.functional.cross_entropy(output, target, reduction="none")

    held_out = [(torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64))]
    heard = []
    with Run(model, tmp_path / "run") as run:
        listeners = [lambda message: 1 / 0, run, heard.append]
        library = tmp_path / "library"
        with esper.Pipeline(model, library, listener=listeners, local_workers=False) as pipeline:
            event = pipeline.end_epoch(held_out, loss, train_loss=1.0)
            pipeline.drain()
    assert record(tmp_path / "run").epochs == (event,)
    assert [message.payload for message in heard] == [event]


def test_what_was_recorded_can_be_read_while_it_goes_on(model, tmp_path):
    with Run(model, tmp_path) as run:
        say(run, 40)
        run._journal._ended.set()  # as at the end: write now
        run._journal._thread.join()
        live = JournalReader(tmp_path).record()
        assert (len(live.epochs), live.finished) == (1, False)
