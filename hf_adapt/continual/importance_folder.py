"""An importance of weights, kept in a folder with the weights that it was found at."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from hf_adapt.continual.adapters import HeldWeights
from hf_adapt.storage.text_file import whole_file

FILE = "importance.safetensors"


@dataclass(frozen=True)
class SavedImportance:
    """What a folder holds, or an importance that was given as tensors.

    Attributes:
        importance: A float32 tensor for each weight's name.
        weights: The model's weights that it belongs to: the anchor of the next task.
        key: What tells this file from any other; None without a file.
        origin: Where it is from, for messages.
        unit: What the importance was divided by, so that those of several tasks can be added.
    """

    importance: Mapping[str, torch.Tensor]
    weights: Mapping[str, torch.Tensor] = field(default_factory=dict)
    key: str | None = None
    origin: str = "the given tensors"
    unit: float = 1.0

    @property
    def in_own_units(self) -> dict[str, torch.Tensor]:
        """The importance as it was found."""
        return {name: value * self.unit for name, value in self.importance.items()}

    def named_as(self, own: Mapping[str, torch.Tensor]) -> SavedImportance:
        """The same for a model that has been given adapters since, or whose adapters were merged.

        Args:
            own: The model's weights, by name; those that do not train any more are left out.
        """
        names = {plain_name(name): name for name in own}
        if not any(n not in own and plain_name(n) in names for n in self.importance):
            return self
        importance, weights = (
            {names[plain_name(n)]: v for n, v in each.items() if plain_name(n) in names}
            for each in (self.importance, self.weights)
        )
        return replace(self, importance=importance, weights=weights)

    def check_weights(self, own: Mapping[str, torch.Tensor]) -> None:
        """Refuse the importance of another model than the one that training starts from.

        Args:
            own: The model's weights, by name.

        Raises:
            ValueError: Naming the weights that differ.
        """
        there = {name: value for name, value in self.weights.items() if name in own}
        others = [
            name
            for name, value in there.items()
            if not torch.equal(value.to(own[name]), own[name].detach())
        ]
        if others:
            gap = max(
                float((self.weights[n].to(own[n]).float() - own[n].detach().float()).abs().max())
                for n in others
            )
            raise ValueError(
                f"{self.origin} holds the importance of another model: {len(others)} of "
                f"{len(there)} weights differ from those that training starts from (by up to "
                f"{gap:.2g}), first {', '.join(others[:3])}. Load the model that was trained when "
                "it was saved, or compute the importance for this one."
            )


def save_importance(
    folder: str | Path,
    importance: Mapping[str, torch.Tensor],
    model: nn.Module,
    unit: float = 1.0,
) -> None:
    """Write an importance with the weights that it belongs to, for the training on a next task.

    Args:
        folder: Created if missing.
        importance: A tensor for each weight's name.
        model: The model that it was computed for; a next training starts from these weights.
        unit: What it was divided by ([`normalized`]).
    """
    tensors = {
        f"{kind}.{name}": value.detach().cpu().contiguous()
        for kind, values in (("importance", importance), ("weights", HeldWeights.of(model).now()))
        for name, value in values.items()
    }
    with whole_file(Path(folder) / FILE) as part:
        save_file(
            tensors, part, metadata={"format": "pt", "key": uuid.uuid4().hex, "unit": repr(unit)}
        )


def load_importance(folder: str | Path) -> SavedImportance:
    """Read what [`save_importance`] has written.

    Raises:
        FileNotFoundError: If the folder has no importance.
        ValueError: If the file is something else.
    """
    path = Path(folder)
    path = path if path.is_file() else path / FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no {path}. Pass the folder that Consolidation(save_to=...) or "
            "save_importance wrote."
        )
    found: dict[str, dict[str, torch.Tensor]] = {"importance": {}, "weights": {}}
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            for name in file.keys():
                kind, _, weight = name.partition(".")
                found[kind][weight] = file.get_tensor(name)
    except (SafetensorError, KeyError) as error:
        raise ValueError(
            f"{path} is no importance ({error!r:.80}). Pass the folder that "
            "Consolidation(save_to=...) or save_importance wrote, or let it be written again."
        ) from error
    key, unit = about.get("key", ""), float(about.get("unit", 1.0))
    return SavedImportance(found["importance"], found["weights"], key, str(path), unit)


def plain_name(name: str) -> str:
    """The name of a weight without what LoRA's wrappers put into it."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def check_shapes(
    importance: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor], what: str
) -> None:
    """Refuse an importance that does not fit a model's weights.

    Args:
        importance: A tensor for each weight's name.
        own: The model's weights, by name.
        what: Where it is from, for the message.

    Raises:
        ValueError: If a weight is missing or has another shape, a value is negative or not finite,
            or there is none.
    """
    missing = [name for name in importance if name not in own]
    if missing or not importance:
        raise ValueError(
            f"The importance of {what} is that of another model: it has {len(importance)} weights, "
            f"of which {len(missing)} do not train in this one"
            f"{': ' + ', '.join(missing[:3]) if missing else ''}. This model trains "
            f"{', '.join(list(own)[:3])}, ... If a head was replaced, or a layer frozen, on "
            "purpose: skip=[...] with its name."
        )
    if others := [name for name, value in importance.items() if value.shape != own[name].shape]:
        name = others[0]
        raise ValueError(
            f"The importance of {what} has the shape {tuple(importance[name].shape)} for {name}, "
            f"and the model has {tuple(own[name].shape)}. If this is a new head: skip={others}."
        )
    for name, value in importance.items():
        if not bool((value >= 0).all() & torch.isfinite(value).all()):
            raise ValueError(
                f"The importance of {what} is negative or not finite for {name}: expected numbers "
                ">= 0, as negative ones would push the weight away."
            )
