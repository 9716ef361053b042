"""Maximum mean discrepancy: a distance between the feature distributions of two domains."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hf_adapt.alignment.discrepancy import Discrepancy, check_samples
from hf_adapt.engine.progress import Schedule
from hf_adapt.models.pooling import Pooling

SCALES = (0.25, 0.5, 1.0, 2.0, 4.0)


def mmd_loss(
    source: torch.Tensor,
    target: torch.Tensor,
    bandwidths: Sequence[float] | torch.Tensor | None = None,
    scales: Sequence[float] = SCALES,
    unbiased: bool = False,
) -> torch.Tensor:
    r"""Squared maximum mean discrepancy between two samples, over several Gaussian kernels.

    .. math::
        \mathrm{MMD}^2 = \frac{1}{N^2} \sum_{i,j} k(s_i, s_j)
            + \frac{1}{M^2} \sum_{i,j} k(t_i, t_j) - \frac{2}{NM} \sum_{i,j} k(s_i, t_j), \qquad
        k(x, y) = \frac{1}{Q} \sum_{q=1}^{Q} e^{-\lVert x - y \rVert^2 / 2 \sigma_q^2}

    Minimising it aligns all moments of the two feature distributions, without a discriminator.
    Where the label distributions of the domains differ, it aligns features of different classes;
    [`InformationMaximization`] uses the predictions instead.

    Reference:
        Gretton et al. 2012, "A Kernel Two-Sample Test", Eq. 3 (unbiased) and 5 (biased), JMLR 13;
        several kernels as in Long et al. 2015, arXiv:1502.02791.
        Deviation: the mean over the kernels, unweighted.

    Args:
        source: Features of the source rows, any floating dtype; computed in at least float32.
        target: Features of the target rows.
        bandwidths: σ² of each kernel exp(-d² / 2σ²). By default the median squared distance
            between different rows of both samples, halved, times each of `scales`; no gradient
            flows through it.
        scales: Factors of the median.
        unbiased: Leave out i = j in the first two sums, and divide them by N (N - 1) and M (M - 1).
            The result may be negative; needs two rows of each domain.

    Shape:
        - source: (N, D), target: (M, D); output: (), unitless.

    Raises:
        ValueError: If the shapes do not fit, a sample is empty, or has one row where two are
            needed.

    Example:
        >>> x = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0], [2.0, 2.0]])
        >>> y = torch.tensor([[1.0, 1.0], [3.0, 5.0], [5.0, 3.0], [0.0, 0.0]])
        >>> round(mmd_loss(x, y, bandwidths=[1.0]).item(), 6)
        0.273753
    """
    least = 2 if unbiased else 1
    way_out = f"Use a larger batch{' or unbiased=False' if unbiased else ''}."
    check_samples(f"mmd_loss(unbiased={unbiased})", source, target, least, way_out)
    kernel = gaussian_kernel(torch.cat([source, target]), bandwidths, scales)
    return discrepancy_of(kernel, len(source), unbiased)


def gaussian_kernel(
    rows: torch.Tensor,
    bandwidths: Sequence[float] | torch.Tensor | None = None,
    scales: Sequence[float] = SCALES,
) -> torch.Tensor:
    """The mean of several Gaussian kernels between all pairs of rows.

    Args:
        rows: Any floating dtype; computed in at least float32.
        bandwidths: σ² of each kernel; by default the halved median squared distance of different
            rows times each of `scales`, without gradient.
        scales: Factors of the median.

    Shape:
        - rows: (N, D); output: (N, N).
    """
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    # Not the Gram expansion: its cancellation would make near distances negative in float32.
    mode = "donot_use_mm_for_euclid_dist"
    squared = torch.cdist(rows, rows, compute_mode=mode).square()
    if bandwidths is None:
        bandwidths = _median_bandwidth(squared.detach()) * squared.new_tensor(list(scales))
    sigma2 = torch.as_tensor(bandwidths, dtype=rows.dtype, device=rows.device)
    return torch.exp(-squared.unsqueeze(-1) / (2 * sigma2)).mean(-1)


def discrepancy_of(kernel: torch.Tensor, n: int, unbiased: bool) -> torch.Tensor:
    """The squared maximum mean discrepancy, given the kernel of all rows.

    Args:
        kernel: Of the source rows, which come first, and the target rows.
        n: Number of source rows.
        unbiased: Leave out the kernel of each row with itself.

    Shape:
        - kernel: (N + M, N + M); output: ().
    """
    m = len(kernel) - n
    within_source, within_target, between = kernel[:n, :n], kernel[n:, n:], kernel[:n, n:]
    if unbiased:
        source_mean = (within_source.sum() - within_source.diagonal().sum()) / (n * (n - 1))
        target_mean = (within_target.sum() - within_target.diagonal().sum()) / (m * (m - 1))
        return source_mean + target_mean - 2 * between.mean()
    return within_source.mean() + within_target.mean() - 2 * between.mean()


def _median_bandwidth(squared: torch.Tensor) -> torch.Tensor:
    size = len(squared)
    row, column = torch.triu_indices(size, size, offset=1, device=squared.device)
    median = squared[row, column].median() / 2
    # Identical rows have distance 0; the mean, and then 1, keep the kernel defined.
    median = torch.where(median > 0, median, squared.mean() / 2)
    return torch.where(median > 0, median, torch.ones_like(median))


class MMD(Discrepancy):
    """Aligns the feature distributions of source and target by maximum mean discrepancy.

    It has no discriminator to balance, so try it first; add [`InformationMaximization`] to use the
    predictions as well. With several targets, each is aligned with the source. The term couples the
    rows of a micro-batch: under gradient accumulation it is the mean of the values of the
    micro-batches, each of which needs a few rows of each domain.

    Reference:
        Gretton et al. 2012, JMLR 13; Long et al. 2015, "Learning Transferable Features with Deep
        Adaptation Networks", arXiv:1502.02791.

    Args:
        weight: Factor of the term, or a schedule of it.
        scales: Factors of the median bandwidth, one kernel each.
        bandwidths: Fixed σ² instead of the median.
        unbiased: Leave out the kernel of each row with itself. The biased estimate from n rows is
            of order 1/n even for equal domains, and its gradient moves the rows of a domain towards
            each other: with batches of 16 a classifier did not learn at all.
        feature_layer: Dotted name of the module; by default the base model's last hidden state.
        pooling: `"mean"`, `"cls"`, `"last"`, `"tokens"`, a callable, or `"auto"`.
        name: Prefix of the logs.

    Logs:
        `loss/mmd`, `mmd/gradient_ratio`.

    Raises:
        ValueError: If the weight is negative, or a scale or bandwidth is not positive.

    Example:
        >>> MMD(weight=0.5).name
        'mmd'
    """

    name = "mmd"

    def __init__(
        self,
        weight: float | Schedule = 1.0,
        scales: Sequence[float] = SCALES,
        bandwidths: Sequence[float] | None = None,
        unbiased: bool = True,
        feature_layer: str | None = None,
        pooling: Pooling = "auto",
        name: str | None = None,
    ) -> None:
        super().__init__(weight, feature_layer, pooling, name)
        for option, values in (("scales", scales), ("bandwidths", bandwidths)):
            if values is not None and (len(values) == 0 or not all(v > 0 for v in values)):
                raise ValueError(f"{option}={values}: at least one value, each positive.")
        self.scales = tuple(scales)
        self.bandwidths = None if bandwidths is None else tuple(bandwidths)
        self.unbiased = unbiased

    @property
    def least_rows(self) -> int:
        """Two for the unbiased estimate."""
        return 2 if self.unbiased else 1

    def distance(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The discrepancy."""
        return mmd_loss(source, target, self.bandwidths, self.scales, self.unbiased)
