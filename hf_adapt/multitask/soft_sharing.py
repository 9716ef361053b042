"""Two models of two tasks whose weights are tied instead of shared."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import nn

from hf_adapt.continual.pulls import WeightPull
from hf_adapt.engine.mixins import GradientTransform
from hf_adapt.engine.progress import Schedule, value_at
from hf_adapt.engine.training import unwrapped_model
from hf_adapt.models.groups import matches
from hf_adapt.models.heads import weights_of_the_head

if TYPE_CHECKING:
    from transformers import Trainer

logger = logging.getLogger(__name__)

Norm = Literal["l2", "trace"]

BLOCK = 2**20
"""Numbers of a weight that are worked on at once in float64."""


class SoftSharing(GradientTransform):
    r"""Tie the weights of a model to those of a second one, which learns another task.

    .. math::
        L = L_a + L_b + \frac{\lambda}{2} \sum_W \lVert W_a - W_b \rVert^2
        \qquad \text{or} \qquad
        L = L_a + L_b + \lambda \sum_W \lVert [\mathrm{vec}\, W_a, \mathrm{vec}\, W_b] \rVert_*

    The L2 norm pulls the weights of both models together. The trace norm, the sum of the singular
    values of the matrix whose two columns are a weight of each model, asks for columns of one
    direction, whatever their lengths; it also makes weights smaller, and closes a small distance
    as strongly as a large one. Use [`mix`] and one model where the tasks agree: it costs half.

    Each model is trained by a Trainer of its own, with its own rows, collator, metrics, schedule
    and checkpoints. The weights of the second model are read at each step as they are then, and get
    no gradient from here. A model is tied to one that is finished by an adaptation on its Trainer;
    two that both learn are tied by one on each, and take turns::

        adapt(trainer_a, SoftSharing(model_b, 0.1))
        adapt(trainer_b, SoftSharing(model_a, 0.1))
        for turn in range(5):
            set_seed(turn)  # of transformers; else each turn has the same order of rows
            trainer_a.train()
            trainer_b.train()

    Each adds the gradient of the tie for its own weights, so that the turns lower L together. A
    turn is a training: give it `num_train_epochs=1` and a constant learning rate. The optimizers
    keep their state between turns.

    Reference:
        Duong et al. 2015, "Low Resource Dependency Parsing: Cross-lingual Parameter Sharing in a
        Neural Network Parser" (L2), ACL; Yang & Hospedales 2017, "Trace Norm Regularised
        Deep Multi-Task Learning" (their last-axis flattening), arXiv:1606.04038.
        Deviation: the trace norm leaves biases and norms free. It pulls a small vector as strongly
        as a large one, and that of a bias without a gradient (of attention's keys) is rounding.

    Args:
        other: The second model, not wrapped. Its weights are not saved in checkpoints: resume with
            those that it had.
        weight: λ, or a schedule of it; a constant 0 turns it off. Under Adam a weight whose
            gradient is mostly the tie's moves by the learning rate whatever λ is.
        norm: `"l2"` or `"trace"`.
        layers: What is tied: names of modules or parameters, or regular expressions; both models
            must have all that they match. By default all weights that both models have, except
            their classification heads.
        name: Prefix of what is logged and stored.

    Logs:
        `softsharing/distance`: The Euclidean distance of the tied weights, for either norm;
        `softsharing/penalty`: what the tie adds to the loss.

    Raises:
        TypeError: If the other model is none.
        ValueError: If an option is out of range, no weight matches, the models' weights have other
            names or shapes, or one has an adapter (LoRA).

    Example:
        >>> SoftSharing(nn.Linear(2, 2), 0.1, norm="trace").norm
        'trace'
    """

    def __init__(
        self,
        other: nn.Module,
        weight: float | Schedule,
        norm: Norm = "l2",
        layers: str | Sequence[str] | None = None,
        name: str | None = None,
    ) -> None:
        if not isinstance(other, nn.Module):
            raise TypeError(f"other= is a {type(other).__name__}: expected a model. Load it first.")
        if not callable(weight) and not 0 <= weight < math.inf:
            raise ValueError(
                f"weight={weight} must be a finite number >= 0, or a schedule; 0 turns the tie off."
            )
        if norm not in get_args(Norm):
            raise ValueError(f"norm={norm!r} is unknown: use 'l2' or 'trace'.")
        self.other, self.weight, self.norm = other, weight, norm
        self.layers = [layers] if isinstance(layers, str) else layers and list(layers)
        if name is not None:
            self.name = name
        self._own: list[nn.Parameter] = []
        self._others: list[nn.Parameter] = []
        self._now = 0.0

    @property
    def is_active(self) -> bool:
        """False where the weight is the constant 0."""
        return callable(self.weight) or self.weight != 0

    def setup(self, trainer: Trainer) -> None:
        """Find the weights that are tied."""
        self._trainer = trainer
        model = unwrapped_model(trainer)
        for which, each in (("the model", model), ("other=", self.other)):
            if hasattr(each, "peft_config"):
                raise ValueError(
                    f"SoftSharing ties single weights, and {which} has an adapter, whose weights "
                    "are frozen and changed by products. Merge it (merge_and_unload()), or train "
                    "without one."
                )
        own, there = dict(model.named_parameters()), dict(self.other.named_parameters())
        names = self._tied(model, own, there)
        if shared := [name for name in names if own[name] is there[name]]:
            raise ValueError(
                f"other= and the model share {shared[0]}: a weight is not tied to itself. Pass a "
                "second model, as copy.deepcopy(model)."
            )
        for name in names:
            if own[name].shape != there[name].shape:
                raise ValueError(
                    f"{name} has the shape {tuple(own[name].shape)} in the model and "
                    f"{tuple(there[name].shape)} in other=. Name the layers of one shape by layers="
                    f"{_modules(own, there)}, or use models of one size."
                )
        if self.norm == "trace":
            names = [name for name in names if own[name].ndim > 1]
        if not any(own[name].requires_grad for name in names):
            raise ValueError(
                f"SoftSharing ties {_few(names) or 'no matrix'}, of which nothing trains: unfreeze "
                "some, or name others by layers=."
            )
        self._own = [own[name] for name in names]
        self._others = [there[name] for name in names]

    def _tied(
        self, model: nn.Module, own: dict[str, nn.Parameter], there: dict[str, nn.Parameter]
    ) -> list[str]:
        """The names of the weights that are tied."""
        if self.layers is None:
            heads = {*weights_of_the_head(model), *weights_of_the_head(self.other)}
            names = [name for name in own if name in there and name not in heads]
            if not names:
                raise ValueError(
                    f"The models have no weight of one name: the one has {_few([*own])}, other= "
                    f"{_few([*there])}. Tie models of one architecture."
                )
            rest = sorted({*own, *there} - {*names} - heads)
            if rest:
                logger.info("SoftSharing leaves free what one model lacks: %s.", _few(rest))
            return names
        for pattern in self.layers:
            found = [name for name in own if matches(pattern, name)]
            if not found:
                raise ValueError(
                    f"layers={pattern!r} matches no weight of the model, whose weights are "
                    f"{_few([*own])}."
                )
            if lacking := [name for name in found if name not in there]:
                raise ValueError(
                    f"layers={pattern!r} matches {_few(lacking)}, which other= lacks; it has "
                    f"{_few([*there])}. Name layers that both models have."
                )
        return [name for name in own if any(matches(pattern, name) for pattern in self.layers)]

    def before_step(self, step: int) -> None:
        """Set the weight of this step."""
        self._now = value_at(self.weight, step / max(1, self._trainer.state.max_steps))
        if not 0 <= self._now < math.inf:
            raise ValueError(
                f"The schedule of the weight gave {self._now} at step {step}; it must stay >= 0."
            )

    def transform_gradients(self, model: nn.Module) -> None:
        """Write the gradient of the tie; a weight without one takes no part in the step."""
        if not self._now:
            return
        if self.norm == "l2":
            self._pull().add_gradient(self._now)
            return
        pairs = [pair for pair in self._pairs() if pair[0].grad is not None]
        if not pairs:
            return
        _, factors = trace_norms(pairs)
        for (own, other), (plus, minus) in zip(pairs, factors.tolist(), strict=True):
            assert own.grad is not None
            now = own.detach()
            own.grad.add_(now + other, alpha=self._now * plus)
            own.grad.add_(now - other, alpha=self._now * minus)

    def _pairs(self) -> list[tuple[nn.Parameter, torch.Tensor]]:
        """The weights with those of the other model as they are now, on one device."""
        pairs = zip(self._own, self._others, strict=True)
        return [(own, other.detach().to(own.device)) for own, other in pairs]

    def _pull(self) -> WeightPull:
        return WeightPull(self._own, [other for _, other in self._pairs()], None)

    @torch.no_grad()
    def on_log(self, logs: dict[str, float], progress: float) -> None:
        """Add how far the models are from each other."""
        if not self._own:
            return
        half_square = float(self._pull().penalty())
        logs[f"{self.name}/distance"] = math.sqrt(2 * half_square)
        penalty = half_square if self.norm == "l2" else float(trace_norms(self._pairs())[0].sum())
        logs[f"{self.name}/penalty"] = self._now * penalty

    def close(self) -> None:
        """Forget the models' weights."""
        self._own, self._others = [], []

    def state_dict(self) -> dict[str, Any]:
        """A number that tells the other model's weights from others."""
        return {"other": self._fingerprint()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Compare the other model with that of the checkpoint."""
        if "other" in state and not math.isclose(state["other"], self._fingerprint()):
            logger.warning(
                "Training resumes tied to another model than when the checkpoint was saved: the "
                "weights of other= are not in it. Load those that it had, if it was not trained "
                "since."
            )

    def _fingerprint(self) -> float:
        return math.fsum(float(other.detach().double().sum()) for other in self._others)


def trace_norms(
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor]],
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""The trace norm of [vec A, vec B] for each pair, and its gradient for A.

    With the singular value decomposition U S Vᵀ of the matrix X = [vec A, vec B] the gradient is U
    Vᵀ = X (XᵀX)^(-1/2), without the singular values that are 0. As turning the columns changes
    neither, X is taken as [A + B, A - B] / √2, which is exact where A and B differ by little.

    Returns:
        (N,) the norms; (N, 2) the factors of A + B and A - B in the gradient for A.
    """
    device = pairs[0][0].device
    gram = torch.stack([_products(a.detach(), b.detach()).to(device) for a, b in pairs])
    squares, vectors = torch.linalg.eigh(gram)
    roots = squares.clamp_min(0).sqrt()
    counts = squares > 1e-14 * squares[:, -1:]  # a difference in the last bit is none
    inverse = torch.where(counts, 1 / roots, 0.0)
    root_of_inverse = (vectors * inverse[:, None]) @ vectors.mT
    return roots.sum(1), root_of_inverse.sum(1) / 2


def _products(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The products of (A + B) / √2 and (A - B) / √2, (2, 2) in float64."""
    total = torch.zeros(2, 2, dtype=torch.float64, device=a.device)
    for one, other in zip(*(torch.split(w.flatten(), BLOCK) for w in (a, b)), strict=True):
        first, second = one.double(), other.double()
        turned = torch.stack([first + second, first - second])
        total += turned @ turned.T / 2
    return total


def _few(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) < 4 else f"{names[0]}, {names[1]}, …, {names[-1]}"


def _modules(own: dict[str, nn.Parameter], there: dict[str, nn.Parameter]) -> list[str]:
    """Some weights of one shape."""
    return [n for n, p in own.items() if n in there and p.shape == there[n].shape][:2]
