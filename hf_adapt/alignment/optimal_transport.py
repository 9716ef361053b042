"""Optimal transport between labelled source rows and target rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from hf_adapt.alignment.discrepancy import Discrepancy, check_samples
from hf_adapt.alignment.predictions import check_logits, predicted_features, refuse_other_problems
from hf_adapt.engine.progress import Schedule
from hf_adapt.models.pooling import Pooling

if TYPE_CHECKING:
    from transformers import Trainer

    from hf_adapt.engine.batch import Batch


def sinkhorn_plan(
    cost: torch.Tensor,
    regularization: float | torch.Tensor,
    unbalanced: float | torch.Tensor | None = None,
    num_iterations: int = 50,
) -> torch.Tensor:
    r"""The regularised optimal transport plan between two samples of equally weighted rows.

    .. math::
        \min_{\gamma \ge 0} \langle \gamma, C \rangle
            + \varepsilon \, KL(\gamma \,\|\, a b^\top), \qquad
        \gamma 1 = a = 1/N, \quad \gamma^\top 1 = b = 1/M

    and, unbalanced, with ρ KL(γ1 ‖ a) + ρ KL(γᵀ1 ‖ b) in place of the two equations. Computed in
    the logarithmic domain, so that a small ε does not underflow. The POT library has many more
    solvers.

    Reference:
        Cuturi 2013, "Sinkhorn Distances", arXiv:1306.0895; Chizat et al. 2018, "Scaling Algorithms
        for Unbalanced Optimal Transport Problems", arXiv:1607.05816.

    Args:
        cost: C, of moving row i of the one to row j of the other sample.
        regularization: ε, in the cost's unit.
        unbalanced: ρ, in the cost's unit; None for exact marginals.
        num_iterations: Updates of each side; the last one makes the columns exact.

    Shape:
        - cost: (N, M); output: (N, M), of sum 1 where balanced.

    Example:
        >>> plan = sinkhorn_plan(torch.tensor([[0.0, 9.0], [9.0, 0.0]]), 0.5)
        >>> [[round(value, 4) for value in row] for row in plan.tolist()]
        [[0.5, 0.0], [0.0, 0.5]]
    """
    n, m = cost.shape
    log_a = -torch.log(cost.new_tensor(float(n)))
    log_b = -torch.log(cost.new_tensor(float(m)))
    kernel = -cost / regularization
    share = 1.0 if unbalanced is None else unbalanced / (unbalanced + regularization)
    f, g = cost.new_zeros(n, 1), cost.new_zeros(1, m)
    for _ in range(num_iterations):
        f = -share * torch.logsumexp(kernel + g + log_b, dim=1, keepdim=True)
        g = -share * torch.logsumexp(kernel + f + log_a, dim=0, keepdim=True)
    return torch.exp(kernel + f + g + log_a + log_b)


def jdot_loss(
    source: torch.Tensor,
    source_labels: torch.Tensor,
    target: torch.Tensor,
    target_logits: torch.Tensor,
    feature_weight: float = 1.0,
    label_weight: float = 1.0,
    regularization: float = 0.1,
    unbalanced: float | None = None,
) -> torch.Tensor:
    r"""Cost of transporting labelled source rows to target rows and their predictions.

    .. math::
        L = \sum_{i,j} \gamma_{ij} C_{ij}(n), \qquad
        C_{ij}(n) = \alpha \frac{\lVert s_i - t_j \rVert^2}{n}
            - \beta \log \mathrm{softmax}(z_j)_{y_i}

    with γ the plan of [`sinkhorn_plan`] for C(m), m the median of the squared distances, and n the
    mean squared norm of the features. No gradient flows through γ, m and n: a source row teaches
    its label to the target rows it is transported to, and their features come together.

    Reference:
        Damodaran et al. 2018, "DeepJDOT: Deep Joint Distribution Optimal Transport", Eq. 5-7,
        arXiv:1803.10081; unbalanced: Fatras et al. 2021, arXiv:2103.03606.
        Deviations: distances are divided by their median for the plan and by the features' norm
        for the loss, so that the weights do not depend on the scale of the features (the authors'
        are 0.001 and 0.0001 for theirs); with the median in the loss the gradient would grow as
        the features contract, into a single point. The plan is regularised.

    Args:
        source: Features of the source rows, any floating dtype; computed in at least float32.
        source_labels: Their classes.
        target: Features of the target rows.
        target_logits: Scores of each class for the target rows.
        feature_weight: α.
        label_weight: β.
        regularization: ε, as a share of the median cost.
        unbalanced: How strictly all rows must be transported, as a multiple of the median cost;
            None for exactly. With a finite one, rows that are far from all others stay, which is
            right where class frequencies differ.

    Shape:
        - source: (N, D), source_labels: (N,), target: (M, D), target_logits: (M, C); output: ().

    Raises:
        ValueError: If the shapes do not fit, or a sample is empty.

    Example:
        >>> x, z = torch.tensor([[0.0], [4.0]]), torch.tensor([[9.0, -9.0], [-9.0, 9.0]])
        >>> round(jdot_loss(x, torch.tensor([0, 1]), x, z).item(), 4)
        0.0
    """
    check_samples("jdot_loss", source, target)
    check_logits("jdot_loss", target_logits)
    if source_labels.shape != source.shape[:1] or len(target_logits) != len(target):
        raise ValueError(
            f"jdot_loss expects one label for each of {len(source)} source rows and logits for "
            f"each of {len(target)} target rows, got {tuple(source_labels.shape)} and "
            f"{tuple(target_logits.shape)}."
        )
    dtype = torch.promote_types(source.dtype, torch.float32)
    # Not the Gram expansion, whose cancellation would make near distances negative in float32.
    mode = "donot_use_mm_for_euclid_dist"
    squared = torch.cdist(source.to(dtype), target.to(dtype), compute_mode=mode).square()
    cross_entropy = -F.log_softmax(target_logits.to(dtype), dim=-1).T[source_labels]
    labels_cost = label_weight * cross_entropy
    cost = (feature_weight * squared / _median(squared) + labels_cost).detach()
    scale = _median(cost)
    relaxed = None if unbalanced is None else unbalanced * scale
    plan = sinkhorn_plan(cost, regularization * scale, relaxed)
    norm = (source.to(dtype).square().sum(1).mean() + target.to(dtype).square().sum(1).mean()) / 2
    norm = norm.detach().clamp(min=torch.finfo(dtype).tiny)
    return (plan * (feature_weight * squared / norm + labels_cost)).sum()


def _median(values: torch.Tensor) -> torch.Tensor:
    """The median, or where it is 0 the mean, or where that is 0 one."""
    values = values.detach()
    median, mean = values.median(), values.mean()
    return torch.where(median > 0, median, torch.where(mean > 0, mean, torch.ones_like(mean)))


class DeepJDOT(Discrepancy):
    """Transports labelled source rows to target rows: their features meet, and labels are taught.

    Each micro-batch's source rows are matched with its target rows by features and predictions
    together; it is among the methods that gained most in published comparisons. A micro-batch
    should hold several rows of each class in both domains. Where class frequencies differ, use
    `unbalanced` (1, say): exact marginals transport a class to another one.

    Reference:
        Damodaran et al. 2018, "DeepJDOT: Deep Joint Distribution Optimal Transport for Unsupervised
        Domain Adaptation", arXiv:1803.10081; unbalanced: Fatras et al. 2021, "Unbalanced Minibatch
        Optimal Transport; Applications to Domain Adaptation", arXiv:2103.03606.

    Args:
        weight: Factor of the term, or a schedule of it. With 0.1 a fine-tuned text classifier came
            to predict one class.
        feature_weight: Factor of the squared distance of features, relative to their norm.
            Transport contracts features: with 1, a classifier of text did not learn its task.
        label_weight: Factor of the cross-entropy of a source label and a target prediction.
        regularization: Of the transport plan, as a share of the median cost; smaller is sharper.
        unbalanced: How strictly all rows must be transported, as a multiple of the median cost;
            None for exactly.
        feature_layer: Dotted name of the module; by default the base model's last hidden state.
        pooling: `"mean"`, `"cls"`, `"last"`, `"tokens"`, a callable, or `"auto"`.
        name: Prefix of the logs.

    Logs:
        `loss/deep_jdot`, `deep_jdot/gradient_ratio`.

    Raises:
        ValueError: If a weight is negative, another option not positive, or the model has no
            exclusive classes.

    Example:
        >>> DeepJDOT(unbalanced=1.0).name
        'deep_jdot'
    """

    name = "deep_jdot"
    uses_logits = True

    def __init__(
        self,
        weight: float | Schedule = 0.03,
        feature_weight: float = 0.1,
        label_weight: float = 1.0,
        regularization: float = 0.1,
        unbalanced: float | None = None,
        feature_layer: str | None = None,
        pooling: Pooling = "auto",
        name: str | None = None,
    ) -> None:
        super().__init__(weight, feature_layer, pooling, name)
        if feature_weight < 0 or label_weight < 0:
            raise ValueError(
                f"feature_weight={feature_weight} and label_weight={label_weight} must not be "
                "negative."
            )
        if not regularization > 0 or (unbalanced is not None and not unbalanced > 0):
            raise ValueError(
                f"regularization={regularization} and unbalanced={unbalanced} must be positive."
            )
        self.options: dict[str, Any] = {
            "feature_weight": feature_weight,
            "label_weight": label_weight,
            "regularization": regularization,
            "unbalanced": unbalanced,
        }

    def setup(self, trainer: Trainer) -> None:
        """Refuse a model without classes."""
        refuse_other_problems(trainer.model, "DeepJDOT")

    def pair_distance(
        self, batch: Batch, features: torch.Tensor, source: torch.Tensor, target: torch.Tensor
    ) -> torch.Tensor:
        """The cost of transport from the labelled source items."""
        _, logits, _ = predicted_features(batch, "DeepJDOT")
        labels = batch.labels().to(logits.device)
        source = source & (labels >= 0)
        if not bool(source.any()):
            return features.sum() * 0.0
        return jdot_loss(
            features[source], labels[source], features[target], logits[target], **self.options
        )
