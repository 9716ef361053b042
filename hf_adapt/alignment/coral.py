"""Correlation alignment: source and target features with the same covariance."""

from __future__ import annotations

import torch

from hf_adapt.alignment.discrepancy import Discrepancy, check_samples
from hf_adapt.engine.progress import Schedule
from hf_adapt.models.pooling import Pooling


def coral_loss(source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    r"""Squared distance of the covariances of two samples.

    .. math::
        L = \frac{1}{4 D^2} \lVert C_s - C_t \rVert_F^2, \qquad
        C = \frac{1}{N - 1} \sum_{i=1}^{N} (x_i - \bar x)(x_i - \bar x)^\top

    It does not see a shift of the mean; [`cmd_loss`] compares means and higher moments, and
    [`mmd_loss`] whole distributions.

    Reference:
        Sun & Saenko 2016, "Deep CORAL", Eq. 1-3, arXiv:1607.01719.

    Args:
        source: Features of the source rows, any floating dtype; computed in at least float32.
        target: Features of the target rows.

    Shape:
        - source: (N, D), target: (M, D), N and M at least 2; output: (), in the fourth power of
          the features' unit.

    Raises:
        ValueError: If the shapes do not fit, or a sample has less than two rows.

    Example:
        >>> x = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0], [2.0, 2.0]])
        >>> y = torch.tensor([[1.0, 1.0], [3.0, 5.0], [5.0, 3.0], [0.0, 0.0]])
        >>> round(coral_loss(x, y).item(), 6)
        3.210069
    """
    check_samples("coral_loss", source, target, least=2)
    dtype = torch.promote_types(source.dtype, torch.float32)
    difference = _covariance(source.to(dtype)) - _covariance(target.to(dtype))
    return difference.square().sum() / (4 * source.shape[1] ** 2)


def _covariance(rows: torch.Tensor) -> torch.Tensor:
    centred = rows - rows.mean(0)
    return centred.T @ centred / (len(rows) - 1)


class CORAL(Discrepancy):
    """Correlation alignment: trains features whose covariances agree in source and target.

    Cheap and stable, without anything to tune but its weight; a good first method where the domains
    differ in style rather than in content, and where class frequencies are alike. It does not align
    means: combine it with [`MMD`] or use [`CMD`] if they differ. Its value is tiny (it is divided
    by 4 D²), hence the large default weight, which suits pooled features of sentence encoders;
    `coral/gradient_ratio` should come to lie between 0.05 and 0.5.

    Reference:
        Sun & Saenko 2016, "Deep CORAL: Correlation Alignment for Deep Domain Adaptation",
        arXiv:1607.01719.

    Args:
        weight: Factor of the term, or a schedule of it.
        feature_layer: Dotted name of the module; by default the base model's last hidden state.
        pooling: `"mean"`, `"cls"`, `"last"`, `"tokens"`, a callable, or `"auto"`.
        name: Prefix of the logs.

    Logs:
        `loss/coral`, `coral/gradient_ratio`.

    Raises:
        ValueError: If the weight is negative.

    Example:
        >>> CORAL().weight
        100.0
    """

    name = "coral"
    least_rows = 2

    def __init__(
        self,
        weight: float | Schedule = 100.0,
        feature_layer: str | None = None,
        pooling: Pooling = "auto",
        name: str | None = None,
    ) -> None:
        super().__init__(weight, feature_layer, pooling, name)

    def distance(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The distance of the covariances."""
        return coral_loss(source, target)
