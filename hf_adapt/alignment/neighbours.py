"""Objectives on the nearest neighbours of target rows, in a memory of all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from hf_adapt.alignment.predictions import predicted_features
from hf_adapt.alignment.priors import Priors
from hf_adapt.alignment.row_bank import RowBankObjective
from hf_adapt.engine.adaptation import Term
from hf_adapt.engine.progress import Schedule, linear_ramp, value_at
from hf_adapt.engine.streams import TARGET
from hf_adapt.models.pooling import Pooling

if TYPE_CHECKING:
    from transformers import Trainer

    from hf_adapt.engine.batch import Batch, Rows


class NeighbourObjective(RowBankObjective):
    """Keeps feature and prediction of every target row, and finds the rows most like one.

    The memory is filled by a pass over the target before the first step, and follows the batches
    of all processes from then on: what a step has seen is in it from the next step on, so that
    micro-batches do not depend on each other. It takes 4 · (D + C) bytes a row, on the device of
    the run, and lies in the checkpoint.

    Attributes:
        num_neighbours: Number K of neighbours, the row itself left out.
    """

    needs_streams = (TARGET,)
    num_neighbours: int = 5

    def _check_neighbours(self) -> None:
        if self.num_neighbours < 1:
            raise ValueError(f"num_neighbours={self.num_neighbours} must be at least 1.")

    def setup(self, trainer: Trainer) -> None:
        """Forget the rows of an earlier run."""
        super().setup(trainer)
        self._seen: list[tuple[torch.Tensor, dict[str, torch.Tensor]]] = []

    def before_step(self, step: int) -> None:
        """Fill the memory, or take in what the last step has seen."""
        super().before_step(step)
        if not len(self.bank):
            found = self._trainer.sweep(self, TARGET, self._values)
            self.fill_bank(found.pop("keys"), **found)
            if len(self.bank) <= self.num_neighbours:
                raise ValueError(
                    f"{type(self).__name__}(num_neighbours={self.num_neighbours}) needs more "
                    f"different target rows than neighbours; there are {len(self.bank)}."
                )
            self.bank.values["predictions"] = self.remembered(self.bank.values.pop("logits"))
        self._take_in()

    def _values(self, batch: Batch) -> dict[str, torch.Tensor]:
        features, logits = self._items(batch)
        return {"keys": batch.keys(), "features": F.normalize(features), "logits": logits}

    def _items(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The features and predictions of all items."""
        features, logits, _ = predicted_features(batch, type(self).__name__)
        return features, logits

    def remembered(self, logits: torch.Tensor) -> torch.Tensor:
        """What the memory keeps of predictions, (N, C)."""
        return logits.float().softmax(1)

    def neighbours(self, features: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """The places in the memory of the rows that are most like these, (N, K).

        Args:
            features: (N, D), normalised.
            keys: (N,) long, their keys, which are left out.
        """
        similarity = features @ self.bank.values["features"].T
        places, known = self.bank.find(keys)
        # Cosines are at most 1: less 4, the row itself comes last.
        own = known.to(similarity).unsqueeze(1) * -4
        similarity = similarity.scatter_add(1, places.unsqueeze(1), own)
        return similarity.topk(self.num_neighbours, dim=1).indices

    def remember(self, keys: torch.Tensor, features: torch.Tensor, logits: torch.Tensor) -> None:
        """Keep what all processes have seen of these rows, for the next step."""
        values = {
            "features": features.detach(),
            "predictions": self.remembered(logits.detach()) if len(logits) else logits.detach(),
        }
        accelerator = self._trainer.accelerator
        if accelerator.num_processes > 1:
            real = torch.ones_like(keys)
            padded = accelerator.pad_across_processes([keys, real, *values.values()], dim=0)
            keys, real, *rest = accelerator.gather(padded)
            keys = keys[real > 0]
            values = {n: each[real > 0] for n, each in zip(values, rest, strict=True)}
        self._seen.append((keys, values))

    def _take_in(self) -> None:
        for keys, values in self._seen:
            places, known = self.bank.find(keys)
            for name, value in values.items():
                self.bank.values[name][places[known]] = value[known]
        self._seen = []

    def state_dict(self) -> dict[str, Any]:
        """The memory, with what was seen last, and the class frequencies."""
        self._take_in()
        return super().state_dict()


class ATDOC(NeighbourObjective):
    r"""Trains target rows on what their nearest neighbours among all target rows are predicted as.

    .. math::
        \hat q_i = \frac{1}{K} \sum_{j \in \mathrm{NN}_K(i)} q_j, \quad
        \hat y_i = \arg\max_c \hat q_{ic}, \quad
        L = \frac{\sum_i \hat q_{i \hat y_i} \, (-\log p_{i \hat y_i})}{\sum_i \hat q_{i \hat y_i}},
        \quad q_{jc} = \pi_c \frac{p_{jc}^2}{\sum_{j'} p_{j'c}^2}

    The sum over j' runs over the memory, so that each class has its share. [`SelfTraining`] is
    stronger where the class frequencies are known; this needs no threshold.

    Reference:
        Liang et al. 2021, "Domain Adaptation with Auxiliary Target Domain-Oriented Classifier",
        Eq. 7-9, arXiv:2007.04171.
        Deviations: the memory starts with the model's predictions rather than uniform ones; the
        sum over j' runs over it, not over a micro-batch, whose size would decide how much a row
        counts beside those of others; π is uniform in the paper.

    Args:
        weight: Factor of the term, or a schedule of it; the paper's rises linearly to 0.2.
        num_neighbours: Number K of neighbours.
        prior: Class frequencies for this objective alone, in place of the run's `target_priors`.
            Uniform where neither is given.
        feature_layer: Dotted name of the module whose features are compared.
        pooling: `"mean"`, `"cls"`, `"last"`, `"tokens"`, a callable, or `"auto"`.
        name: Prefix of the logs.

    Logs:
        `loss/atdoc`, `atdoc/agreement` (share of target rows predicted as their neighbours are).

    Raises:
        ValueError: If the weight is negative or there are no neighbours.

    Example:
        >>> ATDOC(num_neighbours=3).name
        'atdoc'
    """

    name = "atdoc"

    def __init__(
        self,
        weight: float | Schedule = linear_ramp(end_value=0.2),  # noqa: B008 - a pure function
        num_neighbours: int = 5,
        prior: Priors | None = None,
        feature_layer: str | None = None,
        pooling: Pooling = "auto",
        name: str | None = None,
    ) -> None:
        super().__init__(weight, feature_layer, pooling, name)
        self.num_neighbours = num_neighbours
        self.prior = prior
        self._check_neighbours()

    def remembered(self, logits: torch.Tensor) -> torch.Tensor:
        """The squared predictions."""
        return logits.float().softmax(1).square()

    def loss(self, batch: Batch) -> Term:
        """The weighted cross-entropy with the neighbours' labels."""
        features, logits = self._items(batch)
        if not len(self.bank):  # a first batch is looked at before the memory is filled
            return logits.sum() * 0.0
        target, keys = batch.is_in(batch.item_domain()), batch.keys()
        logits, keys = logits[target], keys[target]
        with torch.no_grad():
            features = F.normalize(features[target])
            squared = self.bank.values["predictions"]
            factors = self.target_priors(squared.shape[1]).to(squared)
            factors = factors / squared.sum(0).clamp_min(1e-12)
            near = squared[self.neighbours(features, keys)].mean(1) * factors
            confidence, labels = near.max(1) if len(near) else (near.sum(1), keys)
            self.remember(keys, features, logits)
        if not len(logits):
            return logits.sum() * 0.0
        batch.log("agreement", (logits.argmax(1) == labels).float().mean(), len(labels))
        losses = F.cross_entropy(logits, labels, reduction="none")
        return (confidence * losses).sum() / confidence.sum().clamp_min(1e-12)


class AaD(NeighbourObjective):
    r"""Draws the predictions of neighbouring target rows together and those of others apart.

    .. math::
        L = -\frac{1}{N} \sum_i \sum_{j \in \mathrm{NN}_K(i)} p_i^\top q_j
            + (1 + 10 t)^{-\beta} \frac{1}{N} \sum_i \sum_{k \neq i} p_i^\top p_k

    t is progress; k runs over the target rows of the micro-batch. Made for a source-free second
    stage; beside the source's loss it works as well. It takes all classes for equally frequent.

    Reference:
        Yang et al. 2022, "Attracting and Dispersing: A Simple Approach for Source-free Domain
        Adaptation", Eq. 5, arXiv:2205.04183.

    Args:
        weight: Factor of the term, or a schedule of it.
        num_neighbours: Number K of neighbours.
        decay: β, how fast dispersion gives way to attraction.
        feature_layer: Dotted name of the module whose features are compared.
        pooling: `"mean"`, `"cls"`, `"last"`, `"tokens"`, a callable, or `"auto"`.
        name: Prefix of the logs.

    Logs:
        `loss/aad`, `aad/attraction`, `aad/dispersion`.

    Raises:
        ValueError: If the weight or the decay is negative or there are no neighbours.

    Example:
        >>> AaD(decay=2.0).name
        'aad'
    """

    name = "aad"

    def __init__(
        self,
        weight: float | Schedule = 0.1,
        num_neighbours: int = 5,
        decay: float = 5.0,
        feature_layer: str | None = None,
        pooling: Pooling = "auto",
        name: str | None = None,
    ) -> None:
        super().__init__(weight, feature_layer, pooling, name)
        if decay < 0:
            raise ValueError(f"decay={decay} must not be negative.")
        self.num_neighbours = num_neighbours
        self.decay = decay
        self._check_neighbours()

    def num_items(self, rows: Rows) -> torch.Tensor:
        """The number of target rows (or tokens)."""
        return rows.num_predictions(target_only=True)

    def loss(self, batch: Batch) -> dict[str, Term]:
        """Attraction, summed over the rows, and dispersion, of the micro-batch."""
        features, logits = self._items(batch)
        if not len(self.bank):  # a first batch is looked at before the memory is filled
            return {"attraction": (logits.sum() * 0.0, torch.ones_like(logits.sum()))}
        target, keys = batch.is_in(batch.item_domain()), batch.keys()
        p, keys = logits[target].softmax(1), keys[target]
        with torch.no_grad():
            features = F.normalize(features[target])
            near = self.bank.values["predictions"][self.neighbours(features, keys)].sum(1)
            self.remember(keys, features, logits[target])
        others = (p @ p.T).sum() - p.square().sum()
        alpha = value_at(lambda t: (1 + 10 * t) ** -self.decay, batch.progress)
        return {
            "attraction": (-(p * near).sum(), torch.as_tensor(len(p), device=p.device)),
            "dispersion": alpha * others / max(1, len(p)),
        }
