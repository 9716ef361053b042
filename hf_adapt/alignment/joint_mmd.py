"""Joint maximum mean discrepancy: features and predictions of the domains, compared together."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hf_adapt.alignment.discrepancy import Discrepancy, check_samples
from hf_adapt.alignment.mmd import discrepancy_of, gaussian_kernel
from hf_adapt.alignment.predictions import predicted_features, refuse_other_problems
from hf_adapt.engine.progress import Schedule
from hf_adapt.models.pooling import Pooling

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import Trainer

    from hf_adapt.engine.batch import Batch


PREDICTION_BANDWIDTH = 0.84
"""σ² of the kernel on predicted probabilities; the authors write it as exp(-d² / 1.68)."""


def jmmd_loss(
    source: Sequence[torch.Tensor],
    target: Sequence[torch.Tensor],
    bandwidths: Sequence[float | None] | None = None,
    unbiased: bool = False,
) -> torch.Tensor:
    r"""Squared maximum mean discrepancy between the joint distributions of several views of rows.

    .. math::
        \mathrm{JMMD}^2 = \frac{1}{N^2} \sum_{i,j} k(s_i, s_j)
            + \frac{1}{M^2} \sum_{i,j} k(t_i, t_j) - \frac{2}{NM} \sum_{i,j} k(s_i, t_j), \qquad
        k(x, y) = \prod_{\ell} k_\ell(x^\ell, y^\ell)

    with the kernels of [`mmd_loss`]. With the features and the predicted probabilities as views,
    rows are compared where both are alike, so that it aligns the domains class by class as far as
    the predictions are right.

    Reference:
        Long et al. 2017, "Deep Transfer Learning with Joint Adaptation Networks", Eq. 8,
        arXiv:1605.06636.

    Args:
        source: Views of the source rows, any floating dtype; computed in at least float32.
        target: The same views of the target rows.
        bandwidths: σ² of each view's kernel. None, for a view or for all, are the five kernels of
            [`mmd_loss`] around the median squared distance. Fix that of predictions: early in
            training they are all alike, and a median would blow up their differences.
        unbiased: Leave out i = j in the first two sums; needs two rows of each domain.

    Shape:
        - source: (N, D_ℓ) each, target: (M, D_ℓ) each; output: (), unitless.

    Raises:
        ValueError: If there are other views of source than of target, the shapes do not fit, or a
            sample has too few rows.

    Example:
        >>> rows, classes = torch.randn(5, 3), torch.rand(5, 2)
        >>> abs(round(jmmd_loss([rows, classes], [rows, classes]).item(), 4))
        0.0
    """
    if len(source) != len(target) or not source:
        raise ValueError(
            f"jmmd_loss expects the same views of both domains, got {len(source)} of the source "
            f"and {len(target)} of the target."
        )
    if bandwidths is None:
        bandwidths = [None] * len(source)
    kernel = torch.ones((), device=source[0].device)
    for one, other, bandwidth in zip(source, target, bandwidths, strict=True):
        check_samples(f"jmmd_loss(unbiased={unbiased})", one, other, least=2 if unbiased else 1)
        own = None if bandwidth is None else [bandwidth]
        kernel = kernel * gaussian_kernel(torch.cat([one, other]), own)
    return discrepancy_of(kernel, len(source[0]), unbiased)


class JMMD(Discrepancy):
    """Aligns the joint distributions of features and predictions of source and target (JAN).

    Where [`MMD`] asks only that the features of the domains lie in the same places, this asks that
    they do so where the predictions are alike. Prefer it to MMD where a model trained on the source
    is already right for most target rows; where it is not, it aligns classes with others. Features
    and predictions must be of the same items (rows, or tokens).

    Reference:
        Long et al. 2017, "Deep Transfer Learning with Joint Adaptation Networks", arXiv:1605.06636.

    Args:
        weight: Factor of the term, or a schedule of it.
        unbiased: Leave out the kernel of each row with itself, as in [`MMD`].
        feature_layer: Dotted name of the module; by default the base model's last hidden state.
        pooling: `"mean"`, `"cls"`, `"last"`, `"tokens"`, a callable, or `"auto"`.
        name: Prefix of the logs.

    Logs:
        `loss/jmmd`, `jmmd/gradient_ratio`.

    Raises:
        ValueError: If the weight is negative, or the model has no exclusive classes.

    Example:
        >>> JMMD(weight=0.5).name
        'jmmd'
    """

    name = "jmmd"
    uses_logits = True

    def __init__(
        self,
        weight: float | Schedule = 1.0,
        unbiased: bool = True,
        feature_layer: str | None = None,
        pooling: Pooling = "auto",
        name: str | None = None,
    ) -> None:
        super().__init__(weight, feature_layer, pooling, name)
        self.unbiased = unbiased

    @property
    def least_rows(self) -> int:
        """Two for the unbiased estimate."""
        return 2 if self.unbiased else 1

    def setup(self, trainer: Trainer) -> None:
        """Refuse a model without classes."""
        refuse_other_problems(trainer.model, "JMMD")

    def pair_distance(
        self, batch: Batch, features: torch.Tensor, source: torch.Tensor, target: torch.Tensor
    ) -> torch.Tensor:
        """The discrepancy of features and predicted probabilities."""
        classes = predicted_features(batch, "JMMD")[1].softmax(-1)
        return jmmd_loss(
            [features[source], classes[source]],
            [features[target], classes[target]],
            [None, PREDICTION_BANDWIDTH],
            self.unbiased,
        )
