"""Which steps are observed: one in N, from the watching of the layers to the snapshot's reader."""

import logging
import sys
from typing import TYPE_CHECKING, Any

import esper.kasmina.morph as morph
from esper.kasmina.observation import Observation
from esper.kasmina.uncompiled import Uncompiled

if TYPE_CHECKING:
    from esper.kasmina.execution import Kasmina

logger = logging.getLogger(__name__)

NEVER = 2**62


class ObservedSteps:
    """Has all layers watched on the steps that are due. Training thread, between two steps.

    ``kasmina.observing`` and ``kasmina.next_due`` are written here. Attribute: ``last``, the step
    that was observed last.
    """

    def __init__(self, kasmina: "Kasmina"):
        self._kasmina = kasmina
        self._uncompiled = Uncompiled()
        self.last = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> "ObservedSteps":
        """Return the schedule of a copied model, which is not observed yet."""
        twin = ObservedSteps(memo[id(self._kasmina)])
        twin.last = self.last
        return twin

    def begin(self) -> None:
        """Have the layers watched if it is time."""
        kasmina = self._kasmina
        if kasmina.step_count < kasmina.next_due or not kasmina.settings.telemetry_enabled:
            return
        kasmina.bank.reset_health()
        self.last = kasmina.step_count
        kasmina.next_due = kasmina.step_count + 1  # the step that ends the observation
        self.watch()
        if "torch._dynamo" in sys.modules:  # somebody may compile
            self._uncompiled.begin()

    def end(self) -> None:
        """Leave the layers alone if they are watched, and have what they showed copied."""
        kasmina = self._kasmina
        if not kasmina.observing:
            return
        self.release()
        if kasmina.emit_observation is None:
            kasmina.next_due = self.last + kasmina.settings.observe_every
        else:
            kasmina.bank.begin_snapshot()

    def hand_out_snapshot(self) -> None:
        """Pass a completed snapshot on; while one is on its way, look again at the next step."""
        kasmina = self._kasmina
        if kasmina.step_count < kasmina.next_due or not kasmina.bank.snapshot_pending:
            return
        snapshot = kasmina.bank.take_snapshot()
        if snapshot is None:
            kasmina.next_due = kasmina.step_count + 1
            return
        kasmina.next_due = self.last + kasmina.settings.observe_every
        if kasmina.emit_observation is not None:
            watched = tuple((layer, layer.observer.timer) for layer in kasmina.layers.values())
            observation = Observation(
                snapshot, watched, kasmina.epoch, self.last, kasmina.step_count
            )
            try:
                kasmina.emit_observation(observation)
            except Exception:
                logger.exception("the observation of step %d was not delivered", observation.step)

    def watch(self) -> None:
        """Have every layer report its forwards; :meth:`release` ends it."""
        kasmina = self._kasmina
        kasmina.observing = True
        morph.watch(kasmina.hosts(), [layer.observer for layer in kasmina.layers.values()])

    def release(self) -> None:
        """Give every layer the class that it has when it is not observed."""
        self._kasmina.observing = False
        self._uncompiled.end()
        morph.unwatch(self._kasmina.hosts())
