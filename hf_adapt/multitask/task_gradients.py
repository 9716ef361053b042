"""The gradient of each task over a whole step of the optimizer, and what is made of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from hf_adapt.engine.gradients import loss_scale

if TYPE_CHECKING:
    from transformers import Trainer

Surgery = Callable[[torch.Tensor], torch.Tensor]
"""Makes one direction (P,) of the gradients (K, P) of the tasks."""


class TaskGradients:
    """Adds up the gradients of several losses, apart from one another, over a step.

    Args:
        parameters: The weights that the tasks share.
        number: K.

    Attributes:
        sums: (K, P) float32: of the micro-batches of the step so far.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], number: int) -> None:
        self.parameters = list(parameters)
        sizes = [p.numel() for p in self.parameters]
        self.sums = torch.zeros(number, sum(sizes), device=self.parameters[0].device)
        self._places = [
            slice(stop - size, stop)
            for size, stop in zip(sizes, torch.tensor(sizes).cumsum(0).tolist(), strict=True)
        ]

    def reset(self) -> None:
        """A step begins."""
        self.sums.zero_()

    def add(
        self,
        trainer: Trainer,
        losses: Sequence[torch.Tensor],
        others: Sequence[nn.Parameter] = (),
        keeps_graph: bool = False,
    ) -> torch.Tensor:
        """Add a micro-batch's.

        Under fp16 the losses are scaled for the way back, as the Trainer's own is.

        Args:
            trainer: The Trainer.
            losses: The loss of each task, of which some may have no gradient.
            others: Further weights, whose gradients are not kept apart.
            keeps_graph: Whether there will be another backward.

        Returns:
            A number whose gradient at the `others` is that of the losses.
        """
        scale = loss_scale(trainer) or 1.0
        surrogate = torch.zeros((), device=self.sums.device)
        # A schedule may freeze some of them for a while.
        pairs = zip(self.parameters, self._places, strict=True)
        shared = [(weight, place) for weight, place in pairs if weight.requires_grad]
        others = [weight for weight in others if weight.requires_grad]
        trained = [k for k, loss in enumerate(losses) if loss.requires_grad]
        for k in trained:
            found = torch.autograd.grad(
                losses[k] * scale,
                [*(weight for weight, _ in shared), *others],
                retain_graph=keeps_graph or k != trained[-1],
                allow_unused=True,
            )
            for (weight, place), gradient in zip(shared, found, strict=False):
                if gradient is not None:  # it may be transposed: a view of the sum costs no copy
                    self.sums[k, place].view_as(weight).add_(gradient, alpha=1 / scale)
            for weight, gradient in zip(others, found[len(shared) :], strict=True):
                if gradient is not None:
                    surrogate = surrogate + (weight * (gradient / scale)).sum()
        return surrogate

    def averaged(self, trainer: Trainer) -> torch.Tensor:
        """(K, P), averaged over the processes as DDP averages gradients."""
        if trainer.accelerator.num_processes == 1:
            return self.sums
        reduced: torch.Tensor = trainer.accelerator.reduce(self.sums, reduction="mean")
        return reduced

    def split(self, direction: torch.Tensor) -> list[torch.Tensor]:
        """A vector (P,) as tensors of the weights' shapes."""
        pairs = zip(self.parameters, self._places, strict=True)
        return [direction[place].view_as(weight) for weight, place in pairs]

    @torch.no_grad()
    def write(self, direction: torch.Tensor) -> None:
        """Add a direction to the weights' gradients."""
        for weight, given in zip(self.parameters, self.split(direction), strict=True):
            if not weight.requires_grad:
                continue
            given = given.to(weight.dtype)
            weight.grad = given.clone() if weight.grad is None else weight.grad + given

    def of(self, gradients: torch.Tensor, weights: Sequence[nn.Parameter]) -> torch.Tensor:
        """The columns of (K, P) that belong to some of the weights."""
        wanted = {id(weight) for weight in weights}
        pairs = zip(self.parameters, self._places, strict=True)
        found = [gradients[:, place] for weight, place in pairs if id(weight) in wanted]
        return torch.cat(found, 1) if found else gradients[:, :0]
