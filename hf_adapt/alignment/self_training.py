"""Self-training: the model's own confident predictions for target rows as their labels."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from hf_adapt.alignment.priors import LEAST, Priors
from hf_adapt.alignment.row_bank import RowBankObjective
from hf_adapt.engine.adaptation import Term
from hf_adapt.engine.progress import Schedule
from hf_adapt.engine.streams import TARGET
from hf_adapt.models.averages import RunningAverage

if TYPE_CHECKING:
    from transformers import Trainer

    from hf_adapt.engine.batch import Batch, Rows
    from hf_adapt.engine.parts import Part

logger = logging.getLogger(__name__)

View = Callable[[dict[str, Any]], dict[str, Any]]


def aligned_predictions(
    probabilities: torch.Tensor, priors: torch.Tensor, rounds: int = 200
) -> torch.Tensor:
    r"""Predictions whose mean is the given class frequencies (distribution alignment).

    .. math::
        q_{ic} \propto p_{ic} \, e^{b_c}, \qquad \frac{1}{N} \sum_i q_{ic} = \pi_c

    Reference:
        Berthelot et al. 2020, "ReMixMatch", Section 3.1, arXiv:1911.09785.
        Deviation: the bias is found by iteration, so that the mean is met (but for very peaked
        predictions); the paper scales once.

    Args:
        probabilities: Predictions of all rows.
        priors: Class frequencies; a 0 counts as 0.0001.
        rounds: Steps of the iteration.

    Shape:
        - probabilities: (N, C), priors: (C,); output: (N, C).

    Example:
        >>> p = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]])
        >>> aligned_predictions(p, torch.tensor([0.5, 0.5])).argmax(1).tolist()
        [0, 0, 1, 1]
    """
    logits = probabilities.double().clamp_min(1e-12).log()
    wanted = priors.to(logits).clamp_min(LEAST)
    wanted = (wanted / wanted.sum()).log()
    bias = torch.zeros_like(wanted)
    for _ in range(rounds):
        mean = (logits + bias).softmax(1).mean(0)
        bias = bias + 0.5 * (wanted - mean.clamp_min(1e-12).log())
    return (logits + bias).softmax(1).to(probabilities.dtype)


def balanced_pseudo_labels(
    probabilities: torch.Tensor, priors: torch.Tensor, share: float
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""The label of each row, and which rows are confident enough to be trained on.

    Predictions are first aligned with the class frequencies ([`aligned_predictions`]); of class c
    the :math:`k \pi_c N` most confident rows are kept, so that no class crowds out another.

    Reference:
        Zou et al. 2018, "Unsupervised Domain Adaptation for Semantic Segmentation via
        Class-Balanced Self-Training", Eq. 8, arXiv:1810.07911.

    Args:
        probabilities: Predictions of all rows.
        priors: Class frequencies π.
        share: k, the share of each class that is kept, from 0 to 1.

    Shape:
        - probabilities: (N, C), priors: (C,); outputs: (N,) long, (N,) bool.

    Example:
        >>> p = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]])
        >>> labels, kept = balanced_pseudo_labels(p, torch.tensor([0.5, 0.5]), 0.5)
        >>> labels.tolist(), kept.tolist()
        ([0, 0, 1, 1], [True, False, False, True])
    """
    aligned = aligned_predictions(probabilities, priors)
    labels = aligned.argmax(1)
    # By the margin of the logarithms: predictions that are rounded to 1 still differ in it.
    best = aligned.double().clamp_min(1e-300).log().topk(2, dim=1).values
    confidence = best[:, 0] - best[:, 1]
    kept = torch.zeros_like(labels, dtype=torch.bool)
    for number in range(aligned.shape[1]):
        own = (labels == number).nonzero().flatten()
        most = min(len(own), round(share * float(priors[number]) * len(aligned)))
        kept[own[confidence[own].argsort(descending=True, stable=True)[:most]]] = True
    return labels, kept


