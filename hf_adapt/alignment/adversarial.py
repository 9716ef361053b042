"""Domain-adversarial training: features that do not reveal the domain."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from hf_adapt.engine.adaptation import Objective, Term
from hf_adapt.engine.callback import AdaptationCallback
from hf_adapt.engine.progress import Schedule, dann_ramp, value_at
from hf_adapt.models.pooling import Pooling

if TYPE_CHECKING:
    from hf_adapt.engine.batch import Batch, Rows

logger = logging.getLogger(__name__)

FEW_ITEMS = 400
"""Number of features from which a discriminator's accuracy is known to about five points."""


class _Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: torch.Tensor, scale: float) -> torch.Tensor:
        ctx.scale = scale
        return features.view_as(features)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return -ctx.scale * gradients[0], None


def reverse_gradient(features: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    r"""The identity in the forward; multiplies the gradient by `-scale` in the backward.

    .. math::
        R(x) = x, \qquad \frac{dR}{dx} = -\lambda I

    Reference:
        Ganin & Lempitsky 2015, "Unsupervised Domain Adaptation by Backpropagation", Eq. 17-18,
        arXiv:1409.7495.

    Args:
        features: Any shape, any floating dtype.
        scale: λ, unitless. 0 cuts the graph, so that the model's gradient is untouched.

    Shape:
        - output: as `features`.

    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> reverse_gradient(x, 0.5).sum().backward()
        >>> x.grad.tolist()
        [-0.5, -0.5]
    """
    if scale == 0:
        return features.detach()
    reversed_: torch.Tensor = _Reversal.apply(features, scale)  # type: ignore[no-untyped-call]
    return reversed_


def dann_loss(logits: torch.Tensor, domain: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    r"""Cross-entropy of the domain classification, which the discriminator minimises.

    .. math::
        L = -\frac{1}{N} \sum_{i=1}^{N} \log \mathrm{softmax}(z_i)_{d_i}

    With a reversed gradient ([`reverse_gradient`]) the model maximises it. [`mmd_loss`] aligns
    features without a discriminator, which is easier to train.

    Reference:
        Ganin et al. 2016, Eq. 9, arXiv:1505.07818.
        Deviation: softmax over any number of domains; for two it equals the paper's logistic loss.

    Args:
        logits: Scores of each domain, any floating dtype; computed in float32.
        domain: The true domain of each row, 0 for the source.
        reduction: `"mean"`, `"sum"` or `"none"`.

    Shape:
        - logits: (N, K), domain: (N,); output: (), in nats.

    Raises:
        ValueError: If the shapes do not fit, or there are fewer than two domains (a softmax over
            one is constant, and its gradient 0).

    Example:
        >>> round(dann_loss(torch.zeros(4, 2), torch.tensor([0, 0, 1, 1])).item(), 6)
        0.693147
    """
    if logits.ndim != 2 or domain.shape != logits.shape[:1]:
        raise ValueError(
            f"dann_loss expects logits (N, K) and domain (N,), got {tuple(logits.shape)} and "
            f"{tuple(domain.shape)}."
        )
    if logits.shape[1] < 2:
        raise ValueError(
            "dann_loss needs logits of at least two domains: over one domain the softmax is the "
            "constant 1 and no gradient flows."
        )
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(dtype), domain, reduction=reduction)


class DomainDiscriminator(nn.Sequential):
    """A multi-layer perceptron that scores the domain of a feature.

    Args:
        feature_size: Size D of a feature.
        num_domains: Number K of domains, the source included.
        hidden_sizes: Sizes of the hidden layers; empty for a linear discriminator.
        dropout: Probability of dropout after each hidden layer.

    Shape:
        - input: (N, D); output: (N, K) logits.

    Example:
        >>> DomainDiscriminator(8, 2, (16,))(torch.zeros(3, 8)).shape
        torch.Size([3, 2])
    """

    def __init__(
        self,
        feature_size: int,
        num_domains: int = 2,
        hidden_sizes: Sequence[int] = (256,),
        dropout: float = 0.0,
    ) -> None:
        layers: list[nn.Module] = []
        size = feature_size
        for hidden in hidden_sizes:
            layers += [nn.Linear(size, hidden), nn.ReLU(), nn.Dropout(dropout)]
            size = hidden
        super().__init__(*layers, nn.Linear(size, num_domains))


class DANN(Objective):
    """Domain-adversarial training: trains features from which the domain cannot be predicted.

    A discriminator learns to predict the domain from the feature; its gradient is reversed and
    scaled by λ = `weight` · `ramp`(progress) before it reaches the model. Use it when source and
    target differ in all classes and have similar label distributions. If they do not, or if the
    discriminator is unstable, [`MMD`] or [`InformationMaximization`] is often better.

    Reference:
        Ganin et al. 2016, "Domain-Adversarial Training of Neural Networks", arXiv:1505.07818.
        Deviations: the discriminator has its own optimizer (AdamW) and learns at full rate
        from the first step, while λ ramps for the model. The peak of λ is 0.1 by default, not 1:
        AdamW fine-tunes a whole transformer faster than a small discriminator can follow, and with
        1 the model increased the discriminator's loss without limit and did not learn its task.

    Args:
        weight: Peak λ, or a schedule of it; a constant 0 turns the objective off. With a learning
            rate of 2e-5 or so, or a frozen lower half, more (0.3 to 1) may be right: watch
            `dann/domain_accuracy`, which must not fall below chance.
        ramp: Factor of λ as a function of progress; `dann_ramp()` by default, None for none.
        feature_layer: Dotted name of the module whose output is aligned; by default the last
            hidden state of the base model.
        pooling: `"mean"`, `"cls"`, `"last"`, `"tokens"`, a callable, or `"auto"`.
        hidden_sizes: Hidden layers of the discriminator.
        dropout: Dropout of the discriminator.
        learning_rate: Peak learning rate of the discriminator; follows the run's schedule.
        weight_decay: Weight decay of the discriminator.
        name: Prefix of the logs.

    Logs:
        `loss/dann` (the discriminator's cross-entropy; ln K at chance), `dann/lambda`,
        `dann/domain_accuracy`, `dann/gradient_ratio` (the term's share of the gradient at the
        feature layer), `dann/module_gradient_norm`.

    Raises:
        ValueError: If the weight is negative, a hidden size or the learning rate not positive, or
            dropout outside [0, 1).

    Example:
        >>> DANN(weight=0.5, hidden_sizes=(128, 128), learning_rate=5e-4).name
        'dann'
    """

    name = "dann"
    needs_streams = ("target",)
    uses_logits = False

    def __init__(
        self,
        weight: float | Schedule = 0.1,
        ramp: Schedule | None = dann_ramp(),  # noqa: B008 - a pure function
        feature_layer: str | None = None,
        pooling: Pooling = "auto",
        hidden_sizes: Sequence[int] = (256,),
        dropout: float = 0.0,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.0,
        name: str | None = None,
    ) -> None:
        super().__init__(weight, feature_layer, pooling, name)
        if not all(size > 0 for size in hidden_sizes):
            raise ValueError(f"hidden_sizes={tuple(hidden_sizes)}: every size must be positive.")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout={dropout} must lie in [0, 1).")
        if not learning_rate > 0:
            raise ValueError(
                f"learning_rate={learning_rate} must be positive: a discriminator that does not "
                "learn gives the model a random direction."
            )
        self.ramp = ramp
        self.hidden_sizes = tuple(hidden_sizes)
        self.dropout = dropout
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self._num_domains = 2
        self._forget()

    def _forget(self) -> None:
        """Reset the statistics of the discriminator."""
        self._warned: set[str] = set()
        self._best_margin = float("-inf")
        self._items = 0
        self._seen = [0.0, 0.0, 0.0]  # items, and sums over them of accuracy and source share

    def term_weight(self, progress: float) -> float:
        """1: λ acts in the reversal, so that the discriminator learns at full rate."""
        return 1.0

    def lambda_at(self, progress: float) -> float:
        """λ, the factor of the reversed gradient, at this progress."""
        ramp = 1.0 if self.ramp is None else self.ramp(progress)
        return value_at(self.weight, progress) * ramp

    def build_modules(self, batch: Batch) -> nn.Module:
        """The discriminator, as wide as the features are."""
        features, _ = batch.features()
        self._forget()
        self._num_domains = batch.num_domains
        return DomainDiscriminator(
            features.shape[1], batch.num_domains, self.hidden_sizes, self.dropout
        )

    def num_items(self, rows: Rows) -> torch.Tensor:
        """Every row (or token) is classified."""
        return rows.num_features()

    def loss(self, batch: Batch) -> Term:
        """The discriminator's cross-entropy, summed over the features."""
        assert self.module is not None
        features, domain = batch.features()
        scale = self.lambda_at(batch.progress)
        if scale == 0:
            batch.log("gradient_ratio", 0.0)
        logits = self.module(reverse_gradient(features, scale))
        with torch.no_grad():
            source_share = (domain == 0).float().mean()
            accuracy = (logits.argmax(1) == domain).float().mean()
        self._items += len(domain)
        batch.log("domain_accuracy", accuracy, len(domain))
        batch.log("source_share", source_share, len(domain))
        batch.log("lambda", scale)
        count = torch.as_tensor(len(domain), device=logits.device)
        return dann_loss(logits, domain, reduction="sum"), count

    def state_dict(self) -> dict[str, Any]:
        """The best accuracy of the discriminator so far, for the warnings."""
        return {"best_margin": self._best_margin}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state returned by `state_dict`; checkpoints of 0.1 have none."""
        self._best_margin = state.get("best_margin", float("-inf"))

    def on_log(self, logs: dict[str, float], progress: float) -> None:
        """Warn if the discriminator gives the model no useful gradient."""
        accuracy = logs.get(f"{self.name}/domain_accuracy")
        source_share = logs.get(f"{self.name}/source_share")
        norm = logs.get(f"{self.name}/module_gradient_norm")
        if accuracy is None or source_share is None:
            return
        if norm == 0:
            self._warn(
                "no gradient", "its discriminator gets no gradient (every gradient is exactly 0)"
            )
        items, self._items = self._items, 0
        self._seen = [
            x + items * y for x, y in zip(self._seen, (1, accuracy, source_share), strict=True)
        ]
        if self._seen[0] < FEW_ITEMS:
            return  # too few to tell the accuracy from chance
        accuracy, source_share = self._seen[1] / self._seen[0], self._seen[2] / self._seen[0]
        self._seen = [0.0, 0.0, 0.0]
        chance = max(source_share, (1 - source_share) / (self._num_domains - 1))
        self._best_margin = max(self._best_margin, accuracy - chance)
        if progress >= 0.3 and accuracy < chance - 0.2:
            self._warn(
                "outrun",
                f"its discriminator is worse than chance (accuracy {accuracy:.2f}, majority "
                f"{chance:.2f}): the model changes faster than it can learn, and increases its "
                "loss without limit. Try a lower weight or a higher learning_rate",
            )
        elif progress >= 0.3 and self._best_margin < 0.05:
            self._warn(
                "chance",
                f"its discriminator was at chance from the start (accuracy {accuracy:.2f}, "
                f"majority {chance:.2f}): the domains are alike at this layer, or its "
                "learning_rate is too low. Try another feature_layer or a higher learning_rate",
            )
        if progress >= 0.5 and accuracy > 0.99 and chance < 0.9:
            self._warn(
                "saturated",
                f"its discriminator is saturated (accuracy {accuracy:.3f} past half of training): "
                "the model does not hide the domain. Try a higher weight, a lower learning_rate "
                "or fewer frozen layers",
            )

    def _warn(self, kind: str, text: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            logger.warning("%s: %s.", self.name, text)


class DomainAdversarialCallback(AdaptationCallback):
    """Domain-adversarial training in one line: [`DANN`] on an existing Trainer.

    Reference:
        Ganin et al. 2016, "Domain-Adversarial Training of Neural Networks", arXiv:1505.07818.

    Args:
        target_dataset: Rows of the target domain, prepared like `train_dataset`; labels are not
            needed and never used. A list or dict of datasets for several target domains. May be
            left out if `train_dataset` has a `domain` column.
        streams: Further streams of rows by name.
        **dann: Arguments of [`DANN`]: `weight`, `ramp`, `feature_layer`, `pooling`,
            `hidden_sizes`, `dropout`, `learning_rate`, `weight_decay`, `name`.

    Example:
        ```python
        trainer.add_callback(DomainAdversarialCallback(target_dataset=target))
        trainer.train()
        ```
    """

    def __init__(
        self,
        target_dataset: Any = None,
        *,
        streams: Mapping[str, Any] | None = None,
        **dann: Any,
    ) -> None:
        super().__init__(
            DANN(**dann),
            target_dataset=target_dataset,
            streams=streams,
        )
