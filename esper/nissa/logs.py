"""A run in the log, by the standard library's ``logging``; the program says where it goes.

Esper's loggers are named ``esper`` and below, and have no handler of their own.
"""

import json
import logging
from datetime import UTC, datetime

from esper.contracts import (
    EpochEvent,
    FieldReport,
    KernelCharacterized,
    LifecycleEvent,
    OonaMessage,
)
from esper.nissa.formats import loss, plural, seed_label

logger = logging.getLogger("esper.events")


def log_events(message: OonaMessage) -> None:
    """Log what happens in a run, at INFO: a listener for :class:`esper.Pipeline`.

    Each record has the whole event as plain data in its attribute ``event``, and the id that ties
    it to other messages in ``trace_id``.
    """
    if not logger.isEnabledFor(logging.INFO):
        return
    text = _text(message)
    if text:
        event = message.payload.model_dump(mode="json")
        logger.info(text, extra={"event": event, "trace_id": message.trace_id})


class JsonFormatter(logging.Formatter):
    """One JSON object a line: ``time`` (UTC), ``level``, ``logger``, ``message``.

    ``event`` and ``trace_id`` follow in the records of :func:`log_events`, ``exception`` where there
    is one.
    """

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {key: vars(record)[key] for key in ("event", "trace_id") if key in vars(record)}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def _text(message: OonaMessage) -> str:
    payload = message.payload
    match payload:
        case LifecycleEvent():
            edge = f"{payload.source.name} > {payload.target.name}"
            return f"{seed_label(payload.seed_id)}: {edge} ({payload.reason})"
        case EpochEvent():
            losses = f"training loss {loss(payload.train_loss)}, held-out {loss(payload.val_loss)}"
            return f"epoch {payload.epoch}: {losses}"
        case FieldReport():
            cost = plural(payload.num_parameters, "parameter")
            return f"{seed_label(payload.seed_id)}: {payload.outcome}, {cost} ({payload.reason})"
        case KernelCharacterized():
            return f"kernel {payload.artifact_id[:12]}: {payload.status}"
        case _:
            return ""
