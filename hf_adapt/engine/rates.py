"""Learning rates of parts of the model, for the length of one optimizer step.

The optimizer's groups and the scheduler stay what the Trainer made them, so a checkpoint holds
what a plain Trainer's does. Only while the optimizer steps is each group divided by the factors of
its parameters; those of factor 0 are taken out, so that no optimizer, whatever it does to
parameters without a gradient (decay, momentum), can move them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from hf_adapt.engine.mixins import LrMultipliers


class DividedGroups:
    """The optimizer's groups, divided by learning-rate factors between `apply` and `restore`."""

    def __init__(self) -> None:
        self._optimizer: Any = None
        self._groups: list[dict[str, Any]] = []
        self._parts: list[tuple[dict[str, Any], dict[str, Any]]] = []

    def apply(self, optimizer: torch.optim.Optimizer, factors: Iterable[LrMultipliers]) -> None:
        """Divide the groups; factors of several adaptations on one parameter multiply."""
        combined: dict[nn.Parameter, float] = {}
        for each in factors:
            for parameter, factor in each.items():
                combined[parameter] = combined.get(parameter, 1.0) * factor
        if not combined:
            return
        self._optimizer, self._groups, self._parts = optimizer, optimizer.param_groups, []
        divided = []
        for group in self._groups:
            parts: dict[float, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                parts.setdefault(combined.get(parameter, 1.0), []).append(parameter)
            if set(parts) <= {1.0}:
                divided.append(group)
                continue
            for factor, parameters in parts.items():
                if factor != 0:
                    part = {**group, "params": parameters, "lr": group["lr"] * factor}
                    divided.append(part)
                    self._parts.append((group, part))
        optimizer.param_groups = divided

    def restore(self) -> None:
        """Put the groups back as they were."""
        if self._optimizer is None:
            return
        self._optimizer.param_groups = self._groups
        done: set[int] = set()
        for group, part in self._parts:
            if id(group) not in done:  # what an optimizer counts per group, not per parameter
                done.add(id(group))
                group.update({k: v for k, v in part.items() if k not in ("params", "lr")})
        self._optimizer, self._groups, self._parts = None, [], []
