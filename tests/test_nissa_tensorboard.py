"""TensorBoard: what its own reader finds in the event files."""

import pytest
from nissa_sample import EPOCH, field_report, sample_record

from esper.contracts import OonaMessage, Topic
from esper.nissa.tensorboard import TensorBoardWriter

tensorboard = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


@pytest.fixture
def events(tmp_path):
    record = sample_record()
    evaluation = field_report().evaluation
    payloads = [(Topic.EPOCH, EPOCH.model_copy(update={"evaluations": (evaluation,)}))]
    payloads += [(Topic.LIFECYCLE, event) for event in record.lifecycle]
    payloads += [(Topic.FIELD_REPORTS, report) for report in record.field_reports]
    with TensorBoardWriter(tmp_path) as writer:
        for topic, payload in payloads:
            writer(OonaMessage(topic=topic, sender_id="test", payload=payload))
    accumulator = tensorboard.EventAccumulator(str(tmp_path))
    accumulator.Reload()
    return accumulator


def test_losses_and_contributions_stand_at_their_step(events):
    for tag, value in (
        ("loss/training", 0.5),
        ("loss/validation", 0.6),
        ("accuracy/validation", 0.875),
        ("contribution/layers.2 seed 0", 0.162),
    ):
        (scalar,) = events.Scalars(tag)
        assert (scalar.step, scalar.value) == (40, pytest.approx(value))


def test_a_seeds_life_is_a_curve_and_a_text(events):
    lived = [e for e in sample_record().lifecycle if e.seed_id == ("layers.2", 0)]
    curve = events.Scalars("state/layers.2 seed 0")
    assert [(p.step, p.value) for p in curve] == [(e.step, e.target.value) for e in lived]
    texts = [
        text.tensor_proto.string_val[0].decode()
        for text in events.Tensors("seeds/layers.2 seed 0/text_summary")
    ]
    assert any("lowers the held-out loss by 0.1620" in text for text in texts)
