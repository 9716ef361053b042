"""Perturbed input embeddings: training on, or stability under, the worst small change of a row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.hooks import RemovableHandle

from hf_adapt.alignment.gradients import gradient_of
from hf_adapt.alignment.predictions import ClassPredictions, refuse_heads
from hf_adapt.engine.adaptation import Term
from hf_adapt.engine.labels import IGNORED
from hf_adapt.engine.parts import Part
from hf_adapt.engine.progress import Schedule

if TYPE_CHECKING:
    from transformers import Trainer

    from hf_adapt.engine.batch import Batch, Rows

FIRST_STEP = 0.1
"""Size of the random perturbation at which VAT takes the gradient, as a share of its own."""


class EmbeddingPerturbation(ClassPredictions):
    """What objectives with perturbed input embeddings share.

    The perturbation is added by a hook to what the model's input embeddings give, so that the
    inputs stay what they are; it works for whatever `get_input_embeddings()` names: words, patches
    of an image, frames. It works under LoRA, where the embeddings are frozen.

    Args:
        weight: Factor of the term, or a schedule of it.
        epsilon: Norm of a row's perturbation, as a share of the norm of its embeddings, so that one
            value suits models of any scale.
        name: Prefix of the logs.

    Raises:
        ValueError: If the weight is negative or epsilon not positive.
    """

    def __init__(
        self, weight: float | Schedule = 1.0, epsilon: float = 0.05, name: str | None = None
    ) -> None:
        super().__init__(weight, name=name)
        if not epsilon > 0:
            raise ValueError(f"epsilon={epsilon} must be positive.")
        self.epsilon = epsilon
        self._handle: RemovableHandle | None = None
        self._embeddings: nn.Module | None = None

    def setup(self, trainer: Trainer) -> None:
        """Find the input embeddings and let a gradient reach what they give."""
        super().setup(trainer)
        model: Any = trainer.model
        try:
            self._embeddings = model.get_input_embeddings()
        except (AttributeError, NotImplementedError):
            self._embeddings = None
        if self._embeddings is None:
            raise ValueError(
                f"{type(self).__name__} perturbs the input embeddings, and "
                f"{type(model).__name__}.get_input_embeddings() names none. Define it in "
                "the model, or use RDrop."
            )
        self._handle = self._embeddings.register_forward_hook(_with_gradient)

    def close(self) -> None:
        """Remove the hook."""
        if self._handle is not None:
            self._handle.remove()
        self._handle = self._embeddings = None

    def captures(self, model: nn.Module) -> Mapping[nn.Module, None]:
        """What the input embeddings give."""
        assert self._embeddings is not None
        return {self._embeddings: None}

    def embeddings(
        self, batch: Batch, observe: Callable[[torch.Tensor], torch.Tensor]
    ) -> list[torch.Tensor]:
        """What a function gives for the embeddings of whole forwards, for our rows of them."""
        key = id(self._embeddings)
        for part in batch.parts:
            if key not in part.hidden:
                raise ValueError(
                    f"{type(self).__name__} perturbs the input embeddings, and "
                    f"{type(self._embeddings).__name__} was not run on the rows of this batch (a "
                    "cached prefix, or inputs_embeds). Leave the cache out."
                )
        return [part.observed(key, observe) for part in batch.parts]

    def scaled(self, batch: Batch, directions: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Directions as perturbations of norm `epsilon`, on the real tokens of each row."""
        made = []
        rows = self.embeddings(batch, lambda hidden: hidden.detach())
        for part, row, direction in zip(batch.parts, rows, directions, strict=True):
            kept = _token_mask(part, row)
            norms = [
                torch.linalg.vector_norm((x.float() * kept).flatten(1), dim=1)
                for x in (row, direction)
            ]
            tiny = torch.finfo(torch.float32).tiny
            factor = self.epsilon * norms[0] / norms[1].clamp(min=tiny)
            made.append(direction.float() * kept * factor.view(-1, *[1] * (row.ndim - 1)))
        return made

    def perturbed(self, batch: Batch, perturbations: Sequence[torch.Tensor]) -> Batch:
        """A further forward with a perturbation of the embeddings of each part."""
        waiting: list[torch.Tensor | None] = list(perturbations)
        current: list[torch.Tensor] = []

        def next_part(inputs: dict[str, Any]) -> dict[str, Any]:
            # A row that stands in where a process has none comes after the parts.
            current[:] = [p for p in [waiting.pop(0) if waiting else None] if p is not None]
            return inputs

        def add(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
            # Once: encoders and decoders may share their embeddings.
            if not current or current[0].shape != output.shape:
                return output
            return output + current.pop().to(output.dtype)

        assert self._embeddings is not None
        with _hooked(self._embeddings, add):
            return batch.forward(next_part)


def _with_gradient(module: nn.Module, args: Any, output: Any) -> Any:
    """Under LoRA embeddings are frozen; a gradient must reach them all the same."""
    if not isinstance(output, torch.Tensor) or not output.is_floating_point():
        raise ValueError(
            f"The input embeddings ({type(module).__name__}) give a {type(output).__name__}; to be "
            "perturbed they must give one tensor. Use RDrop."
        )
    if torch.is_grad_enabled() and not output.requires_grad:
        return output.detach().requires_grad_()
    return output


@contextmanager
def _hooked(module: nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _token_mask(part: Part, embeddings: torch.Tensor) -> torch.Tensor:
    """1 on real tokens, in the embeddings' number of dimensions."""
    mask = part.attention_mask
    if mask is None or mask.shape != embeddings.shape[:2]:
        return embeddings.new_ones(())
    return mask.view(*mask.shape, *[1] * (embeddings.ndim - 2)).to(embeddings.dtype)


class FGM(EmbeddingPerturbation):
    r"""Adversarial training: the task is learned on the worst small change of each row as well.

    .. math::
        L = \frac{1}{N} \sum_{i=1}^{N} CE(f(e_i + r_i), y_i), \qquad
        r_i = \epsilon \lVert e_i \rVert \frac{g_i}{\lVert g_i \rVert}, \quad
        g_i = \nabla_{e_i} CE(f(e_i), y_i)

    over the labelled source rows. A regulariser that makes a model less dependent on single words;
    it uses no target rows and composes with every method. [`VAT`] asks the same of unlabelled rows.
    It costs one further forward and two further backwards of the source rows.

    Reference:
        Miyato et al. 2017, "Adversarial Training Methods for Semi-Supervised Text Classification",
        Eq. 2-4, arXiv:1605.07725.
        Deviation: they normalise embeddings and perturb them by an absolute norm; here the
        embeddings stay, and the norm is relative to theirs.

    Args:
        weight: Factor of the term, or a schedule of it.
        epsilon: Norm of a row's perturbation, as a share of the norm of its embeddings.
        name: Prefix of the logs.

    Logs:
        `loss/fgm`.

    Raises:
        ValueError: If the weight is negative or epsilon not positive, or the model has no exclusive
            classes or no input embeddings.

    Example:
        >>> FGM(epsilon=0.02).name
        'fgm'
    """

    name = "fgm"
    streams = ()

    def setup(self, trainer: Trainer) -> None:
        """Refuse decoders, whose labels are not those of the embedded tokens."""
        refuse_heads(trainer.model, "FGM", "conditional_generation", "question_answering")
        super().setup(trainer)

    def num_items(self, rows: Rows) -> torch.Tensor:
        """The number of labels."""
        return (rows.labels() != IGNORED).sum()

    def loss(self, batch: Batch) -> Term:
        """The cross-entropy of the perturbed rows, summed over the labels."""
        labels = batch.labels()
        logits, _ = self.class_logits(batch)
        count = (labels != IGNORED).sum()
        plain = F.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORED)
        if not plain.requires_grad:
            return plain, count  # where nothing is trained, there is no direction
        gradients = self.embeddings(batch, lambda hidden: gradient_of(plain, [hidden])[0])
        further = self.perturbed(batch, self.scaled(batch, gradients))
        logits, _ = self.class_logits(further)
        return F.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORED), count


