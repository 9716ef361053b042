"""The last layer of a classifier."""

from __future__ import annotations

from torch import nn


def last_linear(model: nn.Module, method: str) -> nn.Linear:
    """The linear layer that gives a classifier's scores.

    Raises:
        ValueError: If there is none.
    """
    classes = getattr(getattr(model, "config", None), "num_labels", None)
    layers = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == classes]
    if not layers:
        raise ValueError(
            f"{method} needs a head that ends in a linear layer; this {type(model).__name__} has "
            f"none of {classes} classes."
        )
    return layers[-1]
