"""Gradients that may not raise the loss on a memory of the past: A-GEM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hf_adapt.alignment.gradients import gradient_of
from hf_adapt.continual.prepared_rows import check_labels, prepared_rows, rows_of
from hf_adapt.engine.auxiliary import seed_for
from hf_adapt.engine.collating import label_columns
from hf_adapt.engine.columns import dataset_columns, inputs_of
from hf_adapt.engine.gradients import loss_scale
from hf_adapt.engine.mixins import BatchTransform, GradientTransform
from hf_adapt.engine.normalisation import count_labels
from hf_adapt.engine.pairing import is_map_style, rows_at
from hf_adapt.engine.trainer import AdaptationMixin
from hf_adapt.models.state import preserved

if TYPE_CHECKING:
    from transformers import Trainer


def agem_projection(
    gradient: Sequence[torch.Tensor], reference: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""What to subtract of a reference so that a gradient does not point against it.

    .. math::
        \tilde g = g - \min\left(0, \frac{g \cdot \hat g}{\hat g \cdot \hat g}\right) \hat g

    Reference:
        Chaudhry et al. 2019, "Efficient Lifelong Learning with A-GEM", Eq. 11, arXiv:1812.00420.

    Args:
        gradient: g, in any number of tensors.
        reference: ĝ, the gradient on rows of the past, in tensors of the same shapes.

    Returns:
        The factor of the reference that is to be subtracted, 0 or less, and the cosine of the two.

    Shape:
        - both outputs: (), float32.

    Example:
        >>> factor, _ = agem_projection([torch.tensor([-1.0, 1.0])], [torch.tensor([1.0, 0.0])])
        >>> torch.tensor([-1.0, 1.0]) - factor * torch.tensor([1.0, 0.0])
        tensor([0., 1.])
    """
    pairs = list(zip(gradient, reference, strict=True))
    device = reference[0].device
    zero = torch.zeros((), device=device)
    dot = sum((torch.sum(g.float() * r.float()) for g, r in pairs), zero)
    size = sum((torch.sum(r.float() ** 2) for _, r in pairs), zero)
    own = sum((torch.sum(g.float() ** 2) for g, _ in pairs), zero)
    against = (dot < 0) & (size > 0)
    factor = torch.where(against, dot / size.clamp(min=torch.finfo(size.dtype).tiny), 0.0)
    cosine = dot / (size * own).sqrt().clamp(min=torch.finfo(size.dtype).tiny)
    return factor, cosine