class VAT(EmbeddingPerturbation):
    r"""Virtual adversarial training: predictions that the worst small change of a row leaves alone.

    .. math::
        L = \frac{1}{N} \sum_{i=1}^{N} KL\big(p(e_i) \,\|\, p(e_i + r_i)\big), \qquad
        r_i = \epsilon \lVert e_i \rVert \frac{g_i}{\lVert g_i \rVert}, \quad
        g_i = \nabla_{d} KL\big(p(e_i) \,\|\, p(e_i + d)\big) \big|_{d = \xi_i}

    over all rows, source and target, as it needs no labels; ξ is a small random perturbation, and
    no gradient flows through p(e) and r. It moves the decision boundary away from the target rows.
    It costs two further forwards and backwards of all rows; [`RDrop`] costs one.

    Reference:
        Miyato et al. 2018, "Virtual Adversarial Training", Eq. 5 and algorithm 1, arXiv:1704.03976;
        on embeddings: Miyato et al. 2017, arXiv:1605.07725.
        Deviation: the norm is relative to that of the row's embeddings.

    Args:
        weight: Factor of the term, or a schedule of it.
        epsilon: Norm of a row's perturbation, as a share of the norm of its embeddings.
        name: Prefix of the logs.

    Logs:
        `loss/vat`.

    Raises:
        ValueError: If the weight is negative or epsilon not positive, or the model has no exclusive
            classes or no input embeddings.

    Example:
        >>> VAT(epsilon=0.02).name
        'vat'
    """

    name = "vat"

    def num_items(self, rows: Rows) -> torch.Tensor:
        """Every row (or token) has a prediction."""
        return rows.num_predictions()

    def loss(self, batch: Batch) -> Term:
        """The divergence of the perturbed rows' predictions, summed."""
        logits, _ = self.class_logits(batch)
        plain = F.log_softmax(logits.detach(), dim=-1)

        def divergence(further: Batch) -> torch.Tensor:
            logp = F.log_softmax(self.class_logits(further)[0], dim=-1)
            return F.kl_div(logp, plain, reduction="sum", log_target=True)

        directions = self.embeddings(batch, lambda hidden: torch.randn_like(hidden.detach()))
        if logits.requires_grad:
            first = [FIRST_STEP * p for p in self.scaled(batch, directions)]
            first = [p.requires_grad_() for p in first]
            directions = gradient_of(divergence(self.perturbed(batch, first)), first)
        term = divergence(self.perturbed(batch, self.scaled(batch, directions)))
        return term, torch.as_tensor(len(logits), device=logits.device)
