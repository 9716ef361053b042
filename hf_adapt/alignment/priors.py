"""Class frequencies of the target: given, sampled or estimated, and what methods do with them.

Where the classes are not equally frequent in source and target, most methods that look at
predictions go wrong, and a rough idea of the target's frequencies is worth more than a better loss.
They are given once, for all methods of a run that use them:

```python
priors = {"ham": 0.87, "spam": 0.13}
AdaptationCallback(SelfTraining(), target_dataset=target, target_priors=priors)
```
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np
import torch
import torch.nn.functional as F

from hf_adapt.alignment.predictions import LANGUAGE_MODELS, ClassPredictions, refuse_heads
from hf_adapt.engine.streams import TARGET, TRAINING
from hf_adapt.models.heads import has_head

if TYPE_CHECKING:
    from transformers import Trainer

    from hf_adapt.engine.batch import Batch

logger = logging.getLogger(__name__)

NamedPriors = Literal["uniform", "predicted", "source", "estimate"]
Priors = NamedPriors | Mapping[Any, float] | Sequence[float] | np.ndarray | torch.Tensor
"""How frequent each class is: a number for each label name or class, `"uniform"`, `"predicted"`
(half-way from uniform to the model's own mean prediction for target rows), `"source"` (as in the
training rows) or `"estimate"` (by [`estimate_priors`]). Those made of predictions are made again at
every refresh of the method."""

EstimationMethod = Literal["em", "bbse", "rlls"]
LEAST = 1e-4
"""What a class of frequency 0 counts as where a logarithm is taken."""


class SampledPriors(NamedTuple):
    """Class frequencies counted in a sample, with the bounds of an interval for each."""

    priors: torch.Tensor
    lower: torch.Tensor
    upper: torch.Tensor


def priors_from_sample(
    labels: Sequence[int] | np.ndarray | torch.Tensor,
    num_classes: int | None = None,
    confidence: float = 0.95,
) -> SampledPriors:
    r"""Class frequencies from a few labelled target rows, with an interval for each class.

    The interval is Wilson's. Fifty rows drawn at random tell a frequency to about ±13 points, which
    is often better than any estimate without labels.

    .. math::
        \frac{1}{1 + z^2/n} \left( \hat p + \frac{z^2}{2n} \pm
            z \sqrt{\frac{\hat p (1 - \hat p)}{n} + \frac{z^2}{4n^2}} \right)

    Reference:
        Wilson 1927, "Probable Inference, the Law of Succession, and Statistical Inference".

    Args:
        labels: The class of each row, drawn at random from the target.
        num_classes: Number C of classes; by default one more than the highest label.
        confidence: Probability that the interval of one class holds its frequency.

    Shape:
        - each of the outputs: (C,).

    Raises:
        ValueError: If there are no labels, one is no class, or the confidence is not in (0, 1).

    Example:
        >>> sample = priors_from_sample([0] * 40 + [1] * 10)
        >>> [[round(x, 2) for x in each.tolist()] for each in sample]
        [[0.8, 0.2], [0.67, 0.11], [0.89, 0.33]]
    """
    if (array := np.asarray(labels)).dtype.kind not in "iub" and array.size:
        raise ValueError(
            f"Expected the number of each row's class, got {array.dtype} such as "
            f"{array.flat[0]!r}. Map names to numbers by model.config.label2id."
        )
    given = torch.as_tensor(array.astype(np.int64)).flatten()
    size = int(given.max()) + 1 if num_classes is None and len(given) else num_classes or 0
    if not len(given) or not 0 <= int(given.min()) <= given.max() < size:
        raise ValueError(
            f"Expected at least one label, each an integer from 0 to {max(size - 1, 0)}, got "
            f"{given.tolist()[:5]}."
        )
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} must lie between 0 and 1.")
    n = len(given)
    share = torch.bincount(given.long(), minlength=size).double() / n
    z = float(torch.special.ndtri(torch.tensor(0.5 + confidence / 2, dtype=torch.float64)))
    centre = share + z * z / (2 * n)
    spread = z * (share * (1 - share) / n + z * z / (4 * n * n)).sqrt()
    scale = 1 / (1 + z * z / n)
    bounds = ((centre - spread) * scale, (centre + spread) * scale)
    return SampledPriors(share.float(), *(bound.clamp(0, 1).float() for bound in bounds))


def estimate_priors(
    source_logits: torch.Tensor,
    source_labels: torch.Tensor,
    target_logits: torch.Tensor,
    method: EstimationMethod = "em",
) -> torch.Tensor:
    r"""The target's class frequencies, estimated without target labels.

    All methods assume label shift: that the rows of a class look alike in both domains. Between
    domains this rarely holds, and the estimates may be wrong by 20 points or more. Prefer
    [`priors_from_sample`] where fifty rows can be labelled.

    - `"bbse"`: with the confusion matrix :math:`C_{ij} = P_s(\hat y = i, y = j)` and the mean
      prediction :math:`\mu_i = P_t(\hat y = i)`,
      :math:`w = (C^\top C + 10^{-8} I)^{-1} C^\top \mu`, clipped at 0; :math:`\pi_t = w \pi_s`.
    - `"rlls"`: :math:`\min_\theta \lVert C\theta - (\mu - \mu_s) \rVert + \rho \lVert\theta\rVert`,
      :math:`w = 1 + \theta \ge 0`, which stays near the source's frequencies where there are few
      rows.
    - `"em"`: :math:`\pi \leftarrow \operatorname{mean}_t
      \operatorname{norm}(p(y \mid x) \, \pi / \pi_s)` until it stays, on predictions calibrated on
      the source by a temperature and a bias for each class.

    Reference:
        Lipton et al. 2018, arXiv:1802.03916 (BBSE); Azizzadenesheli et al. 2019, arXiv:1903.09734
        (RLLS); Saerens et al. 2002 (EM), with the calibration of Alexandari et al. 2020,
        arXiv:1901.06852.

    Args:
        source_logits: Predictions for labelled source rows, best for rows that were not trained on.
        source_labels: Their classes.
        target_logits: Predictions for target rows.
        method: `"em"`, `"bbse"` or `"rlls"`.

    Shape:
        - source_logits: (N, C), source_labels: (N,), target_logits: (M, C); output: (C,), sum 1.

    Raises:
        ValueError: If the shapes do not fit, a value is not finite, a class has no source row, or
            the method is unknown.

    Example:
        >>> logits = 4 * torch.eye(2)
        >>> source, target = logits.repeat(50, 1), logits[[0, 0, 0, 1]].repeat(25, 1)
        >>> [round(x, 2) for x in estimate_priors(source, source.argmax(1), target).tolist()]
        [0.75, 0.25]
    """
    if method not in get_args(EstimationMethod):
        raise ValueError(f"method={method!r} is unknown: use 'em', 'bbse' or 'rlls'.")
    if (
        source_logits.ndim != 2
        or target_logits.ndim != 2
        or source_logits.shape[1] != target_logits.shape[1]
        or source_labels.shape != source_logits.shape[:1]
    ):
        raise ValueError(
            "estimate_priors expects source_logits (N, C), source_labels (N,) and target_logits "
            f"(M, C), got {tuple(source_logits.shape)}, {tuple(source_labels.shape)} and "
            f"{tuple(target_logits.shape)}."
        )
    if not (source_logits.isfinite().all() and target_logits.isfinite().all()):
        raise ValueError("estimate_priors got logits that are not finite (NaN or infinity).")
    source, target = source_logits.detach().double().cpu(), target_logits.detach().double().cpu()
    labels, classes = source_labels.detach().long().cpu(), source.shape[1]
    counts = torch.bincount(labels, minlength=classes).double()
    if not len(target) or len(counts) > classes or not bool((counts > 0).all()):
        raise ValueError(
            f"estimate_priors needs target rows, and source rows of each of the {classes} classes; "
            f"it got {len(target)} target rows and source rows {counts.long().tolist()} by class."
        )
    prior = counts / counts.sum()
    if method == "em":
        scale, bias = _calibration(source, labels)
        found = _em((target * scale + bias).softmax(1), prior)
    else:
        found = prior * _weights(source, labels, target, prior, method)
    return (found / found.sum()).float()


def _calibration(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A factor and a bias for each class that make the predictions calibrated (BCTS)."""
    scale = torch.ones((), dtype=logits.dtype, requires_grad=True)
    bias = torch.zeros(logits.shape[1], dtype=logits.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([scale, bias], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        # The penalty keeps the factor finite where all rows are classified correctly.
        loss = F.cross_entropy(logits * scale + bias, labels) + 1e-3 * (scale - 1).square()
        loss = loss + 1e-3 * bias.square().sum()
        torch.autograd.backward(loss)
        return loss

    with torch.enable_grad():
        optimizer.step(closure)  # type: ignore[no-untyped-call]
    return scale.detach().clamp_min(0.0), bias.detach()


def _em(probabilities: torch.Tensor, prior: torch.Tensor, rounds: int = 1000) -> torch.Tensor:
    found = prior
    for _ in range(rounds):
        joint = probabilities * (found / prior)
        new = (joint / joint.sum(1, keepdim=True)).mean(0)
        if bool((new - found).abs().max() < 1e-7):
            return new
        found = new
    return found


def _weights(
    source: torch.Tensor,
    labels: torch.Tensor,
    target: torch.Tensor,
    prior: torch.Tensor,
    method: EstimationMethod,
) -> torch.Tensor:
    """How many times as frequent each class is in the target."""
    n, classes = source.shape
    predicted = F.one_hot(source.argmax(1), classes).double()
    confusion = predicted.T @ F.one_hot(labels, classes).double() / n
    mean = F.one_hot(target.argmax(1), classes).double().mean(0)
    eye = torch.eye(classes, dtype=torch.float64)
    if method == "bbse":
        weights: torch.Tensor = torch.linalg.solve(
            confusion.T @ confusion + 1e-8 * eye, confusion.T @ mean
        )
        return weights.clamp_min(0.0)
    rho = 0.03 * (
        2 * math.log(2 * classes / 0.05) / (3 * n) + math.sqrt(2 * math.log(2 * classes / 0.05) / n)
    )
    # In θ the objective is convex, with a bound; a few hundred steps of projected gradient do.
    change = torch.zeros(classes, dtype=torch.float64)
    step = 1 / (torch.linalg.matrix_norm(confusion, 2).square() + rho)
    shift = mean - confusion @ torch.ones(classes, dtype=torch.float64)
    for _ in range(5000):
        residual = confusion @ change - shift
        gradient = confusion.T @ residual / residual.norm().clamp_min(1e-9)
        gradient = gradient + rho * change / change.norm().clamp_min(1e-9)
        size = residual.norm().clamp_min(1e-9)
        change = (change - step * size * gradient).clamp_min(-1.0)
    return 1 + change


def resolved_priors(given: Priors, names: Mapping[int, str]) -> torch.Tensor:
    """The frequency of each class, (C,), of what a user gives.

    Args:
        given: A number for each label name or class, or `"uniform"`.
        names: The name of each class.

    Raises:
        ValueError: If a class is missing or unknown, a number negative, or their sum not 1.
    """
    classes = len(names)
    shown = ", ".join(f"{names[i]!r}" for i in sorted(names))
    if isinstance(given, str):
        if given != "uniform":
            known = ", ".join(map(repr, get_args(NamedPriors)))
            raise ValueError(
                f"target_priors={given!r} is unknown: use {known}, or give the frequencies of "
                f"the classes {shown}."
            )
        return torch.full((classes,), 1 / classes)
    if not isinstance(given, Mapping) and hasattr(given, "to_dict"):
        given = given.to_dict()  # a pandas Series is sorted by frequency, not by class
    if isinstance(given, Mapping):
        numbers = {name: i for i, name in names.items()} | {i: i for i in names}
        unknown = [key for key in given if key not in numbers]
        found = {numbers[key]: float(value) for key, value in given.items() if key in numbers}
        if unknown or len(found) < classes or len(given) > classes:
            raise ValueError(
                f"target_priors names the classes {', '.join(map(repr, given))}; the model has "
                f"{shown}. Give the frequency of each one, by its name or its number (0, 1, …), or "
                "load the model with names: from_pretrained(..., id2label={0: 'spam', 1: 'ham'})."
            )
        values = torch.tensor([found[i] for i in range(classes)])
    else:
        values = torch.as_tensor(np.asarray(given), dtype=torch.float32)
    if values.shape != (classes,) or not bool((values >= 0).all()):
        raise ValueError(
            f"target_priors={values.tolist()}: expected {classes} numbers of 0 or more, one for "
            f"each of the classes {shown}."
        )
    if abs(float(values.sum()) - 1) > 1e-3:
        fix = ", so divide percentages by 100" if abs(float(values.sum()) - 100) < 1 else ""
        raise ValueError(
            f"target_priors: {', '.join(f'{v:g}' for v in values.tolist())} add up to "
            f"{float(values.sum()):.4g}; frequencies add up to 1{fix}."
        )
    return values / values.sum()


def class_names(trainer: Trainer, num_classes: int) -> dict[int, str]:
    """The classes of the Trainer's model, by their numbers."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    has_names = not has_head(model, "multiple_choice")
    names = (getattr(getattr(model, "config", None), "id2label", None) or {}) if has_names else {}
    return {i: str(names.get(i, i)) for i in range(num_classes)}


class PriorObjective(ClassPredictions):
    """An objective that uses the target's class frequencies.

    Attributes:
        prior: The frequencies for this objective alone; None for the run's `target_priors`.
        default_prior: What is used where neither is given.
        needs_few_classes: Whether language models are refused, whose classes are their vocabulary.
    """

    prior: Priors | None = None
    default_prior: Priors = "uniform"
    uses_priors = True
    needs_few_classes: bool = True

    _given_prior: Priors | None = None
    _priors: torch.Tensor | None = None
    _trainer: Any = None

    def setup(self, trainer: Trainer) -> None:
        """Refuse a model without classes; read what is known of the frequencies."""
        super().setup(trainer)
        if self.needs_few_classes:
            refuse_heads(trainer.model, type(self).__name__, *LANGUAGE_MODELS, "question_answering")
        self._trainer = trainer
        self._given_prior = self.prior
        if self.prior is None:
            target = self._trainer.stream_options(TARGET)
            self._given_prior = None if target is None else target.priors
        self._priors = None
        model = trainer.accelerator.unwrap_model(trainer.model)
        size = getattr(getattr(model, "config", None), "num_labels", None)
        if has_head(model, "multiple_choice"):  # of which `num_labels` says nothing
            size = None
            if isinstance(self._used, Mapping):
                raise ValueError(
                    "target_priors names classes, and those of a multiple choice are the places of "
                    "the answers, which have no names. Give an array with the frequency of each "
                    "place."
                )
        if not self._kind and size is not None:  # what is wrong is told before anything is trained
            self._priors = resolved_priors(self._used, class_names(trainer, size))
        elif self._kind and self._kind not in get_args(NamedPriors):
            resolved_priors(self._used, class_names(trainer, size or 2))
        if self._kind == "estimate":
            self._trainer.check_sweep(TARGET)

    @property
    def _used(self) -> Priors:
        return self.default_prior if self._given_prior is None else self._given_prior

    @property
    def _kind(self) -> str:
        """How the frequencies come about; empty where they are numbers."""
        return self._used if isinstance(self._used, str) else ""

    @property
    def knows_priors(self) -> bool:
        """Whether something was said of the frequencies."""
        return self._given_prior is not None

    @property
    def estimates_priors(self) -> bool:
        """Whether the frequencies are estimated from predictions."""
        return self._kind in ("predicted", "estimate")

    def before_step(self, step: int) -> None:
        """Count the source's frequencies, where they are asked for; estimate again from there."""
        if self._priors is None and self._kind in ("source", "estimate"):
            self._priors = self.source_priors()
        if self.estimates_priors and step in self.estimation_steps():
            self.refresh_priors(self._trainer.sweep(self, TARGET, predicted)["logits"])

    def estimation_steps(self) -> Collection[int]:
        """Before which steps frequencies are estimated, if they are: at each fifth of training."""
        return [round(fifth * self._trainer.state.max_steps / 5) for fifth in range(1, 5)]

    def source_priors(self) -> torch.Tensor:
        """The class frequencies of the training rows, (C,)."""
        found = self._trainer.sweep(self, TRAINING, _counted, forward=False)
        counts: torch.Tensor = found["counts"].sum(0)
        if self._kind == "estimate" and not bool((counts > 0).all()):
            raise ValueError(
                f"{self.name}: class frequencies are estimated from predictions for source rows of "
                f"each class, and the source has {counts.tolist()} rows of them. Give "
                "target_priors, or leave the class out."
            )
        return counts / counts.sum()

    def target_priors(self, num_classes: int) -> torch.Tensor:
        """The frequency of each class, (C,), on the device of the run.

        Args:
            num_classes: Number C of classes that the model predicts.

        Raises:
            ValueError: If frequencies of another number of classes were given.
        """
        if self._priors is None and not self._kind:
            names = class_names(self._trainer, num_classes)
            self._priors = resolved_priors(self._used, names)
        priors = self._priors
        if priors is None:  # uniform, or not yet counted
            priors = torch.full((num_classes,), 1 / num_classes)
        if len(priors) != num_classes:
            raise ValueError(
                f"{self.name}: {len(priors)} class frequencies were given, and the model predicts "
                f"{num_classes} classes."
            )
        return priors.to(self._trainer.args.device)

    def refresh_priors(
        self, target_logits: torch.Tensor, weights: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        """Estimate the frequencies again, where they are not given.

        Args:
            target_logits: (M, C), predictions for the target rows.
            weights: The weights that made them, if not the model's own.
        """
        if not self.estimates_priors:
            return
        if self._kind == "predicted":
            mean = target_logits.softmax(1).mean(0)
            self._priors = (mean + 1 / len(mean)) / 2
            return
        source = self._trainer.sweep(self, TRAINING, _labelled, weights)
        kept = source["labels"] >= 0
        self._priors = estimate_priors(
            source["logits"][kept], source["labels"][kept], target_logits
        )
        logger.info("%s: estimated class frequencies %s", self.name, self._priors.tolist())

    def state_dict(self) -> dict[str, Any]:
        """The frequencies, where something is said of them."""
        if self._priors is None or not (self.knows_priors or self.estimates_priors):
            return {}
        return {"priors": self._priors.cpu()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state returned by `state_dict`."""
        if "priors" in state and (self.estimates_priors or self._kind == "source"):
            self._priors = state["priors"]

    def close(self) -> None:
        """Release the Trainer."""
        self._trainer = None


def predicted(batch: Batch) -> dict[str, torch.Tensor]:
    """What a pass keeps to estimate frequencies: the predictions."""
    return {"logits": batch.logits()[0]}


def _labelled(batch: Batch) -> dict[str, torch.Tensor]:
    return {"logits": batch.logits()[0], "labels": batch.labels()}


def _counted(batch: Batch) -> dict[str, torch.Tensor]:
    labels = batch.labels()
    return {"counts": torch.bincount(labels[labels >= 0], minlength=batch.num_classes)[None]}


def corrected_logits(
    logits: torch.Tensor, source_priors: torch.Tensor, target_priors: torch.Tensor
) -> torch.Tensor:
    r"""Predictions of a model for other class frequencies than it was trained on.

    .. math::
        p'(y \mid x) \propto p(y \mid x) \frac{\pi_t(y)}{\pi_s(y)}

    Reference:
        Saerens et al. 2002, "Adjusting the Outputs of a Classifier to New a Priori Probabilities".

    Args:
        logits: Scores of each class.
        source_priors: Class frequencies that the model was trained on.
        target_priors: Those of the rows it is used on; a 0 counts as 0.0001.

    Shape:
        - logits: (..., C), both priors: (C,); output: as `logits`.

    Example:
        >>> even, rare = torch.tensor([0.5, 0.5]), torch.tensor([0.9, 0.1])
        >>> logits = corrected_logits(torch.zeros(1, 2), even, rare)
        >>> [round(x, 3) for x in logits.softmax(1)[0].tolist()]
        [0.9, 0.1]
    """
    shift = target_priors.clamp_min(LEAST).log() - source_priors.clamp_min(LEAST).log()
    return logits + shift.to(logits)
