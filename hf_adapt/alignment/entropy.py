"""Objectives on the model's own predictions for target rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from hf_adapt.alignment.predictions import ClassPredictions
from hf_adapt.alignment.priors import LEAST, PriorObjective, Priors
from hf_adapt.engine.adaptation import Term
from hf_adapt.engine.progress import Schedule

if TYPE_CHECKING:
    from hf_adapt.engine.batch import Batch, Rows


def prediction_entropy(logits: torch.Tensor) -> torch.Tensor:
    r"""Shannon entropy of each row's prediction; minimising it makes predictions confident.

    .. math::
        H_i = -\sum_{c=1}^{C} p_{ic} \log p_{ic}, \qquad p_i = \mathrm{softmax}(z_i)

    Alone it may put all rows into one class; [`prediction_diversity`] prevents that.

    Reference:
        Grandvalet & Bengio 2004, "Semi-supervised Learning by Entropy Minimization".

    Args:
        logits: Scores of each class, any floating dtype; computed in at least float32.

    Shape:
        - logits: (..., C); output: (...), in nats.

    Example:
        >>> [round(value, 4) for value in prediction_entropy(torch.zeros(1, 2)).tolist()]
        [0.6931]
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    log_probabilities = F.log_softmax(logits.to(dtype), dim=-1)
    return -(log_probabilities.exp() * log_probabilities).sum(-1)


def prediction_diversity(logits: torch.Tensor) -> torch.Tensor:
    r"""Entropy of the mean prediction; maximising it makes the model predict all classes.

    .. math::
        H(\bar p) = -\sum_{c=1}^{C} \bar p_c \log \bar p_c, \qquad
        \bar p = \frac{1}{N} \sum_{i=1}^{N} \mathrm{softmax}(z_i)

    Use it where the classes of the target are about equally frequent.

    Reference:
        Liang et al. 2020, "Do We Really Need to Access the Source Data?", Eq. 5, arXiv:2002.08546.

    Args:
        logits: Scores of each class, any floating dtype; computed in at least float32.

    Shape:
        - logits: (N, C), N at least 1; output: (), in nats, at most ln C.

    Example:
        >>> logits = torch.tensor([[9.0, -9.0], [-9.0, 9.0]])
        >>> round(prediction_diversity(logits).item(), 4)
        0.6931
    """
    mean = _log_mean(logits)
    return -(mean.exp() * mean).sum()


def prior_divergence(logits: torch.Tensor, priors: torch.Tensor) -> torch.Tensor:
    r"""Divergence of the mean prediction from the class frequencies of the target.

    .. math::
        \mathrm{KL}(\bar p \,\Vert\, \pi) = \sum_{c=1}^{C} \bar p_c \log \frac{\bar p_c}{\pi_c}

    With uniform frequencies it is ln C minus [`prediction_diversity`].

    Reference:
        Krause et al. 2010, "Discriminative Clustering by Regularized Information Maximization",
        Section 3.2 (a prior other than the uniform one).

    Args:
        logits: Scores of each class, any floating dtype; computed in at least float32.
        priors: Class frequencies π; a 0 counts as 0.0001.

    Shape:
        - logits: (N, C), N at least 1; priors: (C,); output: (), in nats.

    Raises:
        ValueError: If the shapes do not fit.

    Example:
        >>> even, rare = torch.zeros(1, 2), torch.tensor([0.9, 0.1])
        >>> round(prior_divergence(even, rare).item(), 4)  # ln (0.5 / 0.3)
        0.5108
    """
    if priors.shape != logits.shape[1:]:
        raise ValueError(
            f"prior_divergence expects logits (N, C) and priors (C,), got {tuple(logits.shape)} "
            f"and {tuple(priors.shape)}."
        )
    mean = _log_mean(logits)
    return (mean.exp() * (mean - priors.to(mean).clamp_min(LEAST).log())).sum()


