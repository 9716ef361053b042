"""Central moment discrepancy: source and target features with the same moments."""

from __future__ import annotations

import torch

from hf_adapt.alignment.discrepancy import Discrepancy, check_samples
from hf_adapt.engine.progress import Schedule
from hf_adapt.models.pooling import Pooling


def cmd_loss(
    source: torch.Tensor, target: torch.Tensor, num_moments: int = 5, span: float = 1.0
) -> torch.Tensor:
    r"""Distance of the means and central moments of two samples, each feature for itself.

    .. math::
        L = \frac{1}{b - a} \lVert \bar s - \bar t \rVert_2
            + \sum_{k=2}^{K} \frac{1}{(b - a)^k} \lVert c_k(s) - c_k(t) \rVert_2, \qquad
        c_k(x) = \frac{1}{N} \sum_{i=1}^{N} (x_i - \bar x)^k

    It has no kernel to choose; [`coral_loss`] compares covariances between features too, but no
    means.

    Reference:
        Zellinger et al. 2017, "Central Moment Discrepancy (CMD) for Domain-Invariant Representation
        Learning", Definition 2, arXiv:1702.08811.

    Args:
        source: Features of the source rows in [a, b], any floating dtype; computed in at least
            float32.
        target: Features of the target rows.
        num_moments: K, the highest moment that is compared.
        span: b - a.

    Shape:
        - source: (N, D), target: (M, D); output: (), unitless.

    Raises:
        ValueError: If the shapes do not fit, a sample is empty, or an option is not positive.

    Example:
        >>> x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.25], [0.25]])
        >>> cmd_loss(x, y, num_moments=2).item()  # |1/2 - 1/4| + |1/4 - 0|
        0.5
    """
    check_samples("cmd_loss", source, target)
    _check_options(num_moments, span)
    dtype = torch.promote_types(source.dtype, torch.float32)
    source, target = source.to(dtype), target.to(dtype)
    means = source.mean(0), target.mean(0)
    total: torch.Tensor = torch.linalg.vector_norm(means[0] - means[1]) / span
    centred = source - means[0], target - means[1]
    for k in range(2, num_moments + 1):
        moments = [rows.pow(k).mean(0) for rows in centred]
        total = total + torch.linalg.vector_norm(moments[0] - moments[1]) / span**k
    return total


def _check_options(num_moments: int, span: float) -> None:
    if num_moments < 1 or not span > 0:
        raise ValueError(
            f"num_moments={num_moments} and span={span}: at least one moment, and a positive span."
        )


class CMD(Discrepancy):
    """Central moment discrepancy: trains features whose moments agree in source and target.

    Each feature is compared for itself, so it works with small batches and wide features, where
    covariances ([`CORAL`]) and kernels ([`MMD`]) are noisy. Where class frequencies differ between
    the domains it aligns what should differ, as they do. Its gradient does not vanish near 0, so
    that a large weight contracts the features into a point: with 0.3 a classifier did not learn.

    Reference:
        Zellinger et al. 2017, "Central Moment Discrepancy (CMD) for Domain-Invariant Representation
        Learning", arXiv:1702.08811.
        Deviation: features of transformers have no bounds, so their tanh is compared (b - a = 2).

    Args:
        weight: Factor of the term, or a schedule of it.
        num_moments: The highest moment that is compared.
        feature_layer: Dotted name of the module; by default the base model's last hidden state.
        pooling: `"mean"`, `"cls"`, `"last"`, `"tokens"`, a callable, or `"auto"`.
        name: Prefix of the logs.

    Logs:
        `loss/cmd`, `cmd/gradient_ratio`.

    Raises:
        ValueError: If the weight is negative or there is no moment.

    Example:
        >>> CMD(weight=0.5).name
        'cmd'
    """

    name = "cmd"

    def __init__(
        self,
        weight: float | Schedule = 0.03,
        num_moments: int = 5,
        feature_layer: str | None = None,
        pooling: Pooling = "auto",
        name: str | None = None,
    ) -> None:
        super().__init__(weight, feature_layer, pooling, name)
        _check_options(num_moments, 2.0)
        self.num_moments = num_moments

    def distance(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The discrepancy of the features' tanh."""
        return cmd_loss(source.tanh(), target.tanh(), self.num_moments, span=2.0)
