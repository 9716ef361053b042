"""Source-free adaptation: a trained model and the target's rows, without the source."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import datasets
import torch
import torch.nn.functional as F

from hf_adapt.alignment.entropy import prediction_entropy, prior_divergence
from hf_adapt.alignment.predictions import predicted_features
from hf_adapt.alignment.priors import Priors
from hf_adapt.alignment.row_bank import RowBankObjective
from hf_adapt.engine.adaptation import Term
from hf_adapt.engine.collating import label_columns
from hf_adapt.engine.progress import Schedule
from hf_adapt.engine.streams import TRAINING
from hf_adapt.engine.trainer import AdaptationTrainer
from hf_adapt.models.pooling import Pooling
from hf_adapt.models.structure import unwrapped_base

if TYPE_CHECKING:
    from transformers import PreTrainedModel, Trainer, TrainingArguments

    from hf_adapt.engine.batch import Batch, Rows

logger = logging.getLogger(__name__)


def centroid_labels(
    features: torch.Tensor, probabilities: torch.Tensor, rounds: int = 1
) -> torch.Tensor:
    r"""The class whose centroid is nearest to each row, by the cosine.

    .. math::
        c_k = \frac{\sum_i p_{ik} f_i}{\sum_i p_{ik}}, \qquad
        \hat y_i = \arg\max_k \cos(f_i, c_k)

    The f have a 1 appended. In each further round the labels take the place of p.

    Reference:
        Liang et al. 2020, "Do We Really Need to Access the Source Data?", Eq. 4-6,
        arXiv:2002.08546.

    Args:
        features: Features of all rows.
        probabilities: Their predictions.
        rounds: Rounds after the first one.

    Shape:
        - features: (N, D), probabilities: (N, C); output: (N,) long.

    Example:
        >>> x = torch.tensor([[4.0, 0.0], [3.0, 1.0], [0.0, 4.0], [1.0, 3.0]])
        >>> p = torch.tensor([[0.9, 0.1], [0.4, 0.6], [0.1, 0.9], [0.2, 0.8]])
        >>> centroid_labels(x, p).tolist()
        [0, 0, 1, 1]
    """
    rows = F.normalize(torch.cat([features.float(), features.new_ones(len(features), 1)], 1))
    shares = probabilities.float()
    labels = torch.zeros(len(rows), dtype=torch.long)
    for _ in range(1 + rounds):
        totals = shares.sum(0)
        centroids = (shares.T @ rows) / totals.clamp_min(1e-8).unsqueeze(1)
        cosines = rows @ F.normalize(centroids).T
        labels = cosines.masked_fill(totals <= 0, -2.0).argmax(1)  # a class without rows stays so
        shares = F.one_hot(labels, probabilities.shape[1]).float()
    return labels


class SHOT(RowBankObjective):
    r"""Adapts a trained model to unlabelled rows, without the rows that it was trained on.

    .. math::
        L = \frac{1}{N} \sum_i H(p_i) + \mathrm{KL}(\bar p \,\Vert\, \pi)
            + \beta \, \frac{1}{N} \sum_i -\log p_{i \hat y_i}

    The rows are the Trainer's `train_dataset`, whose labels are not used; the task's own loss is
    left out and the head stays frozen, so that features move to where it expects them. At each
    epoch the rows are labelled by the nearest centroid ([`centroid_labels`]). [`shot`] does all of
    it in one call. With the source at hand, [`SelfTraining`] is the safer method.

    Reference:
        Liang et al. 2020, arXiv:2002.08546, Eq. 7.
        Deviation: KL to the target's frequencies π in place of :math:`-H(\bar p)`, which is the
        same for uniform ones.

    Args:
        weight: Factor of all three terms, or a schedule of it.
        pseudo_label_weight: β.
        prior: Class frequencies of the rows; uniform where they are not given.
        feature_layer: Dotted name of the module whose features are compared.
        pooling: `"mean"`, `"cls"`, `"last"`, `"tokens"`, a callable, or `"auto"`.
        name: Prefix of the logs.

    Logs:
        `loss/shot`, `shot/entropy`, `shot/divergence`, `shot/pseudo_labels`.

    Raises:
        ValueError: If a weight is negative.

    Example:
        >>> SHOT(pseudo_label_weight=0.1).name
        'shot'
    """

    name = "shot"
    streams = ()
    remembered_stream = TRAINING
    source_free = True

    def __init__(
        self,
        weight: float | Schedule = 1.0,
        pseudo_label_weight: float = 0.3,
        prior: Priors | None = None,
        feature_layer: str | None = None,
        pooling: Pooling = "auto",
        name: str | None = None,
    ) -> None:
        super().__init__(weight, feature_layer, pooling, name)
        if pseudo_label_weight < 0:
            raise ValueError(f"pseudo_label_weight={pseudo_label_weight} must not be negative.")
        self.pseudo_label_weight = pseudo_label_weight
        self.prior = prior

    def base_weight(self, progress: float) -> float:
        """0: the rows' labels are not used."""
        return 0.0

    def setup(self, trainer: Trainer) -> None:
        """Freeze the head; forget the labels of an earlier run."""
        if isinstance(self.prior, str) and self.prior in ("source", "estimate"):
            raise ValueError(
                f"SHOT has no source rows, so prior={self.prior!r} is not known. Give the class "
                "frequencies, 'uniform' or 'predicted'."
            )
        super().setup(trainer)
        model: Any = unwrapped_base(trainer.accelerator.unwrap_model(trainer.model))
        base = set(map(id, model.base_model.parameters()))
        own = [p for p in model.parameters() if p.requires_grad]
        self.fixed = [p for p in own if id(p) not in base]
        if len(self.fixed) == len(own) or model.base_model is model:
            raise ValueError(
                f"SHOT freezes the head and trains the encoder of a model; {type(model).__name__} "
                "has no trainable encoder beside its head. Unfreeze it."
            )

    def before_step(self, step: int) -> None:
        """Label the rows, at the beginning of each epoch."""
        super().before_step(step)
        state = self._trainer.state
        epochs = max(1, round(state.num_train_epochs))
        if step in {round(state.max_steps * epoch / epochs) for epoch in range(epochs)}:
            found = self._trainer.sweep(self, TRAINING, self._values)
            self.refresh_priors(found["logits"])
            labels = centroid_labels(found["features"], found["logits"].softmax(1))
            self.fill_bank(found["keys"], label=labels)

    def _values(self, batch: Batch) -> dict[str, torch.Tensor]:
        features, logits, _ = predicted_features(batch, "SHOT")
        return {"keys": batch.keys(), "features": features, "logits": logits}

    def num_items(self, rows: Rows) -> torch.Tensor:
        """All rows (or tokens)."""
        return rows.num_predictions()

    def loss(self, batch: Batch) -> dict[str, Term]:
        """Entropy, divergence of the mean prediction, and the pseudo-labels' cross-entropy."""
        logits, _ = self.class_logits(batch)
        count = torch.as_tensor(len(logits), device=logits.device)
        labels = self.labels_of(batch.keys())
        losses = F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum")
        return {
            "entropy": (prediction_entropy(logits).sum(), count),
            "divergence": prior_divergence(logits, self.target_priors(logits.shape[1]))
            if len(logits)
            else logits.sum() * 0.0,
            "pseudo_labels": (self.pseudo_label_weight * losses, count),
        }


