"""Test-time adaptation: a saved model and the rows to predict, without any training set.

```python
model = AutoModelForSequenceClassification.from_pretrained("trained-on-movies")
predict = T3A(model)  # or Tent(model)
for batch in DataLoader(tweets, collate_fn=collator, batch_size=64):
    labels = predict(**batch).argmax(1)
```
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from hf_adapt.alignment.entropy import prediction_entropy
from hf_adapt.alignment.heads import last_linear
from hf_adapt.alignment.predictions import refuse_other_problems


class T3A:
    r"""Replaces the head of a classifier by prototypes of its own confident predictions.

    Nothing is trained: each row joins the support set of the class that it is predicted as; of each
    class the K rows of lowest entropy are kept, and rows are classified by

    .. math::
        \hat y = \arg\max_k \, z^\top \frac{c_k}{\lVert c_k \rVert}, \qquad
        c_k = \sum_{i \in S_k} \frac{z_i}{\lVert z_i \rVert}

    where z is what the last layer sees, and the rows of its weight are the first supports. It is
    cheap and can't diverge. [`Tent`] may gain more and may lose more; [`SelfTraining`] does better
    where the target's rows are there before training.

    Reference:
        Iwasawa & Matsuo 2021, "Test-Time Classifier Adjustment Module for Model-Agnostic Domain
        Generalization", NeurIPS.

    Args:
        model: A trained classifier whose head ends in a linear layer; put into evaluation mode.
        num_supports: Number K of rows that are kept for each class; None for all.

    Raises:
        ValueError: If the model is no classifier, or its head is not linear.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(hidden_size=8, num_attention_heads=1, num_hidden_layers=1)
        >>> predict = T3A(BertForSequenceClassification(config))
        >>> predict(input_ids=torch.tensor([[5, 6]])).shape
        torch.Size([1, 2])
    """

    def __init__(self, model: nn.Module, num_supports: int | None = 20) -> None:
        if num_supports is not None and num_supports < 1:
            raise ValueError(f"num_supports={num_supports} must be at least 1, or None for all.")
        refuse_other_problems(model, "T3A")
        self.model = model.eval()
        self.num_supports = num_supports
        self.head = last_linear(model, "T3A")
        self.reset()

    def reset(self) -> None:
        """Forget all rows; the supports are the head's weights again."""
        weight = self.head.weight.detach().float()
        self.supports = F.normalize(weight)
        self.entropies = prediction_entropy(weight @ weight.T)
        self.labels = torch.arange(len(weight), device=weight.device)

    @torch.no_grad()
    def __call__(self, **inputs: Any) -> torch.Tensor:
        """Predict rows, which join the supports.

        Args:
            **inputs: The model's inputs; labels are left out.

        Returns:
            Scores of each class, (B, C).
        """
        seen: list[torch.Tensor] = []
        handle = self.head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        try:
            logits = self.model(**_without_labels(inputs)).logits
        finally:
            handle.remove()
        features = seen[-1].float()
        if logits.ndim != 2 or features.shape[:-1] != logits.shape[:-1]:
            raise ValueError(
                "T3A needs a head that sees one feature for each row; the head of this "
                f"{type(self.model).__name__} sees {tuple(features.shape)} and the model's logits "
                f"are {tuple(logits.shape)}. Use Tent."
            )
        self.supports = torch.cat([self.supports, F.normalize(features)])
        self.entropies = torch.cat([self.entropies, prediction_entropy(logits)])
        self.labels = torch.cat([self.labels, logits.argmax(1)])
        self._keep_confident(logits.shape[1])
        one_hot = F.one_hot(self.labels, logits.shape[1]).to(self.supports)
        return features @ F.normalize(self.supports.T @ one_hot, dim=0)

    def _keep_confident(self, classes: int) -> None:
        if self.num_supports is None:
            return
        kept = []
        for number in range(classes):
            own = (self.labels == number).nonzero().flatten()
            order = self.entropies[own].argsort(stable=True)
            kept.append(own[order[: self.num_supports]])
        index = torch.cat(kept)
        self.supports, self.entropies = self.supports[index], self.entropies[index]
        self.labels = self.labels[index]


