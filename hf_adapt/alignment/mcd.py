"""Maximum classifier discrepancy: two classifiers that disagree where the source says nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from hf_adapt.alignment.adversarial import AdversarialObjective, perceptron
from hf_adapt.alignment.predictions import predicted_features, refuse_other_problems
from hf_adapt.engine.adaptation import Term
from hf_adapt.engine.labels import IGNORED

if TYPE_CHECKING:
    from transformers import Trainer

    from hf_adapt.engine.batch import Batch, Rows


def classifier_discrepancy(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    r"""Mean absolute difference of two classifiers' probabilities, for each item.

    .. math::
        d_i = \frac{1}{C} \sum_{c=1}^{C} |\mathrm{softmax}(z_i)_c - \mathrm{softmax}(z'_i)_c|

    Reference:
        Saito et al. 2018, "Maximum Classifier Discrepancy for Unsupervised Domain Adaptation",
        Eq. 2, arXiv:1712.02560.

    Args:
        one: Scores of each class by one classifier, any floating dtype; computed in float32.
        other: Scores by the other.

    Shape:
        - one, other: (N, C); output: (N,), from 0 to 2 / C.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> sure = torch.tensor([[99.0, -99.0]])
        >>> classifier_discrepancy(sure, -sure).tolist()
        [1.0]
    """
    if one.ndim != 2 or one.shape != other.shape:
        raise ValueError(
            "classifier_discrepancy expects two tensors of scores (N, C), got "
            f"{tuple(one.shape)} and {tuple(other.shape)}."
        )
    dtype = torch.promote_types(one.dtype, torch.float32)
    return (one.to(dtype).softmax(-1) - other.to(dtype).softmax(-1)).abs().mean(-1)


class MCD(AdversarialObjective):
    """Maximum classifier discrepancy: target features on which two classifiers agree.

    Two classifiers on the features learn the source's labels and to disagree on target rows; the
    gradient of the disagreement is reversed, so that the model moves target features to where the
    source determines their class. It needs no domains to be alike as a whole, as [`DANN`] does. Use
    it with balanced classes; with two classes, or rare ones, it has little to go by.

    Reference:
        Saito et al. 2018, "Maximum Classifier Discrepancy for Unsupervised Domain Adaptation",
        arXiv:1712.02560.
        Deviations: one backward with a reversed gradient instead of three alternating steps; the
        model keeps its own head, which is the one that is saved, and the two classifiers are
        auxiliary; their cross-entropy does not train the model, whose own loss does.

    Args:
        weight: Peak λ, or a schedule of it; a constant 0 turns the objective off.
        **adversary: Further arguments: `ramp`, `feature_layer`, `pooling`, `hidden_sizes`,
            `dropout`, `learning_rate`, `weight_decay`, `name`, as [`DANN`] has them.

    Logs:
        `loss/mcd`, `mcd/source` (cross-entropy of the two classifiers), `mcd/target` (minus their
        discrepancy), `mcd/lambda`, `mcd/gradient_ratio`.

    Raises:
        ValueError: If an argument is out of range; on the first batch if the model does not predict
            exclusive classes for the items that its features are of.

    Example:
        >>> MCD(weight=0.5).name
        'mcd'
    """

    name = "mcd"

    def setup(self, trainer: Trainer) -> None:
        """Refuse a model without classes."""
        refuse_other_problems(trainer.model, "MCD")

    def build_modules(self, batch: Batch) -> nn.ModuleList:
        """The two classifiers."""
        features, logits, _ = predicted_features(batch, "MCD")
        sizes = features.shape[1], self.hidden_sizes, logits.shape[1], self.dropout
        return nn.ModuleList([perceptron(*sizes), perceptron(*sizes)])

    def num_items(self, rows: Rows) -> dict[str, torch.Tensor]:
        """The features of each side; those of the source without a label count too."""
        target = rows.num_features(target_only=True)
        return {"source": rows.num_features() - target, "target": target}

    def loss(self, batch: Batch) -> dict[str, Term]:
        """The classifiers' cross-entropy on the source, minus their discrepancy on the target."""
        assert isinstance(self.module, nn.ModuleList)
        features, domain = batch.features()
        is_target = domain > 0
        source, target = features[~is_target].detach(), self.reversed(features, batch)[is_target]
        labels = batch.labels("features")[~is_target]
        one, other = self.module
        errors = [
            F.cross_entropy(classifier(source), labels, ignore_index=IGNORED, reduction="sum")
            for classifier in (one, other)
        ]
        discrepancy = classifier_discrepancy(one(target), other(target))
        return {
            "source": (errors[0] + errors[1], _count(source)),
            "target": (-discrepancy.sum(), _count(target)),
        }


def _count(items: torch.Tensor) -> torch.Tensor:
    return torch.as_tensor(len(items), device=items.device)
