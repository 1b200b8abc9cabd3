"""Commands from outside: each is obeyed once, if what it was decided on still holds, or refused."""

import logging
from collections import OrderedDict
from collections.abc import Iterable
from typing import TYPE_CHECKING

from esper.contracts import CommandKind, KasminaControlCommand
from esper.errors import EsperError
from esper.kasmina.layer import KasminaLayer

if TYPE_CHECKING:
    from esper.kasmina.execution import Kasmina

logger = logging.getLogger(__name__)

_REMEMBERED = 4096  # ids kept so that a command delivered twice is obeyed once


class Commands:
    """Carries commands out between two steps. Training thread."""

    def __init__(self, kasmina: "Kasmina"):
        self._kasmina = kasmina
        self._obeyed: OrderedDict[str, None] = OrderedDict()

    def obeyed(self) -> tuple[str, ...]:
        """Return the ids of the last commands that were carried out or refused."""
        return tuple(self._obeyed)

    def remember(self, command_ids: Iterable[str]) -> None:
        """Take these, and no others, for obeyed."""
        self._obeyed = OrderedDict.fromkeys(command_ids)

    def obey(self, command: KasminaControlCommand) -> None:
        """Carry a command out, unless that was done already, or refuse it."""
        if command.command_id in self._obeyed:
            return
        self._obeyed[command.command_id] = None
        if len(self._obeyed) > _REMEMBERED:
            self._obeyed.popitem(last=False)
        try:
            self._carry_out(command)
        except (EsperError, ValueError) as error:
            self._refuse(command, error)

    def _refuse(self, command: KasminaControlCommand, error: Exception) -> None:
        """Say so in the log, and to whoever sent it by an event that leads from a state to itself."""
        logger.warning("command %s %s refused: %s", command.kind, command.command_id, error)
        layer = self._kasmina.layers.get(command.layer_name)
        if layer is not None and command.seed_idx < layer.num_seeds:
            state = layer.state(command.seed_idx)
            reason = f"{command.kind} refused: {error}"
            self._kasmina.emit(layer, command.seed_idx, state, state, reason, command.artifact_id)

    def _carry_out(self, command: KasminaControlCommand) -> None:
        layer = self._kasmina.layer(command.layer_name)
        layer.check_seed(command.seed_idx)
        self._check_current(command, layer)
        if command.kind is CommandKind.GERMINATE:
            assert command.artifact_id is not None
            layer.request_germination(
                command.seed_idx, command.artifact_id, command.strategy, reason=command.reason
            )
        elif command.kind is CommandKind.KEEP:
            layer.keep(command.seed_idx, command.reason)
        elif command.kind is CommandKind.CULL:
            layer.cull(command.seed_idx, command.reason)
        else:
            layer.roll_back(command.seed_idx, command.reason)

    def _check_current(self, command: KasminaControlCommand, layer: KasminaLayer) -> None:
        """Raise :class:`EsperError` for a command that what has happened since has overtaken."""
        last, epoch = command.valid_until_epoch, self._kasmina.epoch
        if last is not None and epoch > last:
            raise EsperError(
                f"stale: decided on epoch {command.epoch} and valid until epoch {last}, but it is "
                f"epoch {epoch}"
            )
        if command.kind is CommandKind.GERMINATE or command.artifact_id is None:
            return
        tenancy = self._kasmina.tenancies.get((layer.name, command.seed_idx))
        present = None if tenancy is None else tenancy.artifact_id
        if present != command.artifact_id:
            raise EsperError(
                f"stale: meant for kernel {command.artifact_id}, but {present} is at "
                f"{layer.seed_name(command.seed_idx)}"
            )
