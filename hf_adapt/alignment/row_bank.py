"""A memory of the target's rows, found again by their content."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from hf_adapt.alignment.priors import PriorObjective
from hf_adapt.engine.progress import Schedule
from hf_adapt.engine.streams import TARGET
from hf_adapt.models.pooling import Pooling

if TYPE_CHECKING:
    from transformers import Trainer


class RowBank:
    """Values of rows (or tokens) that are found by their keys.

    Everything stays on the device of the keys, and looking up needs no synchronisation.

    Attributes:
        keys: (N,) long, sorted.
        values: Tensors with one entry per key.

    Example:
        >>> bank = RowBank()
        >>> bank.fill(torch.tensor([7, 3, 7]), label=torch.tensor([1, 0, 1]))
        >>> places, known = bank.find(torch.tensor([3, 5, 7]))
        >>> bank.values["label"][places[known]].tolist(), known.tolist()
        ([0, 1], [True, False, True])
    """

    def __init__(self) -> None:
        self.keys = torch.zeros(0, dtype=torch.long)
        self.values: dict[str, torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self.keys)

    def fill(self, keys: torch.Tensor, **values: torch.Tensor) -> None:
        """Replace all that it has; of equal keys one is kept."""
        order = torch.argsort(keys, stable=True)
        keys = keys[order]
        first = torch.ones_like(keys, dtype=torch.bool)
        first[1:] = keys[1:] != keys[:-1]
        self.keys = keys[first]
        self.values = {name: value[order][first] for name, value in values.items()}

    def find(self, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Where these keys are, and which are known, both (M,); an unknown one has place 0."""
        if not len(self):
            return torch.zeros_like(keys), torch.zeros_like(keys, dtype=torch.bool)
        places = torch.searchsorted(self.keys, keys).clamp_max(len(self) - 1)
        known = self.keys[places] == keys
        return places * known, known

    def to(self, device: torch.device) -> None:
        """Move everything to a device."""
        self.keys = self.keys.to(device)
        self.values = {name: value.to(device) for name, value in self.values.items()}

    def state_dict(self) -> dict[str, Any]:
        """What it has, on the CPU."""
        return {"keys": self.keys.cpu(), **{n: v.cpu() for n, v in self.values.items()}}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restore the state returned by `state_dict`."""
        self.keys = state["keys"]
        self.values = {name: value for name, value in state.items() if name != "keys"}


class RowBankObjective(PriorObjective):
    """Remembers something of every row of a stream; the memory lies in the checkpoint.

    Attributes:
        bank: The memory; empty until it is filled between two steps.
        remembered_stream: Whose rows it remembers.
    """

    remembered_stream = TARGET

    def __init__(
        self,
        weight: float | Schedule = 1.0,
        feature_layer: str | None = None,
        pooling: Pooling = "auto",
        name: str | None = None,
    ) -> None:
        super().__init__(weight, feature_layer, pooling, name)
        self.bank = RowBank()

    def setup(self, trainer: Trainer) -> None:
        """Refuse rows that cannot be found again; forget those of an earlier run."""
        super().setup(trainer)
        self._trainer.check_sweep(self.remembered_stream)
        self.bank = RowBank()

    def before_step(self, step: int) -> None:
        """Have the memory on the device of the run, also after resuming."""
        super().before_step(step)
        self.bank.to(self._trainer.args.device)

    def fill_bank(self, keys: torch.Tensor, **values: torch.Tensor) -> None:
        """Replace all that is remembered."""
        self.bank.fill(keys, **values)
        self.bank.to(self._trainer.args.device)

    def labels_of(self, keys: torch.Tensor) -> torch.Tensor:
        """The remembered label of each item, (N,) long; -1 where there is none."""
        if not len(self.bank):
            return torch.full_like(keys, -1)
        places, known = self.bank.find(keys.to(self.bank.keys.device))
        return torch.where(known, self.bank.values["label"][places], -1).to(keys.device)

    def state_dict(self) -> dict[str, Any]:
        """The memory and the class frequencies."""
        return {**super().state_dict(), "bank": self.bank.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state returned by `state_dict`."""
        super().load_state_dict(state)
        if "bank" in state:
            self.bank.load_state_dict(state["bank"])