class Tent:
    r"""Lowers the entropy of predictions by training the normalisation layers, batch by batch.

    .. math::
        \min_{\gamma, \beta} \frac{1}{|R|} \sum_{i \in R} H(p_i), \qquad
        R = \{ i : H(p_i) < \rho \ln C \}

    Only the scales and shifts of the normalisation layers move. With `sharpness` the step is taken
    at the worst point nearby (SAR), and the model is restored when its predictions have become too
    sure of themselves, so that one stream of odd rows does not ruin it. Predictions for a batch are
    those before its step. Small batches and rare classes are its weak points: compare with the
    model as it was.

    Reference:
        Wang et al. 2021, "Tent: Fully Test-Time Adaptation by Entropy Minimization",
        arXiv:2006.10726; Niu et al. 2023, "Towards Stable Test-Time Adaptation in Dynamic Wild
        World" (SAR), arXiv:2302.12400.
        Deviations: the reset's threshold of 0.2, for 1,000 classes, is scaled by ln C / ln 1000;
        batch norm keeps the source's running statistics, where Tent takes those of the batch.

    Args:
        model: A trained classifier; changed in place, see `restore`.
        learning_rate: Of SGD with momentum 0.9.
        reliable: ρ: rows of higher entropy, as a share of ln C, are not trained on; 1 for all rows,
            as in Tent.
        sharpness: Radius of SAR's neighbourhood; 0 for Tent.

    Raises:
        ValueError: If the model is no classifier or has no normalisation layer with weights, or an
            argument is out of range.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(hidden_size=8, num_attention_heads=1, num_hidden_layers=1)
        >>> predict = Tent(BertForSequenceClassification(config))
        >>> predict(input_ids=torch.tensor([[5, 6]])).shape
        torch.Size([1, 2])
    """

    def __init__(
        self,
        model: nn.Module,
        learning_rate: float = 1e-3,
        reliable: float = 0.4,
        sharpness: float = 0.05,
    ) -> None:
        if not (learning_rate > 0 and 0 < reliable <= 1 and sharpness >= 0):
            raise ValueError(
                f"learning_rate={learning_rate} must be positive, reliable={reliable} in (0, 1] "
                f"and sharpness={sharpness} not negative."
            )
        refuse_other_problems(model, "Tent")
        self.model = model.eval()
        self.parameters = [
            parameter
            for module in model.modules()
            if "norm" in type(module).__name__.lower()
            for parameter in module.parameters(recurse=False)
        ]
        if not self.parameters:
            raise ValueError(
                f"Tent trains normalisation layers, and {type(model).__name__} has none with "
                "weights. Use T3A, which trains nothing."
            )
        self.learning_rate, self.reliable, self.sharpness = learning_rate, reliable, sharpness
        self._before = [parameter.detach().clone() for parameter in self.parameters]
        self._start()

    def _start(self) -> None:
        self._optimizer = torch.optim.SGD(self.parameters, self.learning_rate, momentum=0.9)
        self._average: float | None = None

    def restore(self) -> None:
        """Give the model its own weights again."""
        with torch.no_grad():
            for parameter, before in zip(self.parameters, self._before, strict=True):
                parameter.copy_(before)
        self._start()

    def __call__(self, **inputs: Any) -> torch.Tensor:
        """Predict rows, then take a step on them.

        Args:
            **inputs: The model's inputs; labels are left out.

        Returns:
            Scores of each class, (B, C), or (B, T, C) for each token.
        """
        inputs = _without_labels(inputs)
        required = [(p, p.requires_grad) for p in self.model.parameters()]
        for parameter, _ in required:
            parameter.requires_grad_(False)
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        try:
            with torch.enable_grad():
                return self._step(inputs)
        finally:
            for parameter, before in required:
                parameter.requires_grad_(before)
            self._optimizer.zero_grad()

    def _step(self, inputs: dict[str, Any]) -> torch.Tensor:
        logits: torch.Tensor = self.model(**inputs).logits
        loss = self._loss(logits, inputs)
        if loss is None:
            return logits.detach()
        loss.backward()  # type: ignore[no-untyped-call]
        if self.sharpness > 0:
            loss = self._at_the_worst_point(inputs)
        if loss is not None:
            self._optimizer.step()
            self._watch(float(loss.detach()), logits.shape[-1])
        return logits.detach()

    def _loss(self, logits: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor | None:
        """The mean entropy of the reliable predictions, or None if there are none."""
        if logits.shape[-1] < 2:
            raise ValueError(f"Tent needs two classes or more; logits are {tuple(logits.shape)}.")
        entropy = prediction_entropy(logits)
        if entropy.ndim == 2 and isinstance(mask := inputs.get("attention_mask"), torch.Tensor):
            entropy = entropy[mask.bool()]
        kept = entropy[entropy.detach() < self.reliable * math.log(logits.shape[-1])]
        return kept.mean() if len(kept) else None

    def _at_the_worst_point(self, inputs: dict[str, Any]) -> torch.Tensor | None:
        """The gradient where the loss is highest nearby takes the place of the one here."""
        given = [p for p in self.parameters if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in given if p.grad is not None]).norm()
        moves = [p.grad * (self.sharpness / (norm + 1e-12)) for p in given if p.grad is not None]
        with torch.no_grad():
            for parameter, move in zip(given, moves, strict=True):
                parameter.add_(move)
        self._optimizer.zero_grad()
        loss = self._loss(self.model(**inputs).logits, inputs)
        if loss is not None:
            loss.backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            for parameter, move in zip(given, moves, strict=True):
                parameter.sub_(move)
        return loss

    def _watch(self, loss: float, classes: int) -> None:
        """Restore the model where its entropy has collapsed (SAR)."""
        if self.sharpness == 0:
            return
        average = loss if self._average is None else 0.9 * self._average + 0.1 * loss
        self._average = average
        if average < 0.2 * math.log(classes) / math.log(1000):
            self.restore()


def _without_labels(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if name not in ("label", "labels")}
