"""Sharpness-aware minimisation of the task's loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hf_adapt.alignment.gradients import gradient_of
from hf_adapt.engine.adaptation import Adaptation
from hf_adapt.engine.trainer import AdaptationMixin

if TYPE_CHECKING:
    from transformers import Trainer


class SAM(Adaptation):
    r"""Sharpness-aware minimisation: the task is trained where its loss is highest nearby.

    .. math::
        g = \nabla L(w + \hat e), \qquad
        \hat e = \rho \frac{\nabla L_{task}(w)}{\lVert \nabla L_{task}(w) \rVert_2}

    It finds flat minima, and makes adversarial alignment ([`DANN`], [`CDAN`]) more stable: the task
    is smoothed, and the adversarial loss is not, which would hurt. All terms that are computed from
    the task's own forward are taken at w + e as well, as in SDAT. It costs one further forward and
    backward of the training rows.

    The perturbation is that of a micro-batch (and of a process), as in the papers, which call it
    m-sharpness: the gradient of an optimizer step is the mean of those of its micro-batches. To
    make it that of a larger batch, raise `per_device_train_batch_size`.

    Reference:
        Foret et al. 2021, "Sharpness-Aware Minimization for Efficiently Improving Generalization",
        Eq. 2-3, arXiv:2010.01412; for domain adaptation: Rangwani et al. 2022, "A Closer Look at
        Smoothness in Domain Adversarial Training" (SDAT), arXiv:2206.08213.

    Args:
        rho: Norm of the perturbation of all trained weights together. 0.02 to 0.05 in SDAT.
        name: Prefix of what is stored.

    Raises:
        ValueError: If rho is not positive, the weights are sharded (FSDP, DeepSpeed), or gradients
            are checkpointed.

    Example:
        >>> SAM(rho=0.02).name
        'sam'
    """

    name = "sam"

    def __init__(self, rho: float = 0.05, name: str | None = None) -> None:
        if not rho > 0:
            raise ValueError(f"rho={rho} must be positive.")
        self.rho = rho
        self._trainer: Trainer | None = None
        if name is not None:
            self.name = name

    def setup(self, trainer: Trainer) -> None:
        """Refuse sharded weights and gradient checkpointing."""
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            what = "FSDP" if trainer.is_fsdp_enabled else "DeepSpeed"
            raise ValueError(
                f"SAM perturbs whole weights, and {what} gives each process a piece of them. Use "
                "DDP, or leave it out."
            )
        model: Any = trainer.accelerator.unwrap_model(trainer.model)
        if trainer.args.gradient_checkpointing or getattr(
            model, "is_gradient_checkpointing", False
        ):
            raise ValueError(
                "SAM computes the task with weights that it puts back after the forward, and "
                "gradient checkpointing computes parts of that forward again later. Turn "
                "gradient_checkpointing off, or leave SAM out."
            )
        self._trainer = trainer

    def close(self) -> None:
        """Forget the Trainer."""
        self._trainer = None

    @contextmanager
    def around_forward(self, inputs: Mapping[str, Any]) -> Iterator[None]:
        """Run the task's forward with weights perturbed in the direction of its gradient."""
        trainer = self._trainer
        if trainer is None or not torch.is_grad_enabled():
            yield  # the look at the first batch
            return
        model: nn.Module = trainer.accelerator.unwrap_model(trainer.model)
        parameters = [p for p in model.parameters() if p.requires_grad]
        assert isinstance(trainer, AdaptationMixin)
        loss: Any = super(AdaptationMixin, trainer).compute_loss(model, dict(inputs))
        scaler = getattr(trainer.accelerator, "scaler", None)
        if scaler is not None and scaler.is_enabled():  # fp16 gradients would underflow
            loss = loss * scaler.get_scale()
        gradients = gradient_of(loss, parameters, retain_graph=False)
        norm = torch.linalg.vector_norm(
            torch.stack([torch.linalg.vector_norm(g.float()) for g in gradients])
        )
        # No labelled row, or an overflow: the weights as they are.
        scale = torch.where(torch.isfinite(norm) & (norm > 0), self.rho / norm, 0.0)
        with replaced_parameters(
            model,
            {
                p: p + torch.where(scale > 0, g * scale, torch.zeros_like(g)).to(p.dtype)
                for p, g in zip(parameters, gradients, strict=True)
            },
        ):
            yield


@contextmanager
def replaced_parameters(
    model: nn.Module, values: Mapping[nn.Parameter, torch.Tensor]
) -> Iterator[None]:
    """The model computes with other values of its parameters, through which gradients flow."""
    entries = [
        (module._parameters, key, parameter)
        for module in model.modules()
        for key, parameter in module._parameters.items()
        if parameter is not None and parameter in values
    ]
    held: Any
    try:
        for held, key, parameter in entries:
            held[key] = values[parameter]
        yield
    finally:
        for held, key, parameter in entries:
            held[key] = parameter