class AGEM(GradientTransform):
    r"""Averaged gradient episodic memory: no step may raise the loss on a memory of the past.

    At each optimizer step the gradient of the task's loss is taken on rows of the memory too. Where
    the step's gradient points against it, that part is taken out, see [`agem_projection`]. It costs
    a forward and backward of `batch_size` rows for each step. The rows are used less than by
    [`Replay`], which trains on them at the same cost and usually keeps more; use this where the
    rows of the past must not be trained on.

    Reference:
        Chaudhry et al. 2019, "Efficient Lifelong Learning with A-GEM", arXiv:1812.00420. The
        gradient is the step's as a whole, before it is clipped.

    Args:
        memory: Prepared, labelled rows of the past, as `train_dataset` is, or a [`ReplayMemory`].
        batch_size: Rows of the memory in each optimizer step, over all processes.
        seed: Seed of which rows; they are a function of it and of the step.
        name: Prefix of what is logged.

    Logs:
        `agem/projected`: the share of the steps whose gradient was changed; `agem/cosine`: of the
        step's gradient and the memory's.

    Raises:
        TypeError: If the memory is none.
        ValueError: If the memory is empty, cannot be read by number, or has no labels or other
            columns than the training rows; if `batch_size` is out of range, or another adaptation
            changes the batches.

    Example:
        ```python
        adapt(trainer, AGEM(old_rows, batch_size=32)).train()
        ```
    """

    name = "agem"

    def __init__(
        self, memory: Any, batch_size: int = 16, *, seed: int = 0, name: str | None = None
    ) -> None:
        self.rows = rows_of(memory, "memory")
        if not is_map_style(self.rows):
            raise ValueError(
                f"The memory is a {type(self.rows).__name__}, whose rows are not read by number. "
                "Keep some of them: datasets.Dataset.from_list(list(itertools.islice(memory, n)))."
            )
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1.")
        self.batch_size, self.seed = batch_size, seed
        if name is not None:
            self.name = name
        self._sums: torch.Tensor | None = None
        self._step = 0

    def setup(self, trainer: Trainer) -> None:
        """Check the memory against the training rows."""
        processes = trainer.accelerator.num_processes
        if min(self.batch_size, len(self.rows)) < processes:
            raise ValueError(
                f"AGEM(batch_size={self.batch_size}) of {len(self.rows)} rows leaves some of the "
                f"{processes} processes without any. Use a larger batch_size or memory."
            )
        assert isinstance(trainer, AdaptationMixin)
        others = trainer._adaptation_active
        if changing := [each.name for each in others if isinstance(each, BatchTransform)]:
            raise ValueError(
                f"AGEM takes the gradient on the memory's rows as the data collator makes them, "
                f"without what {', '.join(changing)} adds to the batches of the training rows. "
                "Use Replay(memory), whose rows go through the same batches."
            )
        labels = label_columns(trainer.label_names, trainer.data_collator)
        wanted, found = dataset_columns(trainer.train_dataset), dataset_columns(self.rows)
        if wanted is not None and found is not None:
            missing = sorted(({*wanted} & {*inputs_of(trainer), *labels}) - {*found})
            if missing:
                raise ValueError(
                    f"The memory has no column {', '.join(map(repr, missing))}, which the "
                    f"train_dataset has; it has {', '.join(map(repr, found))}. A-GEM needs "
                    "labelled rows, prepared like the train_dataset."
                )
        check_labels(trainer, self.rows)
        self._trainer, self._sums = trainer, None
        self._rows, self._collator = prepared_rows(trainer, self.rows)

    def before_step(self, step: int) -> None:
        """Which rows come depends on the step."""
        self._step = step

    def transform_gradients(self, model: nn.Module) -> None:
        """Take out of the step's gradient what points against the memory's."""
        weights = [p for p in model.parameters() if p.requires_grad and p.grad is not None]
        gradients = [p.grad for p in weights if p.grad is not None]
        if not weights:
            return
        reference = self._reference(model, weights)
        if reference is None:
            return
        factor, cosine = agem_projection(gradients, reference)
        for gradient, each in zip(gradients, reference, strict=True):
            # A memory without a label has a loss of 0 / 0, and the factor 0.
            gradient.sub_(torch.where(factor < 0, each * factor, 0.0).to(gradient.dtype))
        seen = torch.stack([(factor < 0).float(), cosine, torch.ones_like(cosine)])
        self._sums = seen if self._sums is None else self._sums + seen

    def _batch(self) -> Mapping[str, Any]:
        """This process's rows of the memory in this step."""
        accelerator = self._trainer.accelerator
        generator = torch.Generator().manual_seed(seed_for(f"agem {self._step}", self.seed))
        drawn = torch.randperm(len(self._rows), generator=generator)[: self.batch_size].tolist()
        own = drawn[accelerator.process_index :: accelerator.num_processes]
        return self._collator(rows_at(self._rows, own))

    def _reference(
        self, model: nn.Module, weights: Sequence[nn.Parameter]
    ) -> list[torch.Tensor] | None:
        """The gradient of the task's loss on the memory; None where it is not finite."""
        trainer: Any = self._trainer
        assert isinstance(trainer, AdaptationMixin)
        # The draws of dropout are of their own, and what a forward changes is put back.
        with preserved(model), torch.enable_grad():
            torch.manual_seed(
                seed_for(f"agem {self._step} {trainer.args.process_index}", self.seed)
            )
            inputs = trainer._prepare_inputs(dict(self._batch()))
            labels = count_labels(trainer, inputs)
            with trainer.compute_loss_context_manager():
                loss: Any = super(AdaptationMixin, trainer).compute_loss(model, dict(inputs))
            # fp16 gradients would underflow; the projection does not depend on the scale.
            scale = loss_scale(trainer) or 1.0
            found = gradient_of(loss * scale, weights, retain_graph=False)
        found = [each.float() for each in found]
        accelerator = trainer.accelerator
        if accelerator.num_processes > 1:
            count = torch.ones(()) if labels is None else labels.float()
            count = count.to(accelerator.device)
            total = accelerator.reduce(count, reduction="sum").clamp(min=1)
            share = torch.where(count > 0, count / total, 0.0)
            # A process whose rows have no label has a loss of 0 / 0.
            found = [torch.where(count > 0, each * share, 0.0) for each in found]
            found = [accelerator.reduce(each, reduction="sum") for each in found]
        if scale != 1.0 and not all(bool(torch.isfinite(each).all()) for each in found):
            return None
        return found

    def on_log(self, logs: dict[str, float], progress: float) -> None:
        """Add how often the gradient was changed."""
        if self._sums is not None:
            projected, cosine, steps = self._sums.tolist()
            logs[f"{self.name}/projected"] = projected / steps
            logs[f"{self.name}/cosine"] = cosine / steps
            self._sums = None

    def close(self) -> None:
        """Forget the Trainer."""
        self.__dict__.pop("_trainer", None)
        self.__dict__.pop("_rows", None)
        self._sums = None
