"""Kernels' parameters in the user's optimizer: they join it when seated and leave it when culled."""

from typing import Any

import torch
from torch import nn

from esper.kasmina.seat import Seat


class Enrollment:
    """The user's optimizer, and the options of groups of their own for seeds, if there are any."""

    def __init__(self, optimizer: torch.optim.Optimizer, group_options: dict[str, Any]):
        self.optimizer = optimizer
        self.group_options = group_options

    def enroll(self, host: nn.Module, seat: Seat) -> None:
        """Add a seat's parameters, if they are not there yet."""
        groups = self.optimizer.param_groups
        known = {id(parameter) for group in groups for parameter in group["params"]}
        weights = [weight for weight in seat.parameters() if id(weight) not in known]
        if not weights:
            return
        if self.group_options:
            self.optimizer.add_param_group({"params": weights, **self.group_options})
            return
        # Into a group that is there already, which the user's scheduler knows.
        own = {id(parameter) for parameter in host.parameters(recurse=False)}
        homes = [g for g in groups if any(id(parameter) in own for parameter in g["params"])]
        (homes or groups)[0]["params"].extend(weights)

    def dismiss(self, seat: Seat) -> None:
        """Remove a seat's parameters with their state, and a group that held nothing else."""
        ids = {id(parameter) for parameter in seat.parameters()}
        emptied = []
        for group in self.optimizer.param_groups:
            leaving = [parameter for parameter in group["params"] if id(parameter) in ids]
            for parameter in leaving:
                self.optimizer.state.pop(parameter, None)
            group["params"] = [p for p in group["params"] if id(p) not in ids]
            if leaving and not group["params"]:
                emptied.append(id(group))
        remaining = [g for g in self.optimizer.param_groups if id(g) not in emptied]
        self.optimizer.param_groups[:] = remaining
