"""Conditional domain-adversarial training: the discriminator knows the predicted class."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from hf_adapt.alignment.dann import DANN
from hf_adapt.alignment.entropy import prediction_entropy
from hf_adapt.alignment.predictions import predicted_features, refuse_other_problems
from hf_adapt.engine.progress import Schedule

if TYPE_CHECKING:
    from transformers import Trainer

    from hf_adapt.engine.batch import Batch


def conditioned_features(features: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    r"""The outer product of features and class probabilities, which a discriminator sees.

    .. math::
        h_i = f_i \otimes \mathrm{softmax}(z_i)

    No gradient flows through the probabilities.

    Reference:
        Long et al. 2018, "Conditional Adversarial Domain Adaptation", Eq. 4, arXiv:1705.10667; the
        gradient is cut as in the authors' code.
        Deviation: no random projection where C · D is large; the discriminator's first layer has
        C · D inputs.

    Args:
        features: One for each item, any floating dtype.
        logits: Scores of each class, any floating dtype; the softmax is computed in float32.

    Shape:
        - features: (N, D), logits: (N, C); output: (N, C · D), class after class.

    Raises:
        ValueError: If the shapes do not fit.

    Example:
        >>> conditioned_features(torch.tensor([[1.0, 2.0]]), torch.zeros(1, 2)).tolist()
        [[0.5, 1.0, 0.5, 1.0]]
    """
    if features.ndim != 2 or logits.ndim != 2 or len(features) != len(logits):
        raise ValueError(
            "conditioned_features expects features (N, D) and logits (N, C) with the same N, got "
            f"{tuple(features.shape)} and {tuple(logits.shape)}."
        )
    dtype = torch.promote_types(logits.dtype, torch.float32)
    probabilities = logits.detach().to(dtype).softmax(-1)
    return (probabilities.unsqueeze(2) * features.unsqueeze(1)).flatten(1)


def entropy_weights(logits: torch.Tensor) -> torch.Tensor:
    r"""Weights that are larger for confident predictions, with the mean 1.

    .. math::
        w_i = \frac{N (1 + e^{-H_i})}{\sum_j (1 + e^{-H_j})}, \qquad
        H_i = -\sum_c p_{ic} \log p_{ic}

    Reference:
        Long et al. 2018, section 3.4, arXiv:1705.10667.

    Args:
        logits: Scores of each class, any floating dtype; no gradient flows through them.

    Shape:
        - logits: (N, C); output: (N,), unitless.

    Example:
        >>> entropy_weights(torch.tensor([[0.0, 0.0], [99.0, 0.0]])).tolist()
        [0.8571428656578064, 1.1428571939468384]
    """
    weights = 1 + torch.exp(-prediction_entropy(logits.detach()))
    return weights / weights.mean() if len(weights) else weights


class CDAN(DANN):
    """Conditional domain-adversarial training: aligns the features of each predicted class.

    The discriminator sees the outer product of feature and class probabilities, so that it can tell
    the domains apart within a class; rows with uncertain predictions count less (CDAN+E). Use it
    instead of [`DANN`] where there are several classes and the source model is right on most target
    rows. Where it is mostly wrong, wrong classes are aligned with each other.

    Reference:
        Long et al. 2018, "Conditional Adversarial Domain Adaptation", arXiv:1705.10667.
        Deviations: those of [`DANN`]; the weights have the mean 1 over the micro-batch, both
        domains together (the authors: each domain for itself).

    Args:
        weight: Peak λ, or a schedule of it; a constant 0 turns the objective off.
        entropy_conditioning: Weight rows by the certainty of their prediction (CDAN+E). It couples
            the rows of a micro-batch; with False the term is exact under any accumulation.
        **adversary: Further arguments of [`DANN`]: `ramp`, `feature_layer`, `pooling`,
            `hidden_sizes`, `dropout`, `learning_rate`, `weight_decay`, `name`, `bounded`,
            `several_sources`.

    Logs:
        As [`DANN`], under `cdan`.

    Raises:
        ValueError: As [`DANN`]; on the first batch if the model does not predict exclusive classes
            for the items that its features are of.

    Example:
        >>> CDAN(weight=0.2, entropy_conditioning=False).name
        'cdan'
    """

    name = "cdan"
    uses_logits = True

    def __init__(
        self,
        weight: float | Schedule = 0.1,
        *,
        entropy_conditioning: bool = True,
        **adversary: Any,
    ) -> None:
        super().__init__(weight, **adversary)
        self.entropy_conditioning = entropy_conditioning

    def setup(self, trainer: Trainer) -> None:
        """Refuse a model without classes."""
        super().setup(trainer)
        refuse_other_problems(trainer.model, "CDAN")

    def discriminated(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Features, conditioned on the predictions."""
        features, logits, domain = predicted_features(batch, "CDAN")
        return conditioned_features(features, logits), domain

    def item_weights(self, batch: Batch) -> torch.Tensor | None:
        """Larger for confident predictions."""
        return entropy_weights(batch.logits()[0]) if self.entropy_conditioning else None
