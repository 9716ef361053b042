"""Averaged weights, swapped in for evaluation and for the final model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from hf_adapt.engine.mixins import WeightAverage

if TYPE_CHECKING:
    from transformers import Trainer


class SwappedWeights:
    """Gives a model the weights of a [`WeightAverage`] for a while, or for good.

    Args:
        model: The unwrapped model.
        average: The adaptation that keeps them, or None.
    """

    def __init__(self, model: nn.Module, average: WeightAverage | None) -> None:
        self.model = model
        self.average = average
        self._is_swapped = False

    def check(self, trainer: Trainer) -> None:
        """Refuse what would mix the weights of two steps.

        Raises:
            ValueError: If the best checkpoint's weights would be replaced by the last average.
        """
        best = trainer.args.load_best_model_at_end
        if self.average is not None and self.average.replaces_final and best:
            raise ValueError(
                f"{self.average.name} replaces the final weights by their average, and "
                "load_best_model_at_end=True by those of the best checkpoint. Drop one of them."
            )

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """The model has the averaged weights while the context is open, then its own again."""
        if self.average is None or self._is_swapped:
            yield
            return
        self._is_swapped = True
        try:
            with swapped(self.model, self.average.averaged_weights()):
                yield
        finally:
            self._is_swapped = False

    def replace_final(self) -> None:
        """Give the model the averaged weights for good, if that was asked for.

        Evaluations see the final weights from here on, whichever these are.
        """
        if self.average is not None and self.average.replaces_final:
            _write(self.model, self.average.averaged_weights())
        self.average = None


@contextmanager
def swapped(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """The model has these weights while the context is open, then its own again.

    Raises:
        ValueError: If it has no weights of these names.
    """
    own = {name: value.clone() for name, value in _tensors(model, weights).items()}
    _write(model, weights)
    try:
        yield
    finally:
        _write(model, own)


def _tensors(model: nn.Module, names: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    own = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    if unknown := sorted(set(names) - set(own)):
        raise ValueError(
            f"An average has weights that the model does not: {', '.join(unknown[:5])}."
        )
    return {name: own[name] for name in names}


def _write(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, value in _tensors(model, weights).items():
            value.copy_(weights[name])
