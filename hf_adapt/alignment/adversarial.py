"""What the adversarial objectives share: the reversed gradient, and the adversary's options."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hf_adapt.engine.adaptation import Objective
from hf_adapt.engine.progress import Schedule, dann_ramp, value_at
from hf_adapt.models.pooling import Pooling

if TYPE_CHECKING:
    from hf_adapt.engine.batch import Batch


class _Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: torch.Tensor, scale: float) -> torch.Tensor:
        ctx.scale = scale
        return features.view_as(features)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return -ctx.scale * gradients[0], None


def reverse_gradient(features: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    r"""The identity in the forward; multiplies the gradient by `-scale` in the backward.

    .. math::
        R(x) = x, \qquad \frac{dR}{dx} = -\lambda I

    Reference:
        Ganin & Lempitsky 2015, "Unsupervised Domain Adaptation by Backpropagation", Eq. 17-18,
        arXiv:1409.7495.

    Args:
        features: Any shape, any floating dtype.
        scale: λ, unitless. 0 cuts the graph, so that the model's gradient is untouched.

    Shape:
        - output: as `features`.

    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> reverse_gradient(x, 0.5).sum().backward()
        >>> x.grad.tolist()
        [-0.5, -0.5]
    """
    if scale == 0:
        return features.detach()
    reversed_: torch.Tensor = _Reversal.apply(features, scale)  # type: ignore[no-untyped-call]
    return reversed_


def perceptron(
    feature_size: int, hidden_sizes: Sequence[int], num_outputs: int, dropout: float = 0.0
) -> nn.Sequential:
    """Linear layers with ReLU and dropout between them; their output is not normalised.

    Args:
        feature_size: Size of the input.
        hidden_sizes: Sizes of the hidden layers; empty for one linear layer.
        num_outputs: Size of the output.
        dropout: Probability of dropout after each hidden layer.

    Shape:
        - input: (N, feature_size); output: (N, num_outputs).
    """
    layers: list[nn.Module] = []
    size = feature_size
    for hidden in hidden_sizes:
        layers += [nn.Linear(size, hidden), nn.ReLU(), nn.Dropout(dropout)]
        size = hidden
    return nn.Sequential(*layers, nn.Linear(size, num_outputs))


class AdversarialObjective(Objective):
    """A game between the model and auxiliary networks, whose gradient is reversed.

    The auxiliary networks learn at full rate from the first step, in an optimizer of their own. The
    model gets their reversed gradient times λ = `weight` · `ramp`(progress).

    Args:
        weight: Peak λ, or a schedule of it; a constant 0 turns the objective off.
        ramp: Factor of λ as a function of progress; None for none.
        feature_layer: Dotted name of the module whose output is aligned; by default the last
            hidden state of the base model.
        pooling: `"mean"`, `"cls"`, `"last"`, `"tokens"`, a callable, or `"auto"`.
        hidden_sizes: Hidden layers of the auxiliary networks.
        dropout: Dropout of the auxiliary networks.
        learning_rate: Their peak learning rate; follows the run's schedule.
        weight_decay: Their weight decay.
        name: Prefix of the logs.

    Raises:
        ValueError: If the weight is negative, a hidden size or the learning rate not positive, or
            dropout outside [0, 1).
    """

    needs_streams = ("target",)

    def __init__(
        self,
        weight: float | Schedule = 0.1,
        ramp: Schedule | None = dann_ramp(),  # noqa: B008 - a pure function
        feature_layer: str | None = None,
        pooling: Pooling = "auto",
        hidden_sizes: Sequence[int] = (256,),
        dropout: float = 0.0,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.0,
        name: str | None = None,
    ) -> None:
        super().__init__(weight, feature_layer, pooling, name)
        if not all(size > 0 for size in hidden_sizes):
            raise ValueError(f"hidden_sizes={tuple(hidden_sizes)}: every size must be positive.")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout={dropout} must lie in [0, 1).")
        if not learning_rate > 0:
            raise ValueError(
                f"learning_rate={learning_rate} must be positive: an adversary that does not "
                "learn gives the model a random direction."
            )
        self.ramp = ramp
        self.hidden_sizes = tuple(hidden_sizes)
        self.dropout = dropout
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay

    def term_weight(self, progress: float) -> float:
        """1: λ acts in the reversal, so that the auxiliary networks learn at full rate."""
        return 1.0

    def lambda_at(self, progress: float) -> float:
        """λ, the factor of the reversed gradient, at this progress."""
        ramp = 1.0 if self.ramp is None else self.ramp(progress)
        return value_at(self.weight, progress) * ramp

    def reversed(self, features: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The features with a reversed gradient, scaled by λ, which is logged."""
        scale = self.lambda_at(batch.progress)
        batch.log("lambda", scale)
        if scale == 0:
            batch.log("gradient_ratio", 0.0)
        return reverse_gradient(features, scale)


def stop_gradient(features: torch.Tensor, lost: torch.Tensor) -> None:
    """Let no gradient flow back through `features` (N, D) for the items `lost` (N,).

    These are the ones at which the auxiliary network is at or past the value that it has where both
    domains look alike: the paper's game would go on beyond it, away from the classes.
    """
    if features.requires_grad:
        mask = lost.unsqueeze(1)
        features.register_hook(lambda grad: grad.masked_fill(mask, 0.0))  # type: ignore[no-untyped-call]