def shot(
    model: PreTrainedModel,
    target_dataset: datasets.Dataset,
    args: TrainingArguments,
    processing_class: Any = None,
    data_collator: Any = None,
    target_priors: Priors | None = None,
    **options: Any,
) -> PreTrainedModel:
    """Adapt a trained model to a target without the source's rows.

    Args:
        model: The trained model; changed in place.
        target_dataset: Prepared (tokenised) rows; label columns are removed.
        args: Of the training. A tenth of the learning rate that the model was trained with, and
            some 15 epochs, are what the paper uses. A checkpoint in `output_dir` is resumed where
            `args.resume_from_checkpoint` says so.
        processing_class: The tokenizer or processor.
        data_collator: By default the Trainer's.
        target_priors: Class frequencies of the rows; uniform where they are not given.
        **options: Further arguments of [`SHOT`].

    Returns:
        The model.

    Example:
        ```python
        model = AutoModelForSequenceClassification.from_pretrained("trained-on-movies")
        shot(model, tweets, TrainingArguments("adapted", learning_rate=3e-5, num_train_epochs=15))
        model.save_pretrained("adapted")
        ```
    """
    if not isinstance(target_dataset, datasets.Dataset):
        target_dataset = datasets.Dataset.from_list(list(target_dataset))
    labels = label_columns(args.label_names or [], data_collator)
    trainer = AdaptationTrainer(
        model=model,
        args=args,
        train_dataset=target_dataset.remove_columns(
            [name for name in target_dataset.column_names if name in labels]
        ),
        processing_class=processing_class,
        data_collator=data_collator,
        objectives=[SHOT(prior=target_priors, **options)],
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    return model
