"""The weights that train, and those that LoRA adapters change."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_adapt.models.groups import matches
from hf_adapt.models.structure import has_adapters


@dataclass(frozen=True, eq=False)
class AdaptedWeight:
    """A frozen weight W with a LoRA adapter: the model computes with W + scaling · B A.

    Attributes:
        name: The name of W among the model's parameters.
        weight: W.
        a: The factor A, (r, in).
        b: The factor B, (out, r).
        scaling: The adapter's scaling (alpha / r, or alpha / sqrt(r) of rsLoRA).
        is_transposed: Whether W is stored as (in, out).
    """

    name: str
    weight: nn.Parameter
    a: nn.Parameter
    b: nn.Parameter
    scaling: float
    is_transposed: bool

    def of_change(self, of_weight: torch.Tensor) -> torch.Tensor:
        """A tensor of W's shape as (out, in), the shape of B A."""
        return of_weight.T.contiguous() if self.is_transposed else of_weight


def adapted_weights(model: nn.Module) -> list[AdaptedWeight]:
    """The weights whose LoRA factors train; none where the model has no adapter.

    Raises:
        ValueError: If the adapter is not LoRA, or not on linear layers alone, or a layer trains
            several.
    """
    configs = getattr(model, "peft_config", {}) if has_adapters(model) else {}
    for config in configs.values():
        kind = getattr(config.peft_type, "value", config.peft_type)
        if kind != "LORA":
            raise ValueError(
                f"The model has a {kind} adapter, whose change of the weights is not known here: "
                "only LoRA's is. Use LoRA, or train the weights themselves."
            )
    found = []
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
            found += _of_layer(name, module)
    return found


@dataclass(frozen=True)
class HeldWeights:
    """The weights of a model that train.

    Attributes:
        plain: The parameters that train, without LoRA's factors.
        adapted: The weights that LoRA factors change.
        factors: The factors.
    """

    plain: dict[str, nn.Parameter]
    adapted: list[AdaptedWeight]
    factors: dict[str, nn.Parameter]

    @classmethod
    def of(cls, model: nn.Module, skip: Collection[str] = ()) -> HeldWeights:
        """Those of a model.

        Args:
            model: The unwrapped model.
            skip: Names of modules or parameters, or regular expressions, that are left out.
        """
        adapted = adapted_weights(model)
        ids = {id(factor) for each in adapted for factor in (each.a, each.b)}
        own = {name: p for name, p in model.named_parameters() if p.requires_grad}
        factors = {name: p for name, p in own.items() if id(p) in ids}
        plain = {name: p for name, p in own.items() if name not in factors}
        names = [name for name in (*plain, *(each.name for each in adapted))]
        kept = {name for name in names if not any(matches(pattern, name) for pattern in skip)}
        return cls(plain, adapted, factors).only(kept)

    def only(self, names: Collection[str]) -> HeldWeights:
        """Some of them."""
        adapted = [each for each in self.adapted if each.name in names]
        ids = {id(factor) for each in adapted for factor in (each.a, each.b)}
        factors = {name: p for name, p in self.factors.items() if id(p) in ids}
        plain = {name: p for name, p in self.plain.items() if name in names}
        return HeldWeights(plain, adapted, factors)

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """What an importance is known for: with LoRA, the frozen weights under the adapters."""
        return {**self.plain, **{each.name: each.weight for each in self.adapted}}

    def factors_of(
        self, adapted: AdaptedWeight, values: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The factors A and B of a weight among tensors by name."""
        names = {id(p): name for name, p in self.factors.items()}
        return values[names[id(adapted.a)]], values[names[id(adapted.b)]]

    def now(self) -> dict[str, torch.Tensor]:
        """A copy of what trains: parameters and factors."""
        own = {**self.plain, **self.factors}
        return {name: p.detach().clone() for name, p in own.items()}


def _of_layer(name: str, layer: Any) -> list[AdaptedWeight]:
    factors = [(key, p) for key, p in layer.named_parameters() if "lora_" in key]
    trained = [key for key, p in factors if p.requires_grad and "magnitude" not in key]
    if not trained:
        return []
    linear = {
        adapter
        for adapter, module in layer.lora_A.items()
        if isinstance(module, nn.Linear) and module.weight.requires_grad
    }
    others = [key for key in trained if key.split(".")[1] not in linear]
    if others or len(linear) != 1 or layer.get_base_layer().weight.ndim != 2:
        raise ValueError(
            f"{name} is a {type(layer).__module__}.{type(layer).__name__} that trains "
            f"{', '.join(trained)}: expected one LoRA adapter on a linear layer. Leave this layer "
            "out of target_modules, or train one adapter at a time."
        )
    (adapter,) = linear
    return [
        AdaptedWeight(
            f"{name}.base_layer.weight",
            layer.get_base_layer().weight,
            layer.lora_A[adapter].weight,
            layer.lora_B[adapter].weight,
            float(layer.scaling[adapter]),
            bool(getattr(layer, "fan_in_fan_out", False)),
        )
    ]