def _log_mean(logits: torch.Tensor) -> torch.Tensor:
    """The logarithm of the mean prediction, (C,)."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return F.log_softmax(logits.to(dtype), dim=-1).logsumexp(0) - torch.log(
        torch.tensor(float(len(logits)), dtype=dtype, device=logits.device)
    )


class InformationMaximization(PriorObjective):
    r"""Trains confident predictions on target rows that use all classes.

    .. math::
        L = \frac{1}{N} \sum_{i=1}^{N} H(p_i) - H(\bar p)

    Minimising it maximises the mutual information of input and prediction: low entropy of each
    prediction, high entropy of the mean prediction. That is right where the classes of the target
    are about equally frequent. Where they are not, give the run's `target_priors` π: the mean
    prediction is then drawn to them, by its divergence from π in place of :math:`-H(\bar p)`.

    Reference:
        Krause et al. 2010, "Discriminative Clustering by Regularized Information Maximization";
        Liang et al. 2020, "Do We Really Need to Access the Source Data?", Eq. 5, arXiv:2002.08546.

    Args:
        weight: Factor of the term, or a schedule of it.
        entropy_weight: Factor of the rows' entropy within the term.
        diversity_weight: Factor of the mean prediction's entropy, which is subtracted (or of its
            divergence from the class frequencies). It couples the rows of a micro-batch; with 0
            the term is exact under any accumulation.
        prior: Class frequencies for this objective alone, in place of the run's `target_priors`.
            With `"estimate"` they are estimated at each fifth of training.
        name: Prefix of the logs.

    Logs:
        `loss/information_maximization`, `information_maximization/entropy`,
        `information_maximization/negative_diversity` (`.../divergence` with class frequencies).

    Raises:
        ValueError: If a weight is negative.

    Example:
        >>> InformationMaximization(weight=0.5).name
        'information_maximization'
    """

    name = "information_maximization"
    needs_few_classes = False
    needs_streams = ("target",)

    def __init__(
        self,
        weight: float | Schedule = 1.0,
        entropy_weight: float = 1.0,
        diversity_weight: float = 1.0,
        prior: Priors | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(weight, name=name)
        self.prior = prior
        if entropy_weight < 0 or diversity_weight < 0:
            raise ValueError(
                f"entropy_weight={entropy_weight} and diversity_weight={diversity_weight} must "
                "not be negative (diversity is subtracted already)."
            )
        self.entropy_weight = entropy_weight
        self.diversity_weight = diversity_weight

    def num_items(self, rows: Rows) -> torch.Tensor:
        """The number of target rows (or tokens), each of which has a prediction."""
        return rows.num_predictions(target_only=True)

    def loss(self, batch: Batch) -> dict[str, Term]:
        """The two components, on the target rows."""
        logits, domain = self.class_logits(batch)
        target = logits[domain > 0]
        count = torch.as_tensor(len(target), device=logits.device)
        terms: dict[str, Term] = {
            "entropy": (self.entropy_weight * prediction_entropy(target).sum(), count)
        }
        if self.diversity_weight:
            none = logits.sum() * 0.0
            if self.knows_priors:
                divergence = (
                    prior_divergence(target, self.target_priors(logits.shape[1]))
                    if len(target)
                    else none
                )
                terms["divergence"] = self.diversity_weight * divergence
            else:
                diversity = prediction_diversity(target) if len(target) else none
                terms["negative_diversity"] = -self.diversity_weight * diversity
        return terms


class EntropyMinimization(ClassPredictions):
    r"""Trains confident predictions on target rows.

    .. math::
        L = \frac{1}{N} \sum_{i=1}^{N} H(p_i)

    It moves the decision boundary to where target rows are few. A sum over rows, it needs no large
    batch and says nothing of class frequencies; but what the model takes for a class it becomes
    surer of, right or wrong, and alone it may put all rows into one class. Use it with a small
    weight, late in a run (a schedule), or beside a method that aligns features ([`MMD`],
    [`CORAL`]); else [`MCC`], [`BNM`] or [`InformationMaximization`].

    Reference:
        Grandvalet & Bengio 2004, "Semi-supervised Learning by Entropy Minimization".

    Args:
        weight: Factor of the term, or a schedule of it.
        name: Prefix of the logs.

    Logs:
        `loss/entropy_minimization`.

    Raises:
        ValueError: If the weight is negative.

    Example:
        >>> EntropyMinimization().weight
        0.1
    """

    name = "entropy_minimization"
    needs_streams = ("target",)

    def __init__(self, weight: float | Schedule = 0.1, name: str | None = None) -> None:
        super().__init__(weight, name=name)

    def num_items(self, rows: Rows) -> torch.Tensor:
        """The number of target rows (or tokens), each of which has a prediction."""
        return rows.num_predictions(target_only=True)

    def loss(self, batch: Batch) -> Term:
        """The entropy of the target rows' predictions, summed."""
        logits, domain = self.class_logits(batch)
        target = logits[domain > 0]
        return prediction_entropy(target).sum(), torch.as_tensor(len(target), device=logits.device)
