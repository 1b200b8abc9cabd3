"""Logs: quiet until a program asks, and plain data when it does."""

import json
import logging
import subprocess
import sys

import pytest
from nissa_sample import EPOCH, field_report, kernel, sample_record

from esper.contracts import HealthBatch, KernelCharacterized, KernelStatus, OonaMessage, Topic
from esper.nissa.logs import JsonFormatter, log_events


def said(topic, payload):
    return OonaMessage(topic=topic, sender_id="test", payload=payload)


def test_the_library_is_quiet_and_configures_nothing():
    code = """
import logging, sys
before = (logging.root.level, list(logging.root.handlers))
import esper, esper.pipeline, esper.nissa, esper.cli
logging.getLogger("esper.kasmina").error("not to be seen")
assert before == (logging.root.level, list(logging.root.handlers))
ours = [logging.getLogger(n) for n in logging.root.manager.loggerDict if n.startswith("esper")]
assert {type(h) for logger in ours for h in logger.handlers} == {logging.NullHandler}
assert all(logger.level == logging.NOTSET and logger.propagate for logger in ours)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("topic", "payload", "text"),
    [
        (Topic.EPOCH, EPOCH, "epoch 1: training loss 0.5000, held-out 0.6000"),
        (
            Topic.LIFECYCLE,
            sample_record().lifecycle[0],
            "layers.2 seed 0: DORMANT > GERMINATED (",
        ),
        (Topic.FIELD_REPORTS, field_report(), "layers.2 seed 0: FOSSILIZED, 352 parameters ("),
        (
            Topic.KERNEL_CHARACTERIZED,
            KernelCharacterized(
                artifact_id=kernel("gated").kernel.artifact_id, status=KernelStatus.VALIDATED
            ),
            ": VALIDATED",
        ),
    ],
)
def test_an_event_is_a_line_with_its_data(topic, payload, text, caplog):
    caplog.set_level(logging.INFO, "esper")
    message = said(topic, payload)
    log_events(message)
    (record,) = caplog.records
    line = json.loads(JsonFormatter().format(record))
    assert text in line["message"]
    assert (line["level"], line["logger"]) == ("INFO", "esper.events")
    assert line["trace_id"] == message.trace_id
    assert type(payload).model_validate(line["event"]) == payload


def test_other_messages_say_nothing(caplog):
    caplog.set_level(logging.INFO, "esper")
    log_events(said(Topic.SEED_HEALTH, HealthBatch(signals=())))
    assert not caplog.records


def test_an_exception_stays_in_its_line():
    error = ValueError("two\nlines")
    record = logging.LogRecord(
        "esper.x", 40, "", 0, "it %s", ("failed",), (ValueError, error, None)
    )
    text = JsonFormatter().format(record)
    assert "\n" not in text
    line = json.loads(text)
    assert line["message"] == "it failed"
    assert line["exception"].endswith("ValueError: two\nlines")
    assert line["time"].endswith("+00:00")
