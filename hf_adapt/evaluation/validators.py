"""Validators: how good a model is on the target, judged without target labels.

Each takes arrays or tensors and returns a number; higher is better. None of them is safe alone: a
score of the target's predictions alone rewards a model that has collapsed, and whatever a method
trains must not judge it. [`hf_adapt.evaluation.choose`] ranks by another, which looks at features
before training: [`neighbor_agreement`].
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from hf_adapt.evaluation.arrays import (
    Array,
    as_array,
    as_classes,
    as_features,
    as_logits,
    as_prior,
    extra,
    log_softmax,
    softmax,
)
from hf_adapt.evaluation.importance_weights import DomainWeights
from hf_adapt.evaluation.linear_models import logistic_regression


def entropy(logits: Array) -> float:
    r"""Mean negative entropy of the predictions: high where the model is sure of each item.

    .. math::
        \frac{1}{N} \sum_i \sum_c p_{ic} \log p_{ic}

    Highest for a model that gives everything one class, so never use it alone.

    Reference:
        Morerio et al. 2018, "Minimal-Entropy Correlation Alignment", arXiv:1711.10288.

    Args:
        logits: Scores of each class for target items.

    Shape:
        - logits: (N, C).

    Returns:
        From -ln C to 0, in nats.

    Example:
        >>> round(entropy([[0.0, 0.0], [0.0, 0.0]]), 4)
        -0.6931
    """
    logs = log_softmax(as_logits(logits))
    return float((np.exp(logs) * logs).sum(1).mean())


def information_maximization(logits: Array, prior: Array | None = None) -> float:
    r"""Sure of each item, and as frequent as expected over all.

    .. math::
        -\frac{1}{N} \sum_i H(p_i) - \mathrm{KL}(\bar p \,\Vert\, \pi)

    Reference:
        Shi & Sha 2012, "Information-Theoretical Learning of Discriminative Clusters",
        arXiv:1206.6438; the prior in place of a uniform one is ours.

    Args:
        logits: Scores of each class for target items.
        prior: The target's class frequencies π; uniform by default. None of them may be 0 unless
            the class is never predicted.

    Shape:
        - logits: (N, C); prior: (C,).

    Returns:
        At most 0, in nats.

    Example:
        >>> round(information_maximization([[0.0, 0.0]]), 4)
        -0.6931
    """
    scores = as_logits(logits)
    mean = softmax(scores).mean(0)
    expected = np.maximum(as_prior(prior, len(mean)), 1e-4)
    divergence = np.where(mean > 0, mean * np.log(np.maximum(mean, 1e-300) / expected), 0.0).sum()
    return entropy(scores) - float(divergence)


def nuclear_norm(logits: Array) -> float:
    r"""Nuclear norm of the predicted probabilities: high where they are sure and varied.

    .. math::
        \frac{\lVert P \rVert_*}{\sqrt{N \min(N, C)}}

    Reference:
        Cui et al. 2020, "Towards Discriminability and Diversity: Batch Nuclear-norm Maximization",
        arXiv:2003.12237; as a validator Musgrave et al. 2022, arXiv:2208.07360.
        Deviation: divided by its largest value.

    Args:
        logits: Scores of each class for target items.

    Shape:
        - logits: (N, C).

    Returns:
        Up to 1, for sure predictions of equally frequent classes.

    Example:
        >>> round(nuclear_norm([[99.0, 0.0], [0.0, 99.0]]), 4)
        1.0
    """
    probabilities = softmax(as_logits(logits))
    norm = np.linalg.svd(probabilities, compute_uv=False).sum()
    rows, classes = probabilities.shape
    return float(norm / np.sqrt(rows * min(rows, classes)))


def importance_weighted(
    source_features: Array, source_losses: Array, target_features: Array
) -> float:
    r"""Importance-weighted validation: the loss on held-out source items that look like the target.

    .. math::
        -\frac{1}{N} \sum_i w_i \ell_i

    The weights are those of [`density_ratio`].

    Reference:
        Sugiyama et al. 2007, "Covariate Shift Adaptation by Importance Weighted Cross Validation",
        JMLR 8.

    Args:
        source_features: Features of held-out source items.
        source_losses: Their losses: cross-entropies, or 0 and 1 for right and wrong.
        target_features: Features of target items.

    Shape:
        - source_features: (N, D); source_losses: (N,); target_features: (M, D).

    Returns:
        The negative loss, in the unit of the losses.

    Raises:
        UntrustedWeights: If the effective sample size is below 30, or the domains do not overlap.
    """
    losses = _losses(source_losses, source_features)
    weights = DomainWeights(source_features, target_features).trusted()
    return float(-(weights * losses).mean())


def deep_embedded(source_features: Array, source_losses: Array, target_features: Array) -> float:
    r"""Deep embedded validation: importance weighting with a control variate.

    .. math::
        -\Big( \overline{w \ell} + \eta \bar w - \eta \Big), \qquad
        \eta = -\frac{\mathrm{Cov}(w \ell, w)}{\mathrm{Var}(w)}

    Reference:
        You et al. 2019, "Towards Accurate Model Selection in Deep Unsupervised Domain Adaptation",
        ICML, Eq. 9.
        Deviation: the weights are those of [`density_ratio`], not divided by their mean, which is
        what the control variate corrects.

    Args:
        source_features: Features of held-out source items.
        source_losses: Their losses.
        target_features: Features of target items.

    Shape:
        - source_features: (N, D); source_losses: (N,); target_features: (M, D).

    Returns:
        The negative risk, in the unit of the losses.

    Raises:
        UntrustedWeights: If the effective sample size is below 30, or the domains do not overlap.
    """
    losses = _losses(source_losses, source_features)
    weights = DomainWeights(source_features, target_features).trusted(normalize=False)
    return controlled_risk(weights, losses)


def controlled_risk(weights: Array, losses: Array) -> float:
    """The negative risk of [`deep_embedded`] for given weights."""
    w = as_array(weights, "weights", 1).astype(np.float64)
    weighted = w * as_array(losses, "losses", 1).astype(np.float64)
    variance = w.var()
    eta = -np.cov(weighted, w, ddof=0)[0, 1] / variance if variance > 0 else 0.0
    return float(-(weighted.mean() + eta * w.mean() - eta))


def _losses(source_losses: Array, source_features: Array) -> np.ndarray:
    losses = as_array(source_losses, "source_losses", 1).astype(np.float64)
    count = len(as_features(source_features, "source_features"))
    if len(losses) != count:
        raise ValueError(
            f"Expected a loss for each of the {count} source items, got {len(losses)}."
        )
    return losses


def circular(
    target_features: Array,
    target_predictions: Array,
    source_features: Array,
    source_labels: Array,
) -> float:
    """Circular (reverse) validation: whether the target's predictions teach the source's labels.

    A logistic regression is fitted to target features and what the model predicts for them, and
    tested on the source: its balanced accuracy there.

    Reference:
        Bruzzone & Marconcini 2010, "Domain Adaptation Problems: A DASVM Classification Technique
        and a Circular Validation Strategy", TPAMI 32.
        Deviation: a linear classifier on the model's features, not a second adaptation.

    Args:
        target_features: Features of target items.
        target_predictions: Their predicted classes, or logits.
        source_features: Features of held-out source items.
        source_labels: Their labels.

    Shape:
        - target_features: (M, D); target_predictions: (M,) or (M, C); source_features: (N, D);
          source_labels: (N,).

    Returns:
        From 0 to 1; chance, 1 over the number of classes, where one class alone is predicted.
    """
    target = as_features(target_features, "target_features")
    source = as_features(source_features, "source_features")
    labels = as_classes(source_labels, "source_labels", len(source))
    if np.ndim(target_predictions) == 2:
        target_predictions = as_logits(target_predictions).argmax(1)
    predicted = as_classes(target_predictions, "target_predictions", len(target))
    known = np.unique(predicted)
    if len(known) < 2:
        return 1 / len(np.unique(labels))
    guesses = known[logistic_regression(target, predicted)(source).argmax(1)]
    right = guesses == labels
    return float(np.mean([right[labels == number].mean() for number in np.unique(labels)]))


def class_ami(logits: Array, features: Array, seed: int = 0) -> float:
    """Adjusted mutual information of predicted classes and clusters of the features.

    Reference:
        Musgrave et al. 2022, "Three New Validators and a Large-Scale Benchmark Ranking for
        Unsupervised Domain Adaptation", arXiv:2208.07360.
        Deviation: k-means starts at the means of the predicted classes, which makes it certain.

    Args:
        logits: Scores of each class for target items.
        features: Their features.
        seed: Where clusters of classes that are not predicted start.

    Shape:
        - logits: (N, C); features: (N, D).

    Returns:
        At most 1; 0 by chance, and where one class alone is predicted.
    """
    scores, items = as_logits(logits), as_features(features)
    if len(scores) != len(items):
        raise ValueError(f"Expected a feature for each of {len(scores)} items, got {len(items)}.")
    classes = min(scores.shape[1], len(items))
    predicted = scores.argmax(1)
    starts = [items[predicted == number].mean(0) for number in np.unique(predicted)]
    if len(starts) < 2:
        return 0.0
    others = np.random.default_rng(seed).permutation(len(items))
    starts += [items[number] for number in others[: classes - len(starts)]]
    make, measure = extra("sklearn.cluster").KMeans, extra("sklearn.metrics")
    clusters = make(len(starts), init=np.stack(starts), n_init=1, random_state=seed)
    return float(measure.adjusted_mutual_info_score(predicted, clusters.fit_predict(items)))


def soft_neighborhood_density(logits: Array, temperature: float = 0.05, block: int = 512) -> float:
    r"""Soft neighbourhood density: whether predictions form dense groups.

    .. math::
        -\frac{1}{N} \sum_i \sum_{j \ne i} P_{ij} \log P_{ij}, \qquad
        P_{i \cdot} = \mathrm{softmax}_{j \ne i} \big( \hat p_i^\top \hat p_j / \tau \big)

    Computed in blocks, so that memory grows with N. It rewards a model that gives everything the
    same prediction.

    Reference:
        Saito et al. 2021, "Tune it the Right Way: Unsupervised Validation of Domain Adaptation via
        Soft Neighborhood Density", Eq. 3-4, arXiv:2108.10860.

    Args:
        logits: Scores of each class for target items; the normalised probabilities are compared.
        temperature: τ.
        block: How many rows of the matrix are held at once.

    Shape:
        - logits: (N, C), N at least 2.

    Returns:
        From 0 to ln(N - 1), in nats.

    Example:
        >>> round(soft_neighborhood_density([[1.0, 0.0]] * 5), 4)  # ln 4
        1.3863
    """
    if not temperature > 0:
        raise ValueError(f"Expected a positive temperature, got {temperature}.")
    probabilities = torch.from_numpy(softmax(as_logits(logits)))
    rows = len(probabilities)
    if rows < 2:
        raise ValueError("Expected at least two items, whose neighbours they are; got one.")
    unit = torch.nn.functional.normalize(probabilities).float() / temperature**0.5
    total = 0.0
    for start in range(0, rows, block):
        # Less their maximum 1 / τ: nothing overflows, and one pass of exp does.
        similarity = (unit[start : start + block] @ unit.T).sub_(1 / temperature)
        numbers = torch.arange(len(similarity))
        similarity[numbers, numbers + start] = -100 / temperature  # the item itself: e^-2000 = 0
        shares = similarity.exp()
        sums = shares.sum(1).double()
        means = torch.linalg.vecdot(shares, similarity).double() / sums
        total += float((sums.log() - means).sum())
    return total / rows


def ensemble_agreement(
    list_of_logits: Sequence[Array], candidate: int | Array | None = None
) -> float:
    r"""EnsV: how often a model agrees with the mean of all candidates.

    .. math::
        \frac{1}{N} \sum_i \big[ \arg\max p^{(m)}_i = \arg\max \sum_{m'} p^{(m')}_i \big]

    Reference:
        Hu et al. 2024, "Towards Reliable Model Selection for Unsupervised Domain Adaptation"
        (EnsV), NeurIPS Datasets and Benchmarks.

    Args:
        list_of_logits: The scores of each candidate for the same target items, in the same order.
        candidate: The number of the candidate, or the scores of any other model; the mean over all
            candidates by default.

    Shape:
        - each: (N, C).

    Returns:
        From 0 to 1.

    Example:
        >>> logits = [[[9.0, 0.0], [0.0, 9.0]], [[9.0, 0.0], [9.0, 0.0]], [[9.0, 0.0], [0.0, 9.0]]]
        >>> ensemble_agreement(logits, 0), ensemble_agreement(logits, 1)
        (1.0, 0.5)
    """
    scores = [as_logits(each) for each in list_of_logits]
    if not scores:
        raise ValueError("Expected the logits of at least one candidate, got none.")
    if len({each.shape for each in scores}) > 1:
        raise ValueError(
            f"Expected logits of one shape, got {[each.shape for each in scores]}. Predict the "
            "same items with each candidate."
        )
    ensemble = np.sum([softmax(each) for each in scores], axis=0).argmax(1)
    if isinstance(candidate, (int, np.integer)):
        if not 0 <= candidate < len(scores):
            raise ValueError(f"candidate={candidate} is none of 0 to {len(scores) - 1}.")
        scores = [scores[candidate]]
    elif candidate is not None:
        other = as_logits(candidate)
        if other.shape != scores[0].shape:
            raise ValueError(
                f"Expected a candidate's logits of shape {scores[0].shape}, got {other.shape}."
            )
        scores = [other]
    return float(np.mean([(each.argmax(1) == ensemble).mean() for each in scores]))


def class_balance(logits: Array, prior: Array | None = None) -> float:
    r"""How near the predicted classes' shares are to the expected ones.

    .. math::
        1 - \frac{1}{2} \sum_c \lvert \bar y_c - \pi_c \rvert

    Args:
        logits: Scores of each class for target items.
        prior: The target's class frequencies; uniform by default.

    Shape:
        - logits: (N, C); prior: (C,).

    Returns:
        From 0 to 1.

    Example:
        >>> class_balance([[1.0, 0.0], [1.0, 0.0]], [0.75, 0.25])
        0.75
    """
    scores = as_logits(logits)
    classes = scores.shape[1]
    shares = np.bincount(scores.argmax(1), minlength=classes) / len(scores)
    return float(1 - np.abs(shares - as_prior(prior, classes)).sum() / 2)
