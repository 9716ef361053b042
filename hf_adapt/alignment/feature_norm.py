"""Adaptive feature norm: features of both domains with the same, larger norms."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hf_adapt.engine.adaptation import Objective, Term
from hf_adapt.engine.progress import Schedule
from hf_adapt.models.pooling import Pooling

if TYPE_CHECKING:
    from hf_adapt.engine.batch import Batch, Rows


def stepwise_norm_loss(
    features: torch.Tensor, delta: float = 1.0, reduction: str = "mean"
) -> torch.Tensor:
    r"""Asks for features whose norm is a little larger than it is.

    .. math::
        L = \frac{1}{N} \sum_{i=1}^{N} (\lVert f_i \rVert_2 - h_i)^2, \qquad
        h_i = \lVert f_i \rVert_2 + \Delta r \ \text{(without gradient)}

    Its value is always Δr²; its gradient lets each norm grow, whatever it is.

    Reference:
        Xu et al. 2019, "Larger Norm More Transferable", Eq. 6, arXiv:1811.07456.

    Args:
        features: Features of rows of any domain, any floating dtype; computed in at least float32.
        delta: Δr, by how much a norm shall grow.
        reduction: `"mean"` or `"sum"`.

    Shape:
        - features: (N, D); output: (), in the squared unit of the features.

    Raises:
        ValueError: If the shape does not fit.

    Example:
        >>> x = torch.tensor([[3.0, 4.0]], requires_grad=True)
        >>> stepwise_norm_loss(x, 0.5).backward()
        >>> [round(value, 4) for value in x.grad[0].tolist()]  # -2 Δr f / ‖f‖
        [-0.6, -0.8]
    """
    norms = _norms("stepwise_norm_loss", features)
    squares = (norms - (norms.detach() + delta)).square()
    return squares.sum() if reduction == "sum" else squares.mean()


def hard_norm_loss(features: torch.Tensor, radius: float = 25.0) -> torch.Tensor:
    r"""Asks for features of a given mean norm.

    .. math::
        L = \Big(\frac{1}{N} \sum_{i=1}^{N} \lVert f_i \rVert_2 - R\Big)^2

    Reference:
        Xu et al. 2019, "Larger Norm More Transferable", Eq. 4, arXiv:1811.07456.

    Args:
        features: Features of the rows of one domain, any floating dtype; computed in at least
            float32.
        radius: R.

    Shape:
        - features: (N, D), N at least 1; output: (), in the squared unit of the features.

    Raises:
        ValueError: If the shape does not fit.

    Example:
        >>> hard_norm_loss(torch.tensor([[3.0, 4.0], [0.0, 1.0]]), radius=5.0).item()
        4.0
    """
    return (_norms("hard_norm_loss", features).mean() - radius).square()


def _norms(name: str, features: torch.Tensor) -> torch.Tensor:
    if features.ndim != 2:
        raise ValueError(f"{name} expects features (N, D), got {tuple(features.shape)}.")
    dtype = torch.promote_types(features.dtype, torch.float32)
    norms: torch.Tensor = torch.linalg.vector_norm(features.to(dtype), dim=1)
    return norms


class AFN(Objective):
    """Adaptive feature norm: trains features of both domains with the same, larger norms.

    For features of free norm (a pooler's, a projection's, those of a convolutional network). The
    last hidden state of most transformers comes out of a layer norm, which bounds its norm: name
    another `feature_layer`, or use [`CORAL`], [`CMD`] or [`MMD`]. As it compares no distributions
    it does not mind classes that one of the domains lacks.

    Reference:
        Xu et al. 2019, "Larger Norm More Transferable: An Adaptive Feature Norm Approach for
        Unsupervised Domain Adaptation", arXiv:1811.07456.

    Args:
        weight: Factor of the term, or a schedule of it. The authors take 0.05 for images; a
            fine-tuned text classifier lost by that on one of two pairs, and gained with 0.005. The
            norms grow for as long as it runs: a network with new weights, trained at 3e-3, learnt
            nothing with it. Give a `radius` there.
        delta: By how much each norm shall grow (the stepwise form, a sum over rows).
        radius: The mean norm that each domain shall have (the hard form) instead; it couples the
            rows of a micro-batch. The authors take 25.
        feature_layer: Dotted name of the module; by default the base model's last hidden state.
        pooling: `"mean"`, `"cls"`, `"last"`, `"tokens"`, a callable, or `"auto"`.
        name: Prefix of the logs.

    Logs:
        `loss/afn` (constant in the stepwise form), `afn/source_norm`, `afn/target_norm`,
        `afn/gradient_ratio`.

    Raises:
        ValueError: If the weight is negative, or an option not positive.

    Example:
        >>> AFN(radius=25.0).weight
        0.005
    """

    name = "afn"
    needs_streams = ("target",)
    uses_logits = False

    def __init__(
        self,
        weight: float | Schedule = 0.005,
        delta: float = 1.0,
        radius: float | None = None,
        feature_layer: str | None = None,
        pooling: Pooling = "auto",
        name: str | None = None,
    ) -> None:
        super().__init__(weight, feature_layer, pooling, name)
        if not delta > 0 or (radius is not None and not radius > 0):
            raise ValueError(f"delta={delta} and radius={radius} must be positive.")
        self.delta = delta
        self.radius = radius

    def num_items(self, rows: Rows) -> torch.Tensor:
        """Every row (or token) of both domains."""
        return rows.num_features()

    def loss(self, batch: Batch) -> Term:
        """The squared distance of the norms to what they shall be."""
        features, domain = batch.features()
        for which, rows in (("source", domain == 0), ("target", domain > 0)):
            if bool(rows.any()):
                norms = torch.linalg.vector_norm(features[rows].detach(), dim=1)
                batch.log(f"{which}_norm", norms.mean(), len(norms))
        if self.radius is None:
            count = torch.as_tensor(len(features), device=features.device)
            return stepwise_norm_loss(features, self.delta, reduction="sum"), count
        domains = [domain == number for number in range(batch.num_domains)]
        terms = [hard_norm_loss(features[rows], self.radius) for rows in domains if rows.any()]
        return torch.stack(terms).sum()