class SelfTraining(RowBankObjective):
    r"""Trains on the model's own confident predictions for target rows, class by class.

    At each refresh the model labels all target rows; the most confident share of each class is
    trained on like source rows until the next one, with dropout (or a `view` of your own) as the
    noise:

    .. math::
        L = \frac{1}{|K|} \sum_{i \in K} -\log p_{i, \hat y_i}

    It is the strongest of the methods here where the class frequencies of the target are known at
    least roughly (`target_priors`), and may do harm where they are wrong. A refresh
    costs a forward of all target rows; between them only rows with a label go through the model.

    Reference:
        Zou et al. 2018, arXiv:1810.07911 (class balance); Tarvainen & Valpola 2017,
        arXiv:1703.01780 (`teacher_decay`).
        Deviation: the frequencies are given rather than taken from the predictions, which are
        aligned with them first.

    Args:
        weight: Factor of the term, or a schedule of it.
        shares: The share of each class that is kept, at the first and at the last refresh; it grows
            linearly between them.
        refreshes: When the rows are labelled again, as progress from 0 to 1. Before the first one
            the term is 0.
        teacher_decay: Label by a moving average of the weights with this decay; None for the
            model's own.
        view: Makes the inputs that are trained on from a batch's inputs (as `batch.forward` has
            it), in a further forward; None for the same forward, with its dropout.
        prior: Class frequencies for this objective alone, in place of the run's `target_priors`.
            `"predicted"` where neither is given: half-way from uniform frequencies to the model's
            own mean prediction for the target rows.
        name: Prefix of the logs.

    Logs:
        `loss/self_training`, `self_training/kept` (the share of the target rows that are trained
        on), `self_training/agreement` (of those, which the model still labels alike).

    Raises:
        ValueError: If an option is out of range.

    Example:
        >>> SelfTraining(shares=(0.5, 0.8), refreshes=(0.4, 0.7)).name
        'self_training'
    """

    name = "self_training"
    needs_streams = (TARGET,)
    default_prior = "predicted"

    def __init__(
        self,
        weight: float | Schedule = 1.0,
        shares: Sequence[float] = (0.4, 0.8),
        refreshes: Sequence[float] = (0.5, 0.75),
        teacher_decay: float | None = None,
        view: View | None = None,
        prior: Priors | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(weight, name=name)
        if len(shares) != 2 or not all(0 < share <= 1 for share in shares):
            raise ValueError(f"shares={shares}: two numbers above 0 and at most 1, first and last.")
        if not refreshes or not all(0 <= when < 1 for when in refreshes):
            raise ValueError(f"refreshes={refreshes}: at least one number from 0 to below 1.")
        if teacher_decay is not None and not 0 <= teacher_decay < 1:
            raise ValueError(f"teacher_decay={teacher_decay} must lie in [0, 1).")
        self.shares = tuple(shares)
        self.refreshes = tuple(sorted(refreshes))
        self.view = view
        self.prior = prior
        self.average = None if teacher_decay is None else RunningAverage(teacher_decay)
        self._kept = 0.0
        self._rows = torch.zeros(0, dtype=torch.long)

    def setup(self, trainer: Trainer) -> None:
        """Forget the labels of an earlier run."""
        super().setup(trainer)
        self._kept = 0.0

    def begin(self, trainer: Trainer) -> None:
        """Start the average at the weights that training starts from."""
        if self.average is not None:
            self.average.start(trainer.accelerator.unwrap_model(trainer.model))

    def share_at(self, step: int, max_steps: int) -> float | None:
        """The share that is kept from this step on, or None if nothing is labelled at it."""
        steps = [min(round(when * max_steps), max_steps - 1) for when in self.refreshes]
        if step not in steps:
            return None
        turn = len(steps) - 1 - steps[::-1].index(step)
        first, last = self.shares
        return last if len(steps) == 1 else first + (last - first) * turn / (len(steps) - 1)

    def before_step(self, step: int) -> None:
        """Label the target rows, where it is time."""
        super().before_step(step)
        trainer = self._trainer
        if self.average is not None:
            self.average.follow(step)
        share = self.share_at(step, trainer.state.max_steps)
        if share is not None:
            self.refresh(share)

    def _predictions(self, batch: Batch) -> dict[str, torch.Tensor]:
        logits, _ = self.class_logits(batch)
        return {"logits": logits, "keys": batch.keys(), "rows": batch.row_keys()}

    def estimation_steps(self) -> Collection[int]:
        """None: they are estimated whenever rows are labelled."""
        return ()

    def refresh(self, share: float) -> None:
        """Label the target rows by the model (or its average) as it is now."""
        trainer: Any = self._trainer
        weights = None if self.average is None else self.average.weights
        found = trainer.sweep(self, TARGET, self._predictions, weights)
        self.refresh_priors(found["logits"], weights)
        probabilities = found["logits"].softmax(1)
        if not bool(probabilities.isfinite().all()):
            raise ValueError(
                f"{self.name}: the model's predictions for target rows are not finite. Lower the "
                "learning rate, or look for the term that became NaN in the log."
            )
        priors = self.target_priors(probabilities.shape[1]).cpu()
        labels, kept = balanced_pseudo_labels(probabilities, priors, share)
        shares = torch.bincount(labels, minlength=len(priors)) / len(labels)
        logger.info(
            "%s: labelled %d target rows, kept %d; classes %s",
            self.name,
            len(labels),
            int(kept.sum()),
            [round(x, 3) for x in shares.tolist()],
        )
        self.fill_bank(found["keys"][kept], label=labels[kept])
        self._rows = found["rows"][kept].unique()  # of a tagger, those with a token that is kept
        self._kept = float(kept.float().mean())

    def _labels(self, rows: Rows, domain: torch.Tensor) -> torch.Tensor:
        """The pseudo-label of each item, -1 where it has none."""
        return torch.where(rows.is_in(domain), self.labels_of(rows.keys()), -1)

    def wanted_rows(self, part: Part) -> torch.Tensor:
        """The rows with a pseudo-label."""
        if not len(self.bank):
            return torch.zeros_like(part.keys, dtype=torch.bool)
        return torch.isin(part.keys, self._rows.to(part.keys.device))

    def num_items(self, rows: Rows) -> torch.Tensor:
        """The number of target rows (or tokens) with a pseudo-label."""
        return (self._labels(rows, rows.item_domain()) >= 0).sum()

    def loss(self, batch: Batch) -> Term:
        """The cross-entropy with the pseudo-labels, summed over the rows that have one."""
        seen = batch if self.view is None else batch.forward(self.view, streams=(TARGET,))
        logits, _ = self.class_logits(seen)
        labels = self._labels(batch, batch.item_domain())
        if self.view is not None:
            labels = labels[batch.is_in(batch.item_domain())]
            if len(labels) != len(logits):
                raise ValueError(
                    f"{self.name}: the view has {len(logits)} predictions for {len(labels)} tokens."
                    " For a model with a prediction per token it must keep the attention mask."
                )
        count = (labels >= 0).sum()
        batch.log("kept", self._kept)
        batch.log("agreement", (logits.argmax(1) == labels).sum() / count.clamp_min(1), count)
        return F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum"), count

    def state_dict(self) -> dict[str, Any]:
        """The pseudo-labels, the class frequencies and the average."""
        average = {} if self.average is None else {"average": self.average.state_dict()}
        own = {"kept": self._kept, "rows": self._rows}
        return {**super().state_dict(), **average, **own}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state returned by `state_dict`."""
        super().load_state_dict(state)
        if "bank" in state:
            self._kept, self._rows = state["kept"], state["rows"]
        if self.average is not None and "average" in state:
            self.average.load_state_dict(state["average"])
